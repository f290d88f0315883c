"""The built wheel, without the checkout, is complete: packages, types, licence, metadata; and it works."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

SCRIPT = """
import importlib.metadata, importlib.util, json
import torch
import probes, stability

check = stability.verify_sigmoid_derivative_bound(dtype=torch.bfloat16)
print(json.dumps({
    "files": [stability.__file__, probes.__file__],
    "checkout": [name for name in ("experiments", "tests") if importlib.util.find_spec(name)],
    "version": importlib.metadata.version("stability-probes"),
    "checked": check.checked,
    "holds": check.holds,
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools writes build/ and *.egg-info beside the sources."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("stability", "probes", "experiments", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        directory,
    )
    run(*pip, source, cwd=directory)
    (built,) = directory.glob("*.whl")
    return built


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == "stability_probes-0.1.0-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        "stability",
        "probes",
        "stability_probes-0.1.0.dist-info",
    }
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in ("stability", "probes")
        for path in (ROOT / package).rglob("*.py")
    }
    assert sources | {"stability/py.typed", "probes/py.typed"} == {
        name for name in names if "dist-info" not in name
    }


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = "stability_probes-0.1.0.dist-info"
    metadata = archive.read(f"{info}/METADATA").decode()
    for line in (
        "Name: stability-probes",
        "Version: 0.1.0",
        "License-Expression: MIT",
        "Requires-Python: >=3.11",
    ):
        assert line in metadata.splitlines()
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )

    # The dependencies are borrowed from here (torch alone is gigabytes). A .pth line adds a directory without
    # reading the .pth files inside it, so the checkout's editable install stays out of sight.
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    site_packages = next(environment.glob("lib/python*/site-packages"))
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies))

    seen = json.loads(run(python, "-I", "-c", SCRIPT, cwd=tmp_path).splitlines()[-1])
    assert all(Path(file).is_relative_to(site_packages) for file in seen.pop("files"))
    assert seen == {"checkout": [], "version": "0.1.0", "checked": 65_280, "holds": True}

"""Imports run one way, experiments → probes → stability; optional packages are imported only where used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIRST_PARTY = ("stability", "probes", "experiments")
# What `import stability, probes` must not need.
LAZY = (
    "triton", "tensorboard", "torch.utils.tensorboard", "matplotlib", "PIL", "rich",
    "scanpy", "anndata", "h5py", "transformers", "accelerate", "lightning", "wandb", "mlflow",
)  # fmt: skip


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_not_run_at_import(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def imported_names(tree: ast.AST, path: Path, *, only_at_import: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, `from a import b` as `a.b`, relative ones resolved.

    `only_at_import` leaves out what importing the file does not run: functions, `if TYPE_CHECKING:` blocks.
    """
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif not (only_at_import and is_not_run_at_import(node)):
            yield from imported_names(node, path, only_at_import=only_at_import)


def imports_of(path: Path, *, only_at_import: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return set(imported_names(tree, path, only_at_import=only_at_import))


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def loaded_by(*packages: str) -> set[Path]:
    """The first-party files that `import package` runs, found by following their imports at import time."""
    by_name = {module_name(path): path for package in FIRST_PARTY for path in sources(package)}
    seen: set[Path] = set()
    pending = list(packages)
    while pending:
        parts = pending.pop().split(".")
        # Importing a.b.c runs a and a.b first; the last part may be an attribute and not a module.
        for length in range(1, len(parts) + 1):
            path = by_name.get(".".join(parts[:length]))
            if path is not None and path not in seen:
                seen.add(path)
                pending.extend(imports_of(path, only_at_import=True))
    return seen


def offenders(
    paths: list[Path] | set[Path], forbidden: tuple[str, ...], **options: bool
) -> dict[str, list[str]]:
    found = {
        str(path.relative_to(ROOT)): sorted(
            name for name in imports_of(path, **options) if is_within(name, forbidden)
        )
        for path in sorted(paths)
    }
    return {path: names for path, names in found.items() if names}


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_stability_imports_neither_probes_nor_experiments() -> None:
    assert offenders(sources("stability"), ("probes", "experiments")) == {}


def test_probes_import_no_experiments() -> None:
    assert offenders(sources("probes"), ("experiments",)) == {}


def test_stability_needs_only_torch_numpy_scipy() -> None:
    allowed = (*sys.stdlib_module_names, "stability", "torch", "numpy", "scipy")
    for path in sources("stability"):
        # Kernels are written in Triton; everything else of the mathematics must run without it.
        here = (*allowed, "triton") if {"triton", "hopper"} & {*path.parts} else allowed
        names = {name for name in imports_of(path) if not is_within(name, here)}
        assert names == set(), f"{path.relative_to(ROOT)} imports {sorted(names)}"


def test_optional_packages_are_not_imported_by_import_stability_and_probes() -> None:
    loaded = loaded_by("stability", "probes")
    assert {ROOT / "stability/__init__.py", ROOT / "probes/__init__.py"} <= loaded
    assert offenders(loaded, LAZY, only_at_import=True) == {}


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "probes" / "sinks" / "file.py"
    source = """
from typing import TYPE_CHECKING
from ..record import Record
from . import memory
try:
    import triton
except ImportError:
    pass
if TYPE_CHECKING:
    import anndata
class Sink:
    import rich.table
    def open(self):
        from torch.utils.tensorboard import SummaryWriter
"""
    at_import = set(imported_names(ast.parse(source), path, only_at_import=True))
    assert at_import == {
        "typing.TYPE_CHECKING",
        "probes.record.Record",
        "probes.sinks.memory",
        "triton",
        "rich.table",
    }
    anywhere = set(imported_names(ast.parse(source), path))
    assert anywhere - at_import == {"anndata", "torch.utils.tensorboard.SummaryWriter"}


def test_import_works_with_optional_packages_blocked() -> None:
    # None in sys.modules makes `import name` raise ImportError, as if it were not installed.
    run_python(f"import sys; sys.modules.update(dict.fromkeys({LAZY})); import stability, probes")


def test_import_loads_no_optional_package_and_leaves_cuda_alone() -> None:
    output = run_python(
        "import sys, torch, numpy, scipy\n"
        "before = set(sys.modules)\n"
        "import stability, probes\n"
        f"print(sorted((set(sys.modules) - before) & set({LAZY})), torch.cuda.is_initialized())"
    )
    assert output.split("\n")[-2] == "[] False"

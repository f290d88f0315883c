"""`make docs`: the site builds without warnings or network and has every public name, with its example."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import probes
import probes.report
import stability
import stability.testing

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

# Rooms with an `__all__` that are not public, and why.
PRIVATE_ROOMS = {"stability.attention.hopper": "kernels, which sigmoid_attention calls"}

# What a page loads: a link that a person may follow is none of it.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|audio|video|embed|object)\b[^>]*?\b(?:src|srcset|data)=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b[^>]*?\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|url\(\s*["']?((?:https?:)?//[^"')]+)"""
    r"""|@import\s+["']((?:https?:)?//[^"']+)"""
)


def external_addresses(text: str) -> list[str]:
    """Addresses on other machines that a browser would fetch with this HTML or CSS."""
    return [next(filter(None, groups)) for groups in LOADED.findall(text)]


def public_rooms() -> list[ModuleType]:
    """All modules of the two packages with an `__all__`, but the private ones."""
    names = [
        module.name
        for package in (stability, probes)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if "__all__" in Path(module_file(module)).read_text(encoding="utf-8")
    ]
    return [
        importlib.import_module(name) for name in ("stability", "probes", *names) if name not in PRIVATE_ROOMS
    ]


def module_file(module: pkgutil.ModuleInfo) -> Path:
    folder = Path(module.module_finder.path)  # type: ignore[union-attr]
    name = module.name.rpartition(".")[2]
    return folder / name / "__init__.py" if module.ispkg else folder / f"{name}.py"


def test_every_public_room_has_a_page() -> None:
    pytest.importorskip("sphinx", reason="the site needs the extra `docs`")
    rooms = runpy.run_path(str(DOCS / "sphinx_extensions" / "public_names.py"))["ROOMS"]
    assert {module.__name__ for module in public_rooms()} == set(rooms)
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    assert set(re.findall(r"^\.\. public-names:: (\S+)$", pages, re.MULTILINE)) == set(rooms)


@pytest.mark.parametrize("room", public_rooms(), ids=lambda room: room.__name__)
def test_every_public_name_has_an_example_that_runs(room: ModuleType) -> None:
    """The doctests of both packages run with every `pytest`; here, that there is one."""
    made_of_code = {
        name: inspect.unwrap(getattr(room, name))
        for name in room.__all__
        if inspect.isclass(getattr(room, name)) or inspect.isfunction(inspect.unwrap(getattr(room, name)))
    }
    assert made_of_code
    assert not [name for name, value in made_of_code.items() if ">>>" not in (value.__doc__ or "")]


@pytest.mark.parametrize("value", [probes.report.write_report, stability.testing.assert_within_error_budget])
def test_public_names_of_rooms_without_all_have_an_example(value: Callable[..., object]) -> None:
    assert ">>>" in (value.__doc__ or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx", reason="the site needs the extra `docs`")
    out = tmp_path_factory.mktemp("site")
    # What `make docs` runs. Nothing is fetched: a proxy that does not exist makes every attempt an error.
    recipe = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "-m sphinx" in line)
    command = recipe.split("-m sphinx ")[1].replace("$(ARGS)", "").replace("build/docs", str(out)).split()
    assert "--fail-on-warning" in command
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", *command],
        cwd=ROOT,
        env={"PATH": "", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.mark.slow
def test_every_public_name_is_on_the_site(site: Path) -> None:
    inventory = pytest.importorskip("sphinx.util.inventory").InventoryFile
    with (site / "objects.inv").open("rb") as file:
        invdata = inventory.load(file, "", lambda base, path: path)
    documented = {name for kind, names in invdata.items() if kind.startswith("py:") for name in names}
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "reference").glob("*.html"))
    for room in public_rooms():
        for name in room.__all__:
            # Documented here, or mentioned here with a link to the room that documents it.
            mention = rf'<span class="pre">{name}</span></code>: <a class="[^"]*" href="[^"]*\.{name}"'
            is_there = f"{room.__name__}.{name}" in documented or re.search(mention, pages)
            assert is_there, f"{room.__name__}.{name} is not on the site"


@pytest.mark.slow
def test_pages_need_no_network(site: Path) -> None:
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 20
    for page in pages:
        assert not external_addresses(page.read_text(encoding="utf-8")), page


@pytest.mark.slow
def test_every_picture_of_a_page_is_there(site: Path) -> None:
    for page in site.rglob("*.html"):
        for source in re.findall(r'<img[^>]*? src="([^"]+)"', page.read_text(encoding="utf-8")):
            assert (page.parent / source).is_file(), (page, source)


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/mathjax.js"></script>',
        "<img alt='x' src=//cdn.example/x.png>",
        '<link rel="stylesheet" href="https://fonts.example/css">',
        "@font-face { src: url(https://fonts.example/a.woff) }",
        '@import "https://fonts.example/css";',
    ],
)
def test_what_is_loaded_from_elsewhere_is_found(text: str) -> None:
    assert external_addresses(text)


def test_links_and_own_files_are_no_loading() -> None:
    assert not external_addresses('<a href="https://arxiv.org/abs/1">x</a><img src="_static/x.png">')

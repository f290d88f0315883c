"""The notebooks of docs/examples: stored with their outputs, and they run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "examples").glob("*.ipynb"))


def kinds_of_output(cells: list[dict]) -> list[list[list[str]]]:
    """Of each code cell, the kinds of each of its outputs."""
    return [
        [sorted(output.get("data", {"text": ""})) for output in outputs]
        for outputs in (cell["outputs"] for cell in cells if cell["cell_type"] == "code")
    ]


def test_there_is_one() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_is_stored_as_it_was_run(path: Path) -> None:
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert "error" not in [output["output_type"] for cell in code for output in cell["outputs"]]
    assert any("text/html" in output.get("data", {}) for cell in code for output in cell["outputs"])
    assert not re.search(r"/(home|work|tmp|Users)/", path.read_text())
    assert path.stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")
    stored = nbformat.read(path, as_version=4)
    fresh = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(fresh, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert kinds_of_output(fresh.cells) == kinds_of_output(stored.cells)

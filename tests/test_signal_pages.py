"""docs/signals: every quantity has its page, and what code decides stands there as the code has it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from probes.quantities import QUANTITIES
from stability import divergence

DOCS = Path(__file__).parent.parent / "docs"
INDEX = DOCS / "signals" / "README.md"
PAGES = sorted(set((DOCS / "signals").glob("*.md")) - {INDEX})


@pytest.fixture(scope="module")
def texts() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "make_signal_texts.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_thresholds_and_remedies_are_those_of_the_code(page: Path, texts: dict[str, Any]) -> None:
    text = page.read_text(encoding="utf-8")
    assert texts["BLOCK"].search(text)
    assert text == texts["up_to_date"](text), "run `PYTHONPATH=. python docs/make_signal_texts.py`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_has_its_picture_and_fits_a_screen(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    picture = page.parent / "images" / f"{page.stem.replace('-', '_')}.png"
    assert f"](images/{picture.name})" in text
    assert picture.stat().st_size < 100_000
    assert len(text.splitlines()) < 50


def test_an_outdated_page_is_found(texts: dict[str, Any]) -> None:
    page = "<!-- alarms: NonFiniteDetector -->\n\nold\n\n<!-- end of alarms -->\n"
    assert "max_skipped 16" in texts["up_to_date"](page)


def test_every_quantity_and_page_is_in_the_table() -> None:
    table = INDEX.read_text(encoding="utf-8")
    assert not [quantity for quantity in QUANTITIES if f"`{quantity}`" not in table]
    assert not [page.name for page in PAGES if f"({page.name})" not in table]


def test_every_detector_and_kind_of_alert_has_a_page(texts: dict[str, Any]) -> None:
    kinds = texts["KINDS"]
    makers = {name for name in divergence.__all__ if name.lower().endswith("detector")}
    assert set(kinds) == makers - {"Detector", "EpisodeDetector", "QuantityRangeDetector"}
    assert {kind for of_one in kinds.values() for kind in of_one} == set(divergence.REMEDIES)
    named = {
        name
        for page in PAGES
        for match in texts["BLOCK"].finditer(page.read_text(encoding="utf-8"))
        for name in match["names"].split()
    }
    assert named == set(kinds)


@pytest.mark.slow
def test_pictures_are_drawn_of_faults_that_the_detectors_tell(tmp_path: Path) -> None:
    pictures = runpy.run_path(str(DOCS / "make_signal_pictures.py"))
    assert {page.stem.replace("-", "_") for page in PAGES} == set(pictures["PICTURES"])
    for name in ("loss_spike", "activations"):  # the quickest
        assert pictures["draw"](pictures["PICTURES"][name], tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000

"""The report tried as a new user would: its first screen names the layer that is at fault."""

from __future__ import annotations

import runpy
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import probes
from probes.report import write_report
from probes.report_page import drawn, html
from probes.reported_run import load_runs, reported_run

ROOT = Path(__file__).parent.parent
BLOCK = 7


@pytest.fixture(scope="module")
def trial() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "make_report_pictures.py"))


@pytest.fixture(scope="module")
def faulty(trial: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faulty")
    trial["record"](folder, block=BLOCK, steps=80, embed_dim=16, tokens=16)
    return folder


def lines_of_first_screen(page: str) -> list[str]:
    """Texts up to the end of the first picture, which a screen of 1280 × 800 has room for."""
    texts: list[str] = []

    class Collector(HTMLParser):
        def handle_data(self, data: str) -> None:
            texts.append(data)

    body = page.split("<body>")[1]
    Collector().feed(body.split("</figure>")[0])
    return texts


def test_the_headline_and_the_arrow_name_the_layer(trial: dict[str, Any], faulty: Path) -> None:
    runs = load_runs([faulty])
    in_sight = lines_of_first_screen(html(runs, drawn(runs)))
    assert trial["names_layer"](in_sight, f"blocks.{BLOCK}.attention")
    assert not trial["names_layer"](in_sight, "blocks.6.attention")


def test_it_names_the_layer_without_a_detector_too(faulty: Path) -> None:
    run = reported_run("faulty", probes.RecordedRun(probes.read(faulty)))
    assert run.alerts == []
    assert run.story.layer == f"blocks.{BLOCK}.attention"
    assert run.story.quantity == "attention/max_logit"


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("chromium"), reason="needs `chromium` on the PATH (Debian: apt-get install chromium)"
)
def test_a_browser_shows_it_without_scrolling(trial: dict[str, Any], faulty: Path, tmp_path: Path) -> None:
    page = write_report(faulty, out=tmp_path / "report.html")
    assert trial["names_layer"](trial["lines_in_sight"](page), f"blocks.{BLOCK}.attention")
    for dark in (False, True):
        trial["photograph"](page, tmp_path / "page.png", dark=dark)
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

"""The page about representations says what its raw runs say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.representations_report import main

RESULTS = Path(__file__).parents[2] / "docs/results"
PAGE = RESULTS / "2026-11-23-representations.md"
REPORT = RESULTS / "representations/2026-11-23-report.json"
ROWS = ("crohn", "cortex", "endocrino", "marques", "packer", "pbmc3k", "scmixology", "softmax", "sigmoid")


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.slow
def test_its_sentences_and_tables_are_made_from_the_runs(tmp_path):
    archives = sorted(RESULTS.glob("representations/*.zip"))
    assert main([*map(str, archives), "--out", str(tmp_path)]) == 0
    made = (tmp_path / "representations.md").read_text(encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")

    sentences = [line for line in made.split("\n## ")[0].splitlines() if line.startswith("* ")]
    assert len(sentences) == 7
    assert all(sentence in words(page) for sentence in map(words, sentences))

    published = [line for line in page.splitlines() if line.startswith(tuple(f"| {name}" for name in ROWS))]
    assert len(published) == 3 * 7 + 4 * 7 + 14 + 16
    assert set(map(without_clusters, published)) <= set(map(without_clusters, made.splitlines()))

    kept, again = (json.loads(path.read_text()) for path in (REPORT, tmp_path / "representations.json"))
    assert kept.keys() == again.keys()
    assert kept["verdicts"] == again["verdicts"]
    assert [run["config"]["name"] for run in kept["runs"]] == [run["config"]["name"] for run in again["runs"]]


def without_clusters(row: str) -> str:
    """Without the last two of all metrics, of k-means, which another machine's rounding may change."""
    cells = row.strip("| ").split(" | ")
    return " | ".join(cells[:-2] if len(cells) == 12 else cells)

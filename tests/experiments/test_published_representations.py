"""The page about representations says what its raw runs say."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.representations_report import main

RESULTS = Path(__file__).parents[2] / "docs/results"
PAGE = RESULTS / "2026-11-23-representations.md"


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

    published, rows = page.splitlines(), made.splitlines()
    sets = ("crohn", "cortex", "endocrino", "marques", "packer", "pbmc3k", "scmixology")
    published = [line for line in published if line.startswith((*(f"| {name}" for name in sets), "| s"))]
    assert len(published) == 3 * 7 + 4 * 7 + 14 + 16
    # Of all metrics the two last ones, of k-means, are the only ones that another machine's rounding changes.
    assert {without_clusters(line) for line in published} <= {without_clusters(line) for line in rows}


def without_clusters(row: str) -> str:
    cells = row.strip("| ").split(" | ")
    return " | ".join(cells[:-2] if len(cells) == 12 else cells)

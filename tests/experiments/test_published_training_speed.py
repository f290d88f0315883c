"""The page about the speed of training says what the raw files say."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.training_speed_report import over_processes

RESULTS = Path(__file__).parents[2] / "docs/results"
PAGE = RESULTS / "2026-11-23-training-speed.md"


def test_every_row_is_of_the_raw_files():
    summaries = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("training-speed/*.json"))]
    assert len(summaries) == 3
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith(("| eager", "| compiled"))]
    assert len(rows) == 22
    assert set(rows) <= set(over_processes(summaries).splitlines())

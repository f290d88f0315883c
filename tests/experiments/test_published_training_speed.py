"""The pages about the speed of training say what the raw files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.training_speed_report import over_processes

RESULTS = Path(__file__).parents[2] / "docs/results"


@pytest.mark.parametrize(
    ("page", "raw", "expected"),
    [
        ("2026-11-23-training-speed.md", "2026-11-23-process-*.json", 22),
        ("2026-11-23-training-speed-h100.md", "2026-11-23-h100-*.json", 44),
    ],
)
def test_every_row_is_of_the_raw_files(page, raw, expected):
    summaries = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"training-speed/{raw}"))]
    assert len(summaries) == 3
    rows = [
        line
        for line in (RESULTS / page).read_text().splitlines()
        if line.startswith(("| eager", "| compiled"))
    ]
    assert len(rows) == expected
    assert set(rows) <= set(over_processes(summaries).splitlines())

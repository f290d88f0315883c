"""The pages of the stress test say what the published records say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.stress_ledger import COLUMNS, markdown_table, read_runs
from experiments.sustained_explosion import judge_long_run

RESULTS = Path(__file__).parents[2] / "docs/results"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize(
    ("page", "archive", "num_runs"),
    [
        ("2026-11-22-stress-160m.md", "2026-11-22.zip", 26),
        ("2026-11-22-stress-160m-stressors.md", "2026-11-22-stressors.zip", 14),
    ],
)
def test_table(page, archive, num_runs):
    lines = (RESULTS / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| run |"))
    columns = cells(lines[start])
    told = [dict(zip(columns, cells(line), strict=True)) for line in lines[start + 2 :][:num_runs]]

    runs = read_runs([RESULTS / "stress-160m" / archive])
    table = markdown_table(runs, {name: judge_long_run(run) for name, run in runs.items()})
    recorded = [dict(zip(COLUMNS, cells(line), strict=True)) for line in table.splitlines()[2:]]
    assert told == [{column: row[column] for column in columns} for row in recorded]


def test_spikes_belong_to_learning():
    """Peaks of unclipped runs with ranks, by mechanism and by whether they learned (gain above 0.02 nats)."""
    peaks: dict[tuple[str, bool], list[float]] = {}
    archives = [RESULTS / "stress-160m" / name for name in ("2026-11-22.zip", "2026-11-22-stressors.zip")]
    for run in read_runs(archives).values():
        config, judgement = run.facts["config"], judge_long_run(run)
        if config["task"] == "ranks" and config["clip_norm"] is None:
            peaks.setdefault((config["mechanism"], judgement.gain > 0.02), []).append(judgement.peak)
    found = {key: (len(orders), round(float(np.median(orders)), 1)) for key, orders in peaks.items()}
    assert found == {
        ("softmax", True): (6, 0.8),
        ("softmax", False): (9, 0.4),
        ("sigmoid", True): (4, 2.7),
        ("sigmoid", False): (11, -0.1),
    }
    assert min(peaks["sigmoid", True]) > max(peaks["sigmoid", False])

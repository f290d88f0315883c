"""The pages of the stress test say what the published records say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.stress_ledger import COLUMNS, markdown_table, read_runs
from experiments.sustained_explosion import judge_long_run
from stability.divergence import Alert, FrozenLayerDetector

RESULTS = Path(__file__).parents[2] / "docs/results"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize(
    ("page", "archive", "num_runs"),
    [
        ("2026-11-22-stress-160m.md", "2026-11-22.zip", 26),
        ("2026-11-22-stress-160m-stressors.md", "2026-11-22-stressors.zip", 14),
        ("2026-11-23-stress-160m-lead.md", "2026-11-23-lead.zip", 2),
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


def test_frozen_mlps_belong_to_sigmoid():
    """Runs that end with ten and more of twelve MLPs whose Adam steps are below a thousandth of full size."""
    runs = read_runs([RESULTS / "stress-160m"])
    frozen: dict[str, list[str]] = {"softmax": [], "sigmoid": []}
    for name, run in runs.items():
        sizes = [run.values("adam_update_rms", f"blocks.{block}.mlp.hidden")[-1] for block in range(12)]
        if sum(size < 1e-3 for size in sizes) >= 10:
            frozen[run.facts["config"]["mechanism"]].append(name)
    assert len(runs) == 42
    assert len(frozen["sigmoid"]) == 16
    assert frozen["softmax"] == ["post-ln-softmax-seed0"]


def test_gradients_grow_with_softmax_alone():
    """Median of steps 4,000 on over that of the calm steps 2,000 to 3,000, and the largest step over it."""
    runs = read_runs([RESULTS / "stress-160m" / "2026-11-23-lead.zip"])
    grown = {}
    for run in runs.values():
        norms = run.values("grad_norm")
        calm = np.median(norms[2000:3000])
        later = norms[3000:]
        grown[run.facts["config"]["mechanism"]] = (np.median(norms[4000:]) / calm, later.max() / calm)
    assert grown["softmax"] == pytest.approx((54.2, 22042), rel=1e-3)
    assert grown["sigmoid"][0] < 1
    assert grown["sigmoid"][1] < 3


def test_the_detector_tells_of_frozen_layers():
    told: dict[str, list[int]] = {"softmax": [], "sigmoid": []}
    joined: dict[str, list[Alert]] = {}
    for name, run in read_runs([RESULTS / "stress-160m"]).items():
        sizes: dict[int, dict[str, float]] = {}
        for series, (steps, values) in run.series.items():
            if series.quantity == "adam_update_rms":
                for step, value in zip(steps.tolist(), values.tolist(), strict=True):
                    sizes.setdefault(step, {})[series.layer] = value
        detector = FrozenLayerDetector()
        alerts = [
            alert
            for step in sorted(sizes)
            for alert in detector.update(step, {"adam_update_rms": sizes[step]})
        ]
        told[run.facts["config"]["mechanism"]] += [alert.step for alert in alerts[:1]]
        joined[name] = alerts[1:]
    assert (len(told["sigmoid"]), told["sigmoid"].count(600), len(told["softmax"])) == (18, 16, 2)
    assert max(map(len, joined.values())) == 2
    (alert,) = joined["lead-sigmoid-seed0"]
    assert (alert.step, alert.layer) == (800, "blocks.0.mlp_norm")
    assert alert.spread == ("blocks.0.mlp.hidden", "blocks.0.mlp.output")

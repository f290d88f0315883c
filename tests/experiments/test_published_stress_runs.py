"""The pages of the stress test say what the published records say."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest

from experiments.run_records import RecordedRun
from experiments.stress_ledger import COLUMNS, markdown_table, read_runs
from experiments.stress_seeds import markdown_table as seeds_table
from experiments.stress_seeds import seeds_of, summarise
from experiments.sustained_explosion import judge_long_run
from stability.divergence import Alert, FrozenLayerDetector, Readings, default_detectors
from tests.stability.divergence.series import verdicts

RESULTS = Path(__file__).parents[2] / "docs/results"


def steps_of(run: RecordedRun, only: str = "") -> list[tuple[int, Readings]]:
    """What detectors were given of a run, of all quantities or of one."""
    steps: dict[int, dict[str, dict[str, float]]] = {}
    for series, (at, values) in run.series.items():
        if series.head is None and only in ("", series.quantity):
            for step, value in zip(at.tolist(), values.tolist(), strict=True):
                steps.setdefault(step, {}).setdefault(series.quantity, {})[series.layer] = value
    return sorted(steps.items(), key=itemgetter(0))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize(
    ("page", "archive", "num_runs"),
    [
        ("2026-11-22-stress-160m.md", "2026-11-22.zip", 26),
        ("2026-11-22-stress-160m-stressors.md", "2026-11-22-stressors.zip", 14),
        ("2026-11-23-stress-160m-lead.md", "2026-11-23-lead.zip", 2),
        ("2026-11-23-stress-160m-lead-seeds.md", "2026-11-23-lead-again.zip", 4),
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
    # Three of the four sigmoid runs that learned, not all, have larger peaks than any of softmax's six.
    assert sum(peak > max(peaks["softmax", True]) for peak in peaks["sigmoid", True]) == 3


def test_frozen_mlps_belong_to_sigmoid():
    """Runs that end with ten and more of twelve MLPs whose Adam steps are below a thousandth of full size."""
    runs = read_runs([RESULTS / "stress-160m"])
    frozen: dict[str, list[str]] = {"softmax": [], "sigmoid": []}
    for name, run in runs.items():
        sizes = [run.values("adam_update_rms", f"blocks.{block}.mlp.hidden")[-1] for block in range(12)]
        if sum(size < 1e-3 for size in sizes) >= 10:
            frozen[run.facts["config"]["mechanism"]].append(name)
    assert len(runs) == 46
    assert len(frozen["sigmoid"]) == 18
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


def test_seeds_of_the_lead():
    runs = seeds_of(read_runs([RESULTS / "stress-160m"]), "lead-sigmoid-seed0")
    table = seeds_table(runs)
    assert table in (RESULTS / "2026-11-23-stress-160m-lead-seeds.md").read_text()
    assert len(runs) == 6
    for run in runs.values():
        row = summarise(run)
        is_softmax = run.facts["config"]["mechanism"] == "softmax"
        assert (row.grows_from is not None) == is_softmax
        assert row.frozen_mlps == (0 if is_softmax else 12)
        assert row.collapsed_layers is not None
        assert (row.collapsed_layers >= 4) == is_softmax


def test_alerts_before_softmax_gradients_grow():
    """The last alert of each run's attention before it, and how many steps before."""
    found = {}
    for name, run in seeds_of(read_runs([RESULTS / "stress-160m"]), "lead-softmax-seed0").items():
        if (grows_from := summarise(run).grows_from) is not None:
            *_, last = (alert for alert in run.alerts if alert["step"] < grows_from)
            found[name] = (last["kind"], last["layer"].split(".")[1], grows_from - last["step"])
    assert found == {
        "lead-softmax-seed0": ("entropy-collapse", "5", 44),
        "lead-again-softmax-seed1": ("logit-growth", "8", 192),
        "lead-again-softmax-seed2": ("logit-growth", "10", 127),
    }


def test_the_detector_tells_of_frozen_layers():
    told: dict[str, list[int]] = {"softmax": [], "sigmoid": []}
    joined: dict[str, list[Alert]] = {}
    for name, run in read_runs([RESULTS / "stress-160m"]).items():
        alerts = verdicts(FrozenLayerDetector(), steps_of(run, "adam_update_rms"))
        told[run.facts["config"]["mechanism"]] += [alert.step for alert in alerts[:1]]
        joined[name] = alerts[1:]
    assert (len(told["sigmoid"]), told["sigmoid"].count(600), len(told["softmax"])) == (20, 18, 2)
    assert max(map(len, joined.values())) == 6
    (alert,) = joined["lead-sigmoid-seed0"]
    assert (alert.step, alert.layer) == (800, "blocks.0.mlp_norm")
    assert alert.spread == ("blocks.0.mlp.hidden", "blocks.0.mlp.output")


@pytest.mark.slow
def test_what_the_default_detectors_tell_of_all_runs():
    """The numbers of docs/detectors.md: alerts, those of what stays, those of events after a condition."""
    told: list[Alert] = []
    for run in read_runs([RESULTS / "stress-160m"]).values():
        (detector,) = default_detectors()
        told += verdicts(detector, steps_of(run))
    stayed = [alert.reason for alert in told if "and has stayed: " in alert.reason]
    assert len(told) == 238
    assert len(stayed) == 26
    assert sum(", after loss-spike in" in reason for reason in stayed) == 15
    assert sum("collapses" in reason or "entropy-collapse in" in reason for reason in stayed) == 10
    assert sum(" It follows " in alert.reason for alert in told) == 17

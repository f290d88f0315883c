from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from experiments.detection_faults import (
    Fault,
)
from experiments.detection_models import SETUPS
from experiments.detection_report import Result, cases, draw_figure, rows
from experiments.detection_scoring import (
    CleanBand,
    Outcome,
    Verdict,
    median,
    names_layer,
    num_episodes,
    proportion,
    rate,
    score,
)
from experiments.detection_suite import Run
from stability.divergence import ALL_LAYERS


def run_of(setup: str, fault: Fault | None = None, steps: int = 6) -> Run:
    return Run(setup, 5, "constant", steps, SETUPS[setup].batch_size, fault)


FAULT = Fault("nan-weight", "nan", 0, "blocks.1.mlp.hidden", 10)


def outcome(*verdicts: tuple[int, str], fault: Fault = FAULT, departure: int = 40) -> Outcome:
    heard = tuple(Verdict(step, step + 1, layer) for step, layer in verdicts)
    return Outcome(run_of("token-2", fault, steps=60), heard, departure)


def test_the_first_verdict_from_the_onset_counts():
    early_and_late = outcome((2, "head"), (4, "head"), (12, "blocks.1"), (13, "blocks.0"))
    assert early_and_late.num_early == 1
    assert early_and_late.detection == Verdict(12, 13, "blocks.1")
    assert (early_and_late.delay, early_and_late.lead) == (3, 27)
    assert early_and_late.is_layer_right
    missed = outcome((9, "blocks.1"))
    assert missed.detection is missed.delay is missed.lead is None
    assert not missed.is_layer_right
    assert outcome((10, "head")).delay == 1


@pytest.mark.parametrize(
    ("named", "faulty", "is_right"),
    [
        ("blocks.1.mlp.hidden", "blocks.1.mlp.hidden", True),
        ("blocks.1.mlp", "blocks.1.mlp.hidden", True),
        ("blocks.1", "blocks.1.mlp.hidden", True),
        ("blocks", "blocks.1.mlp.hidden", False),
        ("encoder.layers", "encoder.layers.0.linear1", False),
        ("encoder.layers.0", "encoder.layers.0.linear1", True),
        ("blocks.1.attention.query", "blocks.1.attention", True),
        ("blocks.1.attention/call_1", "blocks.1.attention", True),
        ("blocks.1.attention_norm", "blocks.1.attention", False),
        ("blocks.10", "blocks.1", False),
        ("(all)", "blocks.1", False),
        ("", "blocks.1", False),
        ("(all)", None, True),
        ("token_embedding", None, True),
        ("blocks.0", None, False),
        ("", None, False),
    ],
)
def test_which_layer_is_right(named, faulty, is_right):
    assert names_layer(named, faulty, SETUPS["token-2"].first_layers) == is_right


def test_episodes():
    assert num_episodes([]) == 0
    assert num_episodes([5]) == 1
    assert num_episodes([25, 5, 15]) == 1
    assert num_episodes([5, 16]) == 2


def test_clean_band_holds_clean_losses_and_departure_is_where_only_the_fault_leaves():
    generator = np.random.default_rng(0)
    trend = 2 * np.exp(-np.arange(200) / 80)
    clean = trend * np.exp(0.1 * generator.standard_normal((6, 200)))
    band = CleanBand(clean)
    fresh = trend * np.exp(0.1 * generator.standard_normal((500, 200)))
    inside = ((fresh >= band.low) & (fresh <= band.high))[:, 10:-10].mean()
    assert inside == pytest.approx(0.999, abs=0.001)
    paired = trend.copy()
    losses = trend.copy()
    losses[150:] = 5
    assert band.departure(losses, paired, 100) == 150
    assert band.departure(losses, paired, 160) == 160
    paired[150:170] = 5  # the data of these steps are hard for the clean run, too
    assert band.departure(losses, paired, 100) == 170
    losses[120] = math.nan
    assert band.departure(losses, paired, 100) == 120
    assert band.departure(trend, trend, 100) == 200


def test_intervals():
    assert proportion(0, 0).value != proportion(0, 0).value
    half = proportion(5, 10)
    assert (half.low, half.value, half.high) == pytest.approx((0.2366, 0.5, 0.7634), abs=1e-4)
    two = rate(2, 10_000)
    assert (two.low, two.value, two.high) == pytest.approx((0.2422, 2, 7.2247), abs=1e-4)
    middle = median([1, 2, 3, 4, 100])
    assert (middle.value, middle.low >= 1, middle.high <= 100) == (3, True, True)


def test_score_report_and_cases(tmp_path):
    slow = replace(FAULT, kind="qk-growth", layer="blocks.0.attention")
    outcomes = [
        outcome((10, "blocks.1")),
        outcome((12, "head")),
        outcome(),
        outcome((3, "head"), (20, "blocks.0"), fault=slow, departure=60),
    ]
    total = score(outcomes)
    assert (total.num_runs, total.recall.value, total.layer.value) == (4, 0.75, pytest.approx(2 / 3))
    assert (total.delay.value, total.lead.value) == (3, 29)
    clean = {
        run_of("token-2", steps=5000): (
            Verdict(7, 8, "head"),
            Verdict(9, 10, ALL_LAYERS),
            Verdict(90, 91, ""),
        )
    }
    result = Result("a tool", outcomes, clean)
    assert result.num_false_alarms == 2
    assert result.num_early_alarms == 1
    assert [row[0] for row in rows(result)] == ["nan-weight", "qk-growth", "slow kinds", "all"]
    assert [line.split("  ")[0] for line in cases(result)] == [
        "wrong layer",
        "missed",
        "early",
        *["false alarm"] * 3,
    ]
    draw_figure(tmp_path / "score.png", result)
    assert (tmp_path / "score.png").read_bytes().startswith(b"\x89PNG")

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.run_records import RecordedRun
from experiments.sustained_explosion import judge_long_run
from probes.record import ALL_LAYERS, Series

STEPS = 600


def recorded(
    norms: np.ndarray | None = None,
    losses: np.ndarray | None = None,
    *,
    validation: float = 8.5,
    metric: str = "cross-entropy, nats",
    reference: float = 9.0,
    layers: dict[str, np.ndarray] | None = None,
    attention: dict[str, float] | None = None,
    mechanism: str = "softmax",
) -> RecordedRun:
    norms = calm() if norms is None else norms
    losses = np.linspace(9.5, 8.5, len(norms)) if losses is None else losses
    columns = {Series(ALL_LAYERS, "grad_norm"): norms, Series(ALL_LAYERS, "loss"): losses}
    columns |= {Series(layer, "grad_norm"): values for layer, values in (layers or {}).items()}
    series = {key: (np.arange(len(values)), values) for key, values in columns.items()}
    for quantity, value in (attention or {}).items():
        series[Series("blocks.1.attention", quantity)] = (np.array([0, 10]), np.array([7.0, value]))
    facts = {
        "metric": metric,
        "reference": reference,
        "validation": [(len(norms), validation)],
        "config": {"mechanism": mechanism},
    }
    return RecordedRun(facts, [], series)


def calm(factor: float = 1.0, begin: int = STEPS, length: int = 0) -> np.ndarray:
    norms = np.full(STEPS, 0.2)
    norms[begin : begin + length] *= factor
    return norms


def test_a_calm_run_that_learns():
    judgement = judge_long_run(recorded())
    assert judgement.verdict == "learned"
    assert judgement.is_healthy
    assert (judgement.baseline, judgement.peak, judgement.sustained) == (0.2, 0.0, 0.0)
    assert judgement.gain == pytest.approx(0.5)
    assert judgement.diverged_at is None


def test_ten_steps_at_ten_thousand_times_the_baseline_are_an_explosion():
    judgement = judge_long_run(recorded(calm(2e4, 450, 10)))
    assert judgement.verdict == "exploded"
    assert judgement.sustained == pytest.approx(math.log10(2e4))
    assert judgement.diverged_at == 450


def test_nine_steps_are_a_spike():
    judgement = judge_long_run(recorded(calm(2e4, 450, 9)))
    assert judgement.verdict == "learned"
    assert judgement.peak == pytest.approx(math.log10(2e4))
    assert judgement.sustained == 0.0


def test_lower_orders_are_reported():
    judgement = judge_long_run(recorded(calm(50.0, 400, 30)))
    assert judgement.verdict == "learned"
    assert judgement.sustained == pytest.approx(math.log10(50))


def test_the_first_steps_have_a_column_of_their_own():
    judgement = judge_long_run(recorded(calm(1e5, 0, 50)))
    assert judgement.first_steps == pytest.approx(5)
    assert (judgement.verdict, judgement.sustained) == ("learned", 0.0)


@pytest.mark.parametrize(
    ("norms", "losses"),
    [
        (calm(11.0, 150, 1), None),
        (calm(), np.full(STEPS, 9.0)),
        (calm(math.nan, 20, 1), np.linspace(9.5, 8.5, STEPS)),
    ],
    ids=["not calm", "does not learn", "not finite"],
)
def test_no_healthy_baseline_no_explosion(norms, losses):
    norms = np.where(np.arange(STEPS) >= 400, 1e9, norms)
    judgement = judge_long_run(recorded(norms, losses))
    assert judgement.baseline is None
    assert judgement.sustained is None
    assert judgement.verdict in ("no baseline", "not finite")


def test_a_run_that_ends_at_nan():
    losses = np.linspace(9.5, 8.5, STEPS)
    losses[-1] = math.nan
    judgement = judge_long_run(recorded(losses=losses))
    assert (judgement.verdict, judgement.diverged_at) == ("not finite", STEPS - 1)


def test_gradients_that_are_no_number_for_ten_steps_are_an_explosion():
    judgement = judge_long_run(recorded(calm(math.nan, 500, 100)))
    assert (judgement.verdict, judgement.sustained) == ("exploded", math.inf)


def test_stable_without_learning_has_failed():
    assert judge_long_run(recorded(validation=8.99)).verdict == "failed"
    regression = {"metric": "mean squared error", "reference": 2.0}
    judgement = judge_long_run(recorded(validation=1.98, **regression))
    assert (judgement.verdict, judgement.is_healthy) == ("failed", False)
    learned = judge_long_run(recorded(validation=1.0, **regression))
    assert (learned.verdict, learned.gain, learned.is_healthy) == ("learned", 0.5, True)


def test_too_short():
    assert judge_long_run(recorded(np.full(200, 0.2))).verdict == "too short"


def test_the_first_layer_and_its_signals():
    layers = {"blocks.0.mlp.hidden": calm(1e5, 480, 40), "blocks.1.attention.query": calm(1e5, 470, 40)}
    judgement = judge_long_run(
        recorded(calm(2e4, 470, 40), layers=layers, attention={"attention/max_logit": 900.0})
    )
    assert judgement.first_layer == "blocks.1.attention.query"
    assert judgement.signals == {"attention/max_logit": 900.0}


@pytest.mark.parametrize(
    ("mechanism", "quantity", "value"),
    [("softmax", "attention/entropy", 0.05), ("sigmoid", "attention/saturated_share", 0.8)],
)
def test_collapsed_layers(mechanism, quantity, value):
    assert judge_long_run(recorded(mechanism=mechanism, attention={quantity: value})).collapsed_layers == 1
    assert judge_long_run(recorded(mechanism=mechanism, attention={quantity: 0.3})).collapsed_layers == 0
    assert judge_long_run(recorded(mechanism=mechanism)).collapsed_layers is None

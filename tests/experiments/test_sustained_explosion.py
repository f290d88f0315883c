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
    without_attention: float | None = None,
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
        "without_attention": reference if without_attention is None else without_attention,
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
    ("norms", "losses", "diverged_at", "verdict"),
    [
        (calm(11.0, 150, 1), None, None, "learned"),
        (calm(), np.full(STEPS, 9.0), None, "learned"),
        (calm(math.nan, 20, 1), np.linspace(9.5, 8.5, STEPS), 20, "not finite"),
    ],
    ids=["not calm", "does not learn", "not finite"],
)
def test_no_healthy_baseline_no_explosion(norms, losses, diverged_at, verdict):
    norms = np.where(np.arange(STEPS) >= 400, 1e9, norms)
    judgement = judge_long_run(recorded(norms, losses))
    assert not judgement.has_baseline
    assert judgement.baseline == pytest.approx(0.2)
    assert judgement.sustained == pytest.approx(math.log10(1e9 / 0.2))
    assert (judgement.diverged_at, judgement.verdict) == (diverged_at, verdict)


def test_a_run_that_ends_before_step_300_has_no_baseline_at_all():
    judgement = judge_long_run(recorded(np.full(200, 0.2)))
    assert (judgement.baseline, judgement.has_baseline, judgement.first_steps) == (None, False, None)


def test_a_run_that_ends_at_nan():
    losses = np.linspace(9.5, 8.5, STEPS)
    losses[-1] = math.nan
    judgement = judge_long_run(recorded(losses=losses))
    assert (judgement.verdict, judgement.diverged_at) == ("not finite", STEPS - 1)


def test_gradients_that_are_no_number_for_ten_steps_are_an_explosion():
    judgement = judge_long_run(recorded(calm(math.nan, 500, 100)))
    assert (judgement.verdict, judgement.sustained) == ("exploded", math.inf)


def test_stable_without_learning_has_failed():
    assert judge_long_run(recorded(validation=8.99)).verdict == "failed: not learned"
    regression = {"metric": "mean squared error", "reference": 2.0}
    judgement = judge_long_run(recorded(validation=1.98, **regression))
    assert (judgement.verdict, judgement.is_healthy) == ("failed: not learned", False)
    learned = judge_long_run(recorded(validation=1.0, **regression))
    assert (learned.verdict, learned.gain, learned.is_healthy) == ("learned", 0.5, True)


def test_what_needs_no_attention_is_not_learned():
    regression = {"metric": "mean squared error", "reference": 2.0, "without_attention": 0.7}
    judgement = judge_long_run(recorded(validation=0.65, **regression))
    assert (judgement.verdict, judgement.is_healthy) == ("failed: not learned", True)
    assert judgement.gain == pytest.approx(0.675)
    assert judge_long_run(recorded(validation=0.59, **regression)).verdict == "learned"
    assert judge_long_run(recorded(validation=8.84, without_attention=8.9)).verdict == "learned"
    assert judge_long_run(recorded(validation=8.86, without_attention=8.9)).verdict == "failed: not learned"


def test_a_collapsed_run_has_failed_whatever_it_learned():
    run = recorded(attention={"attention/entropy": 0.05})
    judgement = judge_long_run(run)
    assert (judgement.verdict, judgement.is_healthy) == ("failed: collapsed", False)
    assert judgement.gain == pytest.approx(0.5)
    exploded = recorded(calm(2e4, 450, 10), attention={"attention/entropy": 0.05})
    assert judge_long_run(exploded).verdict == "exploded"


def test_a_layer_without_gradient_before_is_not_the_first_to_go():
    silent = np.where(np.arange(STEPS) < 400, 0.0, 0.1)
    layers = {"blocks.0.mlp.hidden": silent, "blocks.1.mlp.hidden": calm(1e5, 470, 40)}
    judgement = judge_long_run(recorded(calm(2e4, 470, 40), layers=layers))
    assert judgement.first_layer == "blocks.1.mlp.hidden"


def test_of_layers_that_go_together_the_farthest_is_first():
    layers = {"blocks.0.mlp.hidden": calm(2e4, 470, 40), "blocks.1.mlp.hidden": calm(9e5, 470, 40)}
    judgement = judge_long_run(recorded(calm(2e4, 470, 40), layers=layers))
    assert judgement.first_layer == "blocks.1.mlp.hidden"


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

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from stability.divergence import WeightJumpDetector
from tests.stability.divergence.series import LAYERS, Step, healthy, scaled, verdicts, with_fault


@pytest.mark.parametrize("factor", [40.0, 1.3, 0.05])
@pytest.mark.parametrize("layer", LAYERS)
def test_scaled_weights_are_named_at_their_own_step(layer: str, factor: float) -> None:
    fault = scaled("weight_norm", layer, lambda since: factor)
    (alert,) = verdicts(WeightJumpDetector(), with_fault(160, 110, fault))
    assert (alert.step, alert.onset_step, alert.layer, alert.kind) == (110, 110, layer, "weight-jump")
    assert alert.value == pytest.approx(factor * alert.reference, rel=0.02)
    assert alert.evidence[-1] == (110, alert.value)


def test_the_sentence_says_what_the_other_layers_do() -> None:
    def two_layers(readings: Step, since: int) -> None:
        readings["weight_norm"]["head"] *= 40
        readings["weight_norm"]["embedding"] *= 40

    alone = scaled("weight_norm", "head", lambda since: 40)
    (alert,) = verdicts(WeightJumpDetector(), with_fault(160, 110, alone))
    assert alert.reason.endswith("is its habit and the other layers keep to theirs.")
    (alert,) = verdicts(WeightJumpDetector(), with_fault(160, 110, two_layers))
    assert alert.reason.endswith("is its habit; 1 of 3 other layers leave theirs at the same step.")
    assert {alert.layer, *alert.spread} == {"head", "embedding"}


def test_the_sentence_tells_the_habit_before_the_jump() -> None:
    detector, norms = WeightJumpDetector(), {"a": 10.0, "b": 5.0}
    for step in range(8):
        assert not detector.update(step, {"weight_norm": dict(norms)})
        norms = {layer: norm * math.exp((-1) ** step * 1e-3) for layer, norm in norms.items()}
    (alert,) = detector.update(8, {"weight_norm": {**norms, "a": 1e3}})
    assert "where 0.1 % is its habit" in alert.reason


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (13.0, "10 to 13: 30 %"),
        (9.0, "10 to 9: -10 %"),
        (400.0, "10 to 400: × 40"),
        (0.2, "10 to 0.2: × 0.02"),
    ],
)
def test_changes_are_told_in_percent_or_as_a_factor(norm: float, words: str) -> None:
    detector = WeightJumpDetector()
    for step in range(60):
        assert not detector.update(step, {"weight_norm": {"a": 10 + 1e-6 * step, "b": 5 + 1e-6 * step}})
    (alert,) = detector.update(60, {"weight_norm": {"a": norm, "b": 5 + 6e-5}})
    assert f"weight norm went from {words} in a step" in alert.reason


def test_a_small_change_is_told_where_the_layer_never_made_one() -> None:
    def series(change: float) -> Iterator[tuple[int, Step]]:
        for step in range(120):
            yield (
                step,
                {"weight_norm": {"a": 10.0 + 1e-4 * step + change * (step >= 100), "b": 5.0 + step / 10}},
            )

    assert not verdicts(WeightJumpDetector(), series(0.008))
    (alert,) = verdicts(WeightJumpDetector(), series(0.012))  # 0.12 %, after 0.001 % a step
    assert (alert.layer, alert.step) == ("a", 100)


def test_weights_that_grow_step_by_step_are_seen_at_the_first_ones() -> None:
    fault = scaled("weight_norm", "head", lambda since: 1.05 ** (since + 1))
    (alert,) = verdicts(WeightJumpDetector(), with_fault(160, 110, fault))
    assert alert.layer == "head"
    assert alert.step <= 112


def test_what_all_layers_do_is_the_learning_rates() -> None:
    def fault(readings: Step, since: int) -> None:
        for i, layer in enumerate(LAYERS):
            readings["weight_norm"][layer] *= (1.05 + 0.01 * i) ** (since + 1)

    (alert,) = verdicts(WeightJumpDetector(), with_fault(160, 110, fault))
    assert (alert.layer, alert.step) == ("(all)", 110)
    assert "learning rate" in alert.reason


def test_a_restart_that_comes_back_to_a_rate_seen_before_is_quiet() -> None:
    weights = dict.fromkeys(LAYERS, 10.0)
    detector = WeightJumpDetector()
    for step in range(400):
        rate = 1e-2 * (0.01 + 0.99 * (1 + math.cos(math.pi * (step % 100) / 100)) / 2)
        for i, layer in enumerate(LAYERS):
            weights[layer] *= 1 + rate * math.sin(step * (i + 1))
        assert not detector.update(step, {"weight_norm": dict(weights)})


def test_faults_before_there_is_a_habit_have_to_be_large() -> None:
    small = scaled("weight_norm", "head", lambda since: 1.02)
    large = scaled("weight_norm", "head", lambda since: 40.0)
    assert not verdicts(WeightJumpDetector(), with_fault(30, 12, small))
    assert [a.layer for a in verdicts(WeightJumpDetector(), with_fault(30, 12, large))] == ["head"]


def test_gaps_in_the_steps_count_as_many_small_changes() -> None:
    detector = WeightJumpDetector()
    for step in range(100):
        detector.update(step, {"weight_norm": {layer: 1.01**step for layer in LAYERS}})
    assert not detector.update(140, {"weight_norm": {layer: 1.01**140 for layer in LAYERS}})


def test_steps_that_update_nothing_are_no_habit() -> None:
    detector = WeightJumpDetector()
    for step in range(60):  # a scaler skips, or the learning rate is zero
        assert not detector.update(step, {"weight_norm": dict.fromkeys(LAYERS, 1.0)})
    for step, readings in enumerate(healthy(60), start=60):
        assert not detector.update(step, readings)


def test_steps_without_a_gradient_are_no_habit() -> None:
    # An expert that every tenth batch reaches: between them weight decay moves its weights by 0.002 %, and
    # the next gradient by 0.2 %.
    detector, norms = WeightJumpDetector(), {"expert": 2.5, "router": 2.5}
    for step in range(600):
        is_reached = step % 10 == 9
        gradients = {"expert": float(is_reached), "router": 1.0}
        assert not detector.update(step, {"weight_norm": dict(norms), "grad_norm": gradients})
        norms["expert"] *= math.exp((-1) ** (step // 10) * 2e-3 if is_reached else -2e-5)
        norms["router"] *= math.exp((-1) ** step * 1e-3)
    norms["expert"] *= 1.3
    (alert,) = detector.update(600, {"weight_norm": norms, "grad_norm": gradients})
    assert alert.layer == "expert"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"surprise": 0.0}, "surprise and min_change must be positive; got 0.0"),
        ({"ratio": 1.0}, "ratios must be above 1 .* got 1.0"),
        ({"max_ratio": 2.0}, "max_ratio at least ratio; got 3.0, 2.0"),
        ({"common_ratio": 1.0}, r"got 3.0, 12.0 and 1.0 \(common\)"),
        ({"min_history": 65}, "min_history must lie in"),
        ({"min_layers": 1}, "min_layers must be at least 2; got 1"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightJumpDetector(**arguments)


@pytest.mark.parametrize("sizes", [(1e-200, 1e200), (1e200, 1e-200)])
def test_weights_that_change_beyond_the_range_of_float64(sizes: tuple[float, float]) -> None:
    before, after = sizes
    detector = WeightJumpDetector(min_history=5)
    alerts = []
    for step in range(30):
        weights = {layer: 1 + 1e-4 * step for layer in "bcd"}
        weights["a"] = before * (1 + 1e-4 * step) if step < 20 else after
        alerts += detector.update(step, {"weight_norm": weights})
    (alert,) = alerts
    assert (alert.layer, alert.step) == ("a", 20)
    # In the first steps, when there is no habit yet, such a change is taken in as a finite one.
    early = WeightJumpDetector()
    for step, size in enumerate([*sizes, *sizes, *(20 * [1.0])]):
        early.update(step, {"weight_norm": {"a": size}})
    assert all(math.isfinite(value) for value in early.state_dict()["tracks"]["a"]["range"])

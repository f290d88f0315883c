from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from stability.divergence import (
    REMEDIES,
    QuantityRangeDetector,
    dense_coupling_detector,
    entropy_collapse_detector,
    jacobian_growth_detector,
    large_logit_detector,
    logit_growth_detector,
    row_sum_growth_detector,
    saturation_detector,
    update_ratio_detector,
    update_rms_detector,
)
from tests.stability.divergence.series import healthy, scaled, verdicts, with_fault

FAMILIES = [
    # detector, quantity, what a fault multiplies it by since its beginning
    (logit_growth_detector, "attention/max_logit", lambda since: 1.06**since),
    (large_logit_detector, "attention/max_logit", lambda since: 1.06**since),
    (entropy_collapse_detector, "attention/entropy", lambda since: 0.96**since),
    (saturation_detector, "attention/saturated_share", lambda since: min(19.0, 1.05**since)),
    (row_sum_growth_detector, "attention/row_sum", lambda since: 1.06**since),
    (jacobian_growth_detector, "attention/jacobian_frobenius", lambda since: 1.04**since),
    (dense_coupling_detector, "attention/off_diagonal_share", lambda since: min(5.0, 1.04**since)),
    (update_rms_detector, "adam_update_rms", lambda since: 30.0),
    (update_ratio_detector, "update_ratio", lambda since: 1e3),
]


@pytest.mark.parametrize(("make", "quantity", "factor"), FAMILIES)
def test_each_family_names_the_layer_and_stays_quiet_before(
    make: Callable[[], QuantityRangeDetector], quantity: str, factor: Callable[[int], float]
) -> None:
    layer = "blocks.1.attention" if quantity.startswith("attention") else "blocks.1.mlp"
    (alert,) = verdicts(make(), with_fault(420, 210, scaled(quantity, layer, factor)))
    assert (alert.layer, alert.quantity, alert.severity) == (layer, quantity, "warning")
    assert 210 <= alert.onset_step <= alert.step
    assert alert.evidence[-1] == (alert.step, alert.value)
    assert alert.remedies


@pytest.mark.parametrize(("make", "quantity", "factor"), FAMILIES)
def test_each_family_is_quiet_on_healthy_runs(
    make: Callable[[], QuantityRangeDetector], quantity: str, factor: Callable[[int], float]
) -> None:
    for seed in range(5):
        assert not verdicts(make(), enumerate(healthy(600, seed)))


def test_jacobian_growth_is_sigmoids_and_so_are_its_remedies() -> None:
    detector = jacobian_growth_detector()
    for step, norm in enumerate([1e-3, 1e-3, 1e-3, 0.5]):  # ½ is as far as softmax gets
        assert not detector.update(step, {"attention/jacobian_frobenius": {"a": norm}})
    assert not [remedy for remedy in REMEDIES["jacobian-growth"] if "row Jacobian is diagonal" in remedy]


def test_the_sentence_says_how_many_layers_do_the_same() -> None:
    detector = update_ratio_detector()
    for step in range(3):
        assert not detector.update(step, {"update_ratio": {"a": 1e-3, "b": 1e-3, "c": 1e-3}})
    (alert,) = detector.update(3, {"update_ratio": {"a": 0.8, "b": 0.9, "c": 1e-3}})
    assert alert.reason.endswith("(limit 0.3); 1 of 2 other layers are beyond theirs as well.")
    assert alert.spread == ("b",)


def test_largest_logits_below_zero_count_as_other_layers() -> None:
    detector = logit_growth_detector()
    for step in range(3):
        assert not detector.update(step, {"attention/max_logit": dict.fromkeys("abcd", 2.0)})
    (alert,) = detector.update(3, {"attention/max_logit": {"a": 1e5, "b": -2e4, "c": 6e3, "d": -3e2}})
    assert alert.reason.endswith("(limit 12); 1 of 3 other layers are beyond theirs as well.")


def small(value: float) -> dict[str, dict[str, float]]:
    return {"attention/entropy": {"a": value}}


def test_the_limit_alone_and_the_history_alone_say_nothing() -> None:
    detector = entropy_collapse_detector()
    always_low = [(i, small(0.3)) for i in range(20)]
    halved_but_high = [(i, small(6.0 if i < 10 else 2.0)) for i in range(20)]
    assert not verdicts(detector, always_low)
    assert not verdicts(entropy_collapse_detector(), halved_but_high)


def test_an_episode_ends_when_the_value_is_back() -> None:
    values = [2.0] * 5 + [0.1, 0.1] + [2.0] * 8 + [0.1]
    alerts = verdicts(entropy_collapse_detector(), ((i, small(v)) for i, v in enumerate(values)))
    assert [alert.step for alert in alerts] == [5, 15]


def test_zero_nan_and_infinity_do_not_break_it() -> None:
    values = [2.0, math.nan, 2.0, math.inf, 2.0, 2.0, 0.0]
    (alert,) = verdicts(entropy_collapse_detector(), ((i, small(v)) for i, v in enumerate(values)))
    assert (alert.step, alert.value) == (6, 0.0)


def test_the_reference_is_the_median_before_the_value() -> None:
    detector = QuantityRangeDetector("q", "kind", "it grew", limit=5.0, ratio=3.0, min_history=2)
    (alert,) = verdicts(detector, ((i, {"q": {"a": value}}) for i, value in enumerate([1.0, 2.0, 10.0])))
    assert alert.reference == pytest.approx(math.sqrt(2.0))


def test_layers_that_move_within_the_limit_are_not_the_origin() -> None:
    detector = QuantityRangeDetector("q", "kind", "it grew", limit=100.0, ratio=3.0)
    for step in range(10):
        detector.update(step, {"q": {"a": 1.0, "b": 50.0}})
    detector.update(10, {"q": {"a": 20.0, "b": 50.0}})  # "a" has grown first, but is small
    (alert,) = detector.update(11, {"q": {"a": 20.0, "b": 500.0}})
    assert alert.layer == "b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0.0}, "limit must be positive; got 0.0"),
        ({"ratio": 1.0}, "ratio must be above 1; got 1.0"),
        ({"window": 2}, "min_history must lie in"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantityRangeDetector("q", "kind", "meaning", **{"limit": 1.0, "ratio": 2.0, **arguments})

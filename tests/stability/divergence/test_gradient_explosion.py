from __future__ import annotations

import math

import numpy as np
import pytest

from stability.divergence import Alert, GradientExplosionDetector


def feed(detector: GradientExplosionDetector, norms: list[dict[str, float]]) -> list[Alert]:
    return [alert for step, norm in enumerate(norms) for alert in detector.update(step, {"grad_norm": norm})]


def noisy(steps: int, seed: int = 0) -> list[dict[str, float]]:
    noise = np.random.default_rng(seed).lognormal(0.0, 0.5, (steps, 3))
    return [dict(zip("abc", row.tolist(), strict=True)) for row in noise]


def test_ordinary_noise_is_quiet() -> None:
    for seed in range(20):
        assert feed(GradientExplosionDetector(), noisy(500, seed)) == []


@pytest.mark.parametrize("rate", [-1 / 50, 1 / 10])
def test_a_steady_trend_is_quiet(rate: float) -> None:
    norms = [{"a": 100 * math.exp(rate * step)} for step in range(600)]
    assert feed(GradientExplosionDetector(), norms) == []


def test_an_explosion_warns_then_says_divergence() -> None:
    growth = [{"a": 1.0, "b": 3.0**step, "c": 1.0} for step in range(12)]
    warning, divergence = feed(GradientExplosionDetector(), noisy(60) + growth)
    assert (warning.layer, warning.severity) == ("b", "warning")
    assert (divergence.layer, divergence.severity) == ("b", "divergence")
    assert warning.value >= 99 * warning.reference
    assert divergence.value >= 9999 * divergence.reference
    assert warning.onset_step < warning.step
    assert warning.evidence[-1] == (warning.step, warning.value)
    assert "reaches 1e+04 × in about" in warning.reason
    assert "% a step" in warning.reason


def test_a_spike_of_one_step_is_told_without_a_forecast() -> None:
    (warning,) = feed(GradientExplosionDetector(), [*noisy(60), {"a": 1.0, "b": 2e3, "c": 1.0}, *noisy(20)])
    assert (warning.step, warning.layer, warning.onset_step) == (60, "b", 60)
    assert "a step" not in warning.reason


def test_an_unknown_quantity_is_refused() -> None:
    with pytest.raises(ValueError, match="one of grad_norm, activation_grad_norm; got 'grad_nrm'"):
        GradientExplosionDetector("grad_nrm")


def test_an_explosion_in_the_first_steps_is_told_of_the_whole_model() -> None:
    norms = [{"(all)": norm, "a": norm, "b": 0.1} for norm in (50.0, 2e4, 1e5, 6e5, 1e5, *[2e5] * 40)]
    warning, divergence = feed(GradientExplosionDetector(), norms)
    assert (warning.step, warning.layer, warning.severity) == (1, "(all)", "warning")
    assert (divergence.step, divergence.layer, divergence.severity) == (3, "(all)", "divergence")
    assert warning.reference == 50.0
    assert "of the whole model 2e+04 is 400 × the first one, 50" in warning.reason


def test_layers_behind_an_output_that_starts_at_zero_are_quiet() -> None:
    # Their first gradients are nothing, that of the output layer is not.
    norms = [{"(all)": 1.0 + a, "a": a, "head": 1.0} for a in (0.0, 1e-4, 1e-2, 0.3, *[1.0] * 40)]
    assert not feed(GradientExplosionDetector(), norms)


def test_the_origin_is_the_layer_that_left_its_range_first() -> None:
    # "a" is the louder one when the alarm comes, but "b" began two steps earlier.
    growth = [{"a": 1.0 if step < 4 else 1e4, "b": 4.0 ** (step + 1)} for step in range(6)]
    calm = [{"a": 1.0, "b": 1.0}] * 30
    alert = feed(GradientExplosionDetector(), calm + growth)[0]
    assert (alert.step, alert.layer, alert.onset_step) == (34, "b", 32)
    assert alert.spread == ("a",)


def test_the_layer_nearest_to_the_loss_is_named() -> None:
    together = [{"a": 1e6, "b": 1e3, "c": 1.0}]
    (alert,) = feed(GradientExplosionDetector(), noisy(60) + together)
    assert alert.layer == "b"
    assert alert.spread == ("a",)


def test_the_sentence_names_the_layer_that_passed_the_ratio_if_it_began_in_another() -> None:
    detector = GradientExplosionDetector()
    calm = [{"a": 1.0, "b": 1.0}] * 30
    warning, divergence = feed(detector, [*calm, {"a": 500.0, "b": 100.0}, {"a": 2e4, "b": 400.0}])
    assert (warning.layer, warning.severity) == ("b", "warning")
    assert warning.reason == "gradient norm 100 is 100 × its median of 1, while that of a is 500 × its own."
    assert (divergence.layer, divergence.severity) == ("b", "divergence")
    assert "400 × its median of 1, while that of a is 2e+04 × its own" in divergence.reason
    (alone,) = feed(GradientExplosionDetector(), [*calm, {"a": 1.0, "b": 500.0}])
    assert "while" not in alone.reason


def test_where_gradients_are_clipped_those_at_outputs_tell() -> None:
    detector = GradientExplosionDetector("activation_grad_norm")
    for step in range(30):
        assert not detector.update(step, {"activation_grad_norm": {"a": 1.0}, "grad_norm": {"a": 1.0}})
    (alert,) = detector.update(30, {"activation_grad_norm": {"a": 2e4}, "grad_norm": {"a": 1.0}})
    assert (alert.quantity, alert.severity) == ("activation_grad_norm", "divergence")
    assert "gradient at its output" in alert.reason


def test_spikes_and_the_whole_models_norm_say_nothing() -> None:
    norms = [{"a": 1.0, "(all)": 1e9} for _ in range(60)]
    norms[40]["a"] = 20.0
    assert feed(GradientExplosionDetector(), norms) == []


def test_a_zero_or_broken_gradient_has_no_logarithm() -> None:
    norms = [{"a": 1.0}] * 30 + [{"a": 0.0}, {"a": math.nan}, {"a": math.inf}] + [{"a": 1.0}] * 3
    assert feed(GradientExplosionDetector(), norms) == []


def test_a_level_that_stays_becomes_the_ordinary_one() -> None:
    detector = GradientExplosionDetector(window=20, min_history=10)
    alerts = feed(detector, [{"a": 1.0}] * 30 + [{"a": 500.0}] * 40 + [{"a": 500.0 * 500.0}])
    assert [alert.step for alert in alerts] == [30, 70]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warning_ratio": 1.0}, "1 < warning_ratio <= divergence_ratio; got 1.0"),
        ({"warning_ratio": 1e5}, "1 < warning_ratio"),
        ({"min_history": 0}, "min_history must lie in"),
        ({"min_history": 101}, "min_history must lie in"),
        ({"num_spreads": -1.0}, "num_spreads must be at least 0; got -1"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientExplosionDetector(**arguments)


def test_the_reference_is_the_median_that_was_judged():
    detector = GradientExplosionDetector(min_history=4)
    alerts = []
    for step, norm in enumerate([1.0, 1.0, 9.0, 9.0, 1e7]):
        alerts += detector.update(step, {"grad_norm": {"layer": norm}})
    (alert,) = alerts
    assert alert.reference == pytest.approx(3.0)
    assert "its median of 3" in alert.reason


def test_a_first_norm_that_falls_beyond_the_range_of_float64_is_quiet() -> None:
    detector = GradientExplosionDetector()
    for step, norm in enumerate([1e200, 1e-200, 1e200]):
        assert not detector.update(step, {"grad_norm": {"(all)": norm}})

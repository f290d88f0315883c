from __future__ import annotations

import json
import math

import numpy as np
import pytest

from stability.divergence import Alert, GradientExplosionDetector, NonFiniteDetector, default_detectors

NAN = math.nan


def feed(detector: GradientExplosionDetector, norms: list[dict[str, float]]) -> list[Alert]:
    return [alert for step, norm in enumerate(norms) for alert in detector.update(step, {"grad_norm": norm})]


def noisy(steps: int, seed: int = 0) -> list[dict[str, float]]:
    noise = np.random.default_rng(seed).lognormal(0.0, 0.7, (steps, 3))
    return [dict(zip("abc", row.tolist(), strict=True)) for row in noise]


class TestNonFinite:
    @pytest.mark.parametrize(
        ("readings", "layer", "quantity"),
        [
            # A broken weight explains everything after it.
            (
                {"weight_norm": {"a": 1, "b": NAN}, "activation_rms": {"a": 1, "b": NAN}},
                "b",
                "weight_norm",
            ),
            # Outputs break forward: the first one is the origin.
            ({"activation_rms": {"a": 1, "b": math.inf, "c": NAN}}, "b", "activation_rms"),
            # Gradients break backward: the last one is.
            ({"grad_norm": {"a": NAN, "b": NAN, "c": 1, "(all)": NAN}}, "b", "grad_norm"),
            ({"activation_grad_norm": {"a": NAN, "b": 1}}, "a", "activation_grad_norm"),
            ({"loss": {"(all)": NAN}}, "(all)", "loss"),
        ],
    )
    def test_it_names_the_origin(self, readings: dict, layer: str, quantity: str) -> None:
        (alert,) = NonFiniteDetector().update(3, readings)
        assert (alert.layer, alert.quantity, alert.severity, alert.step) == (layer, quantity, "divergence", 3)
        assert not math.isfinite(alert.value)

    def test_an_episode_alerts_once(self) -> None:
        detector = NonFiniteDetector()
        steps = [1.0, NAN, NAN, 1.0, NAN]
        alerts = [len(detector.update(i, {"grad_norm": {"a": value}})) for i, value in enumerate(steps)]
        assert alerts == [0, 1, 0, 0, 1]

    def test_finite_numbers_of_any_size_are_quiet(self) -> None:
        assert NonFiniteDetector().update(0, {"grad_norm": {"a": 1e300, "b": 0.0}}) == []


class TestGradientExplosion:
    def test_ordinary_noise_is_quiet(self) -> None:
        for seed in range(20):
            assert feed(GradientExplosionDetector(), noisy(500, seed)) == []

    def test_a_decaying_norm_is_quiet(self) -> None:
        norms = [{"a": 100 * math.exp(-step / 50)} for step in range(600)]
        assert feed(GradientExplosionDetector(), norms) == []

    def test_an_explosion_warns_then_says_divergence(self) -> None:
        growth = [{"a": 1.0, "b": 3.0**step, "c": 1.0} for step in range(12)]
        warning, divergence = feed(GradientExplosionDetector(), noisy(60) + growth)
        assert (warning.layer, warning.severity) == ("b", "warning")
        assert (divergence.layer, divergence.severity) == ("b", "divergence")
        assert 100 * warning.reference <= warning.value < 1e4 * warning.reference
        assert divergence.value >= 1e4 * divergence.reference
        assert warning.step < divergence.step

    def test_of_layers_that_cross_together_the_one_nearest_to_the_loss_is_named(self) -> None:
        explosion = [{"a": 1e6, "b": 1e5, "c": 1.0}]
        (alert,) = feed(GradientExplosionDetector(), noisy(60) + explosion)
        assert alert.layer == "b"

    def test_a_second_episode_alerts_again(self) -> None:
        spike = [{"a": 500.0, "b": 1.0, "c": 1.0}]
        alerts = feed(GradientExplosionDetector(), noisy(60) + spike + spike + noisy(10) + spike)
        assert [alert.step for alert in alerts] == [60, 72]

    def test_the_first_steps_have_no_reference(self) -> None:
        norms = [{"a": 1e6}] + [{"a": 1.0}] * 60
        assert feed(GradientExplosionDetector(), norms) == []

    def test_bad_thresholds(self) -> None:
        with pytest.raises(ValueError, match="1 < warning_ratio <= divergence_ratio; got 1e4"[:40]):
            GradientExplosionDetector(warning_ratio=1e5)
        with pytest.raises(ValueError, match="min_history must lie in"):
            GradientExplosionDetector(min_history=200)


def test_detector_state_survives_a_checkpoint_with_identical_verdicts() -> None:
    norms = noisy(70) + [{"a": 1.0, "b": 4.0**step, "c": NAN if step > 9 else 1.0} for step in range(14)]
    for cut in (5, 40, 72, 76):
        whole, first, second = default_detectors(), default_detectors(), default_detectors()
        expected, resumed = [], []
        for step, norm in enumerate(norms):
            expected += [alert for detector in whole for alert in detector.update(step, {"grad_norm": norm})]
            if step == cut:
                for old, new in zip(first, second, strict=True):
                    new.load_state_dict(json.loads(json.dumps(old.state_dict())))
            detectors = first if step < cut else second
            resumed += [
                alert for detector in detectors for alert in detector.update(step, {"grad_norm": norm})
            ]
        assert len(expected) == 3
        assert repr(resumed) == repr(expected)  # NaN is not equal to itself

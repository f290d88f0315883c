from __future__ import annotations

import math

import numpy as np
import pytest

from stability.divergence import LossDetector
from tests.stability.divergence.series import Step, scaled, verdicts, with_fault


def test_a_spike_is_told_once_at_its_step() -> None:
    fault = scaled("loss", "(all)", lambda since: 5.0 if since in (0, 2) else 1.0)
    (alert,) = verdicts(LossDetector(), with_fault(160, 110, fault))
    assert (alert.step, alert.layer, alert.kind, alert.onset_step) == (110, "(all)", "loss-spike", 110)
    assert alert.evidence[-1] == (110, alert.value)


def test_a_shift_is_told_with_the_step_since_when() -> None:
    fault = scaled("loss", "(all)", lambda since: 1.6)
    (alert,) = verdicts(LossDetector(), with_fault(160, 110, fault))
    assert 110 <= alert.onset_step <= alert.step <= 118


def test_a_shift_of_a_falling_loss_is_told() -> None:
    rng = np.random.default_rng(0)
    levels = [2.0 - 0.01 * min(step, 100) + 1.0 * (step >= 100) for step in range(160)]
    series = [(i, {"loss": {"(all)": level + 0.2 * float(rng.normal())}}) for i, level in enumerate(levels)]
    (alert,) = verdicts(LossDetector(), series)
    assert 97 <= alert.onset_step <= 108
    assert 100 < alert.step <= 125
    assert f"since step {alert.onset_step}" in alert.reason


def with_norm(norms: list[float], losses: list[float]) -> list[tuple[int, Step]]:
    return [
        (step, {"loss": {"(all)": loss}, "grad_norm": {"(all)": norm, "a": norm}})
        for step, (loss, norm) in enumerate(zip(losses, norms, strict=True))
    ]


def test_a_smaller_spike_is_told_where_the_gradient_bears_it_out() -> None:
    rng = np.random.default_rng(0)
    losses = [1.0 + 0.1 * float(x) for x in rng.normal(size=120)]
    norms = [float(x) for x in rng.lognormal(0.0, 0.2, size=120)]
    losses[100] = 1.9
    assert not verdicts(LossDetector(spike_ratio=8.0), with_norm(norms, losses))
    norms[100] = 8.0
    (alert,) = verdicts(LossDetector(spike_ratio=8.0), with_norm(norms, losses))
    assert alert.step == 100
    assert "and the gradient norm with it" in alert.reason
    losses[100] = 1.0
    assert not verdicts(LossDetector(spike_ratio=8.0), with_norm(norms, losses))


def test_a_loss_far_above_the_first_one_is_told_in_the_first_steps() -> None:
    losses, norms = [4.0, 3e3, 8e4, 2e4, 5e5] * 8, [50.0, 1e4, 1e5, 1e5, 1e6] * 8
    (alert,) = verdicts(LossDetector(), with_norm(norms, losses))
    assert (alert.step, alert.reference, alert.onset_step) == (1, 4.0, 1)
    assert "750 × the first one" in alert.reason
    without = [(step, {"loss": readings["loss"]}) for step, readings in with_norm(norms, losses)]
    assert [alert.step for alert in verdicts(LossDetector(), without)] == [1]


def test_first_steps_that_are_healthy_are_quiet() -> None:
    # Twice the first loss; a first loss close to zero by chance, while gradients stay; a negative one.
    assert not verdicts(LossDetector(), with_norm([1.0] * 15, [1.0, 2.0, 2.0] * 5))
    assert not verdicts(LossDetector(), with_norm([1.0] * 15, [1e-4, 0.1, -0.2] * 5))
    assert not verdicts(LossDetector(), with_norm([1.0, 5.0, 5.0] * 5, [-1.0, 2.0, 2.0] * 5))


def test_rounding_of_a_loss_that_has_come_to_zero_is_quiet() -> None:
    """One batch learned by heart: cross-entropy in float32 is zero, or a few roundings."""

    def series(last: float) -> list[tuple[int, Step]]:
        losses = [*np.geomspace(2.3, 1e-7, 60).tolist(), *[0.0] * 150, last, 0.0]
        return [(step, {"loss": {"(all)": loss}}) for step, loss in enumerate(losses)]

    assert not verdicts(LossDetector(), series(1e-6))
    [alert] = verdicts(LossDetector(), series(1e-3))
    assert (alert.kind, alert.value) == ("loss-spike", 1e-3)


@pytest.mark.parametrize("tail", ["normal", "exponential"])
def test_noise_of_a_constant_level_is_quiet(tail: str) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        noise = rng.normal(0, 1, 600) if tail == "normal" else rng.exponential(1, 600)
        series = [(step, {"loss": {"(all)": 2.0 + 0.5 * float(x)}}) for step, x in enumerate(noise)]
        assert not verdicts(LossDetector(), series)


def test_a_falling_loss_and_one_that_does_not_vary_are_quiet() -> None:
    falling = [(step, {"loss": {"(all)": math.exp(-step / 20)}}) for step in range(300)]
    constant = [(step, {"loss": {"(all)": 1.0 + 1e-9 * (step % 7)}}) for step in range(300)]
    assert not verdicts(LossDetector(), falling)
    assert not verdicts(LossDetector(), constant)


def test_losses_that_are_missing_or_broken_are_passed_over() -> None:
    series = [(step, {"loss": {"(all)": math.nan}} if step % 2 else {}) for step in range(100)]
    assert not verdicts(LossDetector(), series)


def test_another_name() -> None:
    series = [(step, {"nll": {"(all)": 1.0 + 0.1 * (step % 3) + 50 * (step == 99)}}) for step in range(100)]
    assert [alert.quantity for alert in verdicts(LossDetector(name="nll"), series)] == ["nll"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spike_ratio": 0.0}, "must be positive .* got 6.0, 0.0"),
        ({"shift_sum": -1.0}, "must be positive .* got 6.0, 5.0, -1.0"),
        ({"shift_slack": -1.0}, "shift_slack at least 0; got .* and -1.0"),
        ({"first_ratio": 1.0}, "first_ratio must be above 1; got 1.0"),
        ({"min_history": 0}, r"min_history must lie in \[1, 64\]"),
        ({"min_history": 33, "window": 32}, r"min_history must lie in \[1, 32\]"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossDetector(**arguments)

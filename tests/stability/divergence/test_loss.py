from __future__ import annotations

import math

import numpy as np
import pytest

from stability.divergence import LossDetector
from tests.stability.divergence.series import scaled, verdicts, with_fault


def test_a_spike_is_told_once_at_its_step() -> None:
    fault = scaled("loss", "(all)", lambda since: 5.0 if since in (0, 2) else 1.0)
    (alert,) = verdicts(LossDetector(), with_fault(160, 110, fault))
    assert (alert.step, alert.layer, alert.kind, alert.onset_step) == (110, "(all)", "loss-spike", 110)
    assert alert.evidence[-1] == (110, alert.value)


def test_a_shift_is_told_with_the_step_since_when() -> None:
    fault = scaled("loss", "(all)", lambda since: 1.6)
    (alert,) = verdicts(LossDetector(), with_fault(160, 110, fault))
    assert 110 <= alert.onset_step <= alert.step <= 118


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
        ({"spike_ratio": 0.0}, "must be positive; got 5.0, 0.0"),
        ({"shift_steps": 17}, "shift_steps must lie in"),
        ({"min_history": 0}, "min_history must lie in"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossDetector(**arguments)

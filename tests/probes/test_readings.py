"""A step as detectors read it."""

from __future__ import annotations

import numpy as np

from probes.readings import ForwardReadings
from probes.record import Series, StepRecords


def step(*series: Series) -> StepRecords:
    return StepRecords(0, series, np.arange(len(series), dtype=np.float64), np.full(len(series), np.nan))


def test_heads_are_left_out_and_later_calls_have_names_of_their_own() -> None:
    readings = ForwardReadings(["a"])
    series = (Series("a", "loss"), Series("a", "loss", call=1), Series("a", "loss", head=0))
    assert readings(step(*series)) == {"loss": {"a": 0.0, "a/call_1": 1.0}}


def test_layers_come_in_the_models_order_until_outputs_show_that_of_the_forward_pass() -> None:
    readings = ForwardReadings(["a", "b", "c"])
    gradients = step(*(Series(layer, "grad_norm") for layer in "cba"))
    assert list(readings(gradients)["grad_norm"]) == ["a", "b", "c"]
    readings(step(*(Series(layer, "activation_rms") for layer in "bca")))
    assert readings.order == ["b", "c", "a"]
    assert list(readings(gradients)["grad_norm"]) == ["b", "c", "a"]  # of names it had seen before
    assert readings(gradients)["grad_norm"] == {"c": 0.0, "b": 1.0, "a": 2.0}
    readings.resume(["c", "a", "b"])
    assert list(readings(gradients)["grad_norm"]) == ["c", "a", "b"]


def test_names_that_are_known_by_their_identity_are_kept_alive() -> None:
    readings = ForwardReadings(["a"])
    for number in range(1000):  # of these, many would have the identity of one before
        assert readings(step(Series("a", str(number)))) == {str(number): {"a": 0.0}}

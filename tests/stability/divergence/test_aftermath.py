"""Conditions that outlive the episode in which they came."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from stability.divergence import ALL_LAYERS, Alert, EpisodeDetector, default_detectors
from stability.divergence.aftermath import Aftermath
from stability.divergence.detector import EVENTS
from stability.divergence.remedies import REMEDIES
from tests.stability.divergence.series import Scripted, Step, num_calls, verdicts, with_fault

SPIKE = Alert(10, "b", "grad_norm", "warning", 50.0, 0.1, "it grew.", "gradient-explosion", 9)
COLLAPSE = Alert(20, "a", "entropy", "warning", 0.4, 3.0, "rows fell.", "entropy-collapse", 18, spread=("c",))


def hear(*alerts: Alert, levels: dict[int, float], quantity="entropy", layer="a", until=300) -> list[Alert]:
    """What is told where the quantity is recorded as given, at those steps."""
    steps = [(step, {quantity: {layer: levels[step]}} if step in levels else {}) for step in range(until)]
    return verdicts(EpisodeDetector([Scripted(*alerts)]), steps)


def test_attention_that_stays_collapsed_is_told_when_the_spike_before_it_is_over() -> None:
    spike, left = hear(SPIKE, COLLAPSE, levels={30: 0.3, 120: 0.2})
    assert spike == SPIKE
    assert (left.step, left.onset_step) == (121, 18)  # a hundred quiet steps after the last verdict
    assert (left.layer, left.kind, left.value, left.reference) == ("a", "entropy-collapse", 0.2, 3.0)
    assert left.spread == ("c",)
    assert left.reason == (
        "rows fell. It came at step 20, after gradient-explosion in b at step 10, and has stayed: 0.2 now."
    )


def test_it_is_told_once() -> None:
    assert len(hear(SPIKE, COLLAPSE, levels=dict.fromkeys(range(30, 900), 0.2), until=900)) == 2


@pytest.mark.parametrize(("now", "is_told"), [(0.2, True), (1.09, True), (1.1, False), (3.5, False)])
def test_what_is_nearer_to_before_has_not_stayed(now: float, is_told: bool) -> None:
    # Half of the way on a logarithmic scale: √(0.4 · 3) = 1.095.
    assert len(hear(SPIKE, COLLAPSE, levels={100: now})) == 1 + is_told


def test_what_was_told_first_and_stays_speaks_for_what_followed() -> None:
    growth = Alert(10, "a", "logit", "warning", 50.0, 2.0, "logits grow.", "logit-growth")
    readings = {"logit": {"a": 60.0}, "entropy": {"a": 0.2}}
    steps = [(step, readings if step > 30 else {}) for step in range(300)]
    assert verdicts(EpisodeDetector([Scripted(growth, COLLAPSE)]), steps) == [growth]
    gone = [(step, {**readings, "logit": {"a": 2.0}} if step > 30 else {}) for step in range(300)]
    assert len(verdicts(EpisodeDetector([Scripted(growth, COLLAPSE)]), gone)) == 2


def test_an_event_leaves_nothing() -> None:
    loss = Alert(20, "(all)", "loss", "warning", 9.0, 3.0, "loss.", "loss-spike")
    assert hear(SPIKE, loss, levels={100: 9.0}, quantity="loss", layer="(all)") == [SPIKE]


def test_what_is_recorded_rarely_is_waited_for() -> None:
    frozen = Alert(20, "mlp", "rms", "warning", 1e-5, 1e-3, "frozen.", "frozen-layer")
    _, left = hear(SPIKE, frozen, levels={200: 2e-5}, quantity="rms", layer="mlp")
    assert left.step == 200
    # A new episode has other things to tell.
    later = replace(SPIKE, step=150, onset_step=149)
    assert [a.step for a in hear(SPIKE, frozen, later, levels={200: 2e-5}, quantity="rms")] == [10, 150]


def test_values_that_are_no_numbers_say_nothing() -> None:
    assert len(hear(SPIKE, COLLAPSE, levels={50: 0.3, 60: math.nan, 70: math.inf})) == 2
    assert len(hear(SPIKE, COLLAPSE, levels={50: math.nan})) == 1


def test_a_gradient_that_never_was_stays_zero() -> None:
    dead = Alert(20, "a", "norm", "warning", 0.0, None, "dead.", "dead-layer")
    assert len(hear(SPIKE, dead, levels={100: 0.0}, quantity="norm")) == 2
    assert len(hear(SPIKE, dead, levels={100: 1e-9}, quantity="norm")) == 1


def test_several_that_stay_are_one_alert() -> None:
    coupling = Alert(25, "d", "share", "warning", 0.5, 0.1, "coupled.", "dense-coupling")
    growth = Alert(26, "a", "logit", "warning", 99.0, 2.0, "logits.", "logit-growth")
    steps = [
        (step, {"entropy": {"a": 0.4}, "share": {"d": 0.49}, "logit": {"a": 90.0}} if step > 30 else {})
        for step in range(300)
    ]
    _, left = verdicts(EpisodeDetector([Scripted(SPIKE, COLLAPSE, coupling, growth)]), steps)
    assert left.kind == "entropy-collapse"
    assert left.spread == ("c", "d")
    assert left.reason.endswith(" 0.4 now. So have dense-coupling in d (0.49), logit-growth in a (90).")


def test_it_is_told_before_the_next_episode_of_the_same_step() -> None:
    later = replace(SPIKE, step=121, onset_step=121)
    told = hear(SPIKE, COLLAPSE, later, levels={50: 0.3})
    assert [(a.step, a.kind) for a in told[1:]] == [(121, "entropy-collapse"), (121, "gradient-explosion")]


@pytest.mark.parametrize("at", [11, 21, 60, 121, 200])
def test_a_resumed_detector_tells_the_same(at: int) -> None:
    def steps(first: int, last: int):
        return ((step, {"entropy": {"a": 0.3}} if step % 10 == 0 else {}) for step in range(first, last))

    before = EpisodeDetector([Scripted(SPIKE, COLLAPSE)])
    told = verdicts(before, steps(0, at))
    after = EpisodeDetector([Scripted(SPIKE, COLLAPSE)])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert told + verdicts(after, steps(at, 300)) == hear(
        SPIKE, COLLAPSE, levels=dict.fromkeys(range(0, 300, 10), 0.3)
    )


def test_a_state_of_an_earlier_version_has_none() -> None:
    detector = EpisodeDetector([Scripted(SPIKE, COLLAPSE)])
    verdicts(detector, ((step, {}) for step in range(30)))
    state = detector.state_dict()
    del state["aftermath"]
    detector.load_state_dict(state)
    assert verdicts(detector, ((step, {"entropy": {"a": 0.1}}) for step in range(30, 300))) == []


def test_events_are_kinds_of_detectors() -> None:
    assert REMEDIES.keys() >= EVENTS


def test_kinds_of_ones_own_may_stay_too() -> None:
    fever = Alert(20, "a", "temperature", "warning", 40.0, 37.0, "it is hot.", "fever")
    assert len(hear(SPIKE, fever, levels={100: 40.0}, quantity="temperature")) == 2


def test_kinds_of_ones_own_need_no_name() -> None:
    names = ("temperature", "pulse")
    alerts = [Alert(20, "a", name, "warning", 40.0, 37.0, f"{name} rose.") for name in names]
    alerts.append(Alert(20, ALL_LAYERS, "pressure", "warning", 40.0, 37.0, "it rose."))
    now = {**{name: {"a": 41.0} for name in names}, "pressure": {ALL_LAYERS: 42.0}}
    steps = [(step, now if step == 100 else {}) for step in range(300)]
    _, left = verdicts(EpisodeDetector([Scripted(SPIKE, *alerts)]), steps)
    assert left.reason.endswith("So have pulse in a (41), pressure in (all) (42).")
    assert left.spread == ()  # (all) is no other layer


def test_ten_times_the_conditions_are_ten_times_the_work() -> None:
    def calls(number: int) -> int:
        alerts = [replace(COLLAPSE, layer=f"layer.{i}") for i in range(number)]
        return num_calls(lambda: Aftermath(SPIKE).take([*alerts, *alerts]))

    assert calls(300) < 11 * calls(30)


def test_of_real_detectors_a_collapse_behind_a_spike_is_told() -> None:
    def spike_and_collapse(readings: Step, since: int) -> None:
        if since == 0:
            readings["grad_norm"] = {name: 1e4 * value for name, value in readings["grad_norm"].items()}
        elif "attention/entropy" in readings:
            readings["attention/entropy"]["blocks.0.attention"] = 0.1

    (detector,) = default_detectors()
    told = verdicts(detector, with_fault(400, 205, spike_and_collapse))
    assert [(alert.step, alert.kind) for alert in told] == [
        (205, "gradient-explosion"),
        (311, "entropy-collapse"),  # seen at step 210
    ]

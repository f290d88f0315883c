from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from stability.divergence import Alert, EpisodeDetector, default_detectors
from stability.divergence.remedies import REMEDIES
from tests.stability.divergence.series import (
    LAYERS,
    Scripted,
    Step,
    healthy,
    scaled,
    verdicts,
    with_fault,
)


def alert(step: int, layer: str, kind: str, onset: int | None = None) -> Alert:
    return Alert(step, layer, "q", "warning", 1.0, None, f"{kind}.", kind, onset)


def hear(*alerts: Alert, until: int = 400, quiet_steps: int = 100) -> list[Alert]:
    detector = EpisodeDetector([Scripted(*alerts)], quiet_steps=quiet_steps)
    return verdicts(detector, ((step, {}) for step in range(until)))


def test_the_earliest_onset_speaks_for_all() -> None:
    (told,) = hear(alert(9, "late", "weight-jump", 9), alert(9, "early", "loss-spike", 4))
    assert (told.layer, told.onset_step) == ("early", 4)
    assert "What followed: weight-jump in late at step 9." in told.reason


def test_of_one_onset_the_likeliest_cause_speaks() -> None:
    (told,) = hear(alert(9, "a", "gradient-explosion", 9), alert(9, "b", "weight-jump", 9))
    assert told.layer == "b"
    nan_weight = replace(alert(9, "c", "non-finite", 9), quantity="weight_norm")
    (told,) = hear(alert(9, "b", "weight-jump", 9), nan_weight)
    assert told.layer == "c"


def test_consequences_are_not_told_and_keep_the_episode_open() -> None:
    told = hear(alert(10, "a", "weight-jump"), alert(90, "b", "loss-spike"), alert(170, "c", "logit-growth"))
    assert [a.step for a in told] == [10]


def test_the_first_event_after_a_condition_is_told() -> None:
    growth, jump = alert(10, "a", "logit-growth"), alert(60, "(all)", "weight-jump", 59)
    told = hear(growth, alert(50, "b", "dense-coupling"), jump, alert(61, "(all)", "loss-spike"))
    assert told[0] == growth
    assert told[1] == replace(jump, reason="weight-jump. It follows logit-growth in a at step 10.")
    assert len(told) == 2


def test_of_several_events_of_a_step_the_likeliest_cause_is_told() -> None:
    told = hear(
        alert(10, "a", "logit-growth"), alert(60, "b", "loss-spike", 60), alert(60, "c", "weight-jump", 60)
    )
    assert [a.layer for a in told] == ["a", "c"]


def test_events_are_told_anew_in_each_episode() -> None:
    growth, jump = alert(10, "a", "logit-growth"), alert(60, "b", "weight-jump")
    again = [replace(growth, step=300), replace(jump, step=350)]
    assert [a.step for a in hear(growth, jump, *again)] == [10, 60, 300, 350]


@pytest.mark.parametrize("at", [20, 61])
def test_a_resumed_detector_knows_whether_an_event_was_told(at: int) -> None:
    alerts = [alert(10, "a", "logit-growth"), alert(60, "b", "weight-jump"), alert(70, "b", "loss-spike")]
    before, after = (EpisodeDetector([Scripted(*alerts)]) for _ in range(2))
    told = verdicts(before, ((step, {}) for step in range(at)))
    state = json.loads(json.dumps(before.state_dict()))
    after.load_state_dict(state)
    assert told + verdicts(after, ((step, {}) for step in range(at, 400))) == hear(*alerts)
    del state["aftermath"], state["has_event"]  # as an earlier version saved it
    after.load_state_dict(state)
    assert told + verdicts(after, ((step, {}) for step in range(at, 400))) == hear(*alerts)


def test_after_a_quiet_time_an_episode_of_its_own_begins() -> None:
    told = hear(alert(10, "a", "weight-jump"), alert(111, "b", "loss-spike"))
    assert [(a.step, a.layer) for a in told] == [(10, "a"), (111, "b")]


def test_divergence_is_told_again_under_the_layer_where_it_began() -> None:
    diverged = replace(alert(30, "head", "non-finite"), severity="divergence")
    first, second = hear(
        alert(10, "a", "weight-jump", 10), diverged, replace(diverged, step=31, layer="elsewhere")
    )
    assert (first.severity, second.severity) == ("warning", "divergence")
    assert (second.step, second.layer, second.onset_step) == (30, "a", 10)
    assert "non-finite in head at step 30" in second.reason


def test_what_follows_is_listed_once_by_kind_layer_and_step() -> None:
    origin, twice = alert(9, "a", "weight-jump", 4), alert(9, "b", "logit-growth", 9)
    (told,) = hear(origin, twice, replace(twice, quantity="other"), replace(origin, onset_step=9))
    assert told.reason == "weight-jump. What followed: logit-growth in b at step 9."


def test_it_spread_to_the_other_layers_that_followed() -> None:
    (told,) = hear(
        replace(alert(9, "a", "weight-jump", 4), spread=("b",)),
        replace(alert(9, "c", "gradient-explosion", 9), spread=("a", "d")),
        alert(9, "(all)", "loss-spike", 9),
        alert(9, "b", "logit-growth", 9),
    )
    assert told.spread == ("b", "c", "d")


def test_consequences_that_are_not_told_are_kept_also_in_a_checkpoint() -> None:
    spoken = [alert(10, "a", "weight-jump"), alert(90, "b", "loss-spike"), alert(170, "c", "logit-growth")]
    detector, resumed = (EpisodeDetector([Scripted(*spoken)]) for _ in range(2))
    assert detector.episode is None
    for step in range(100):
        detector.update(step, {})
    resumed.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    assert resumed.update(170, {}) == []
    assert resumed.episode is not None
    assert (resumed.episode.origin, *resumed.episode.consequences) == tuple(spoken)


def test_a_quiet_time_of_no_steps() -> None:
    with pytest.raises(ValueError, match="quiet_steps must be at least 1; got 0"):
        EpisodeDetector([], quiet_steps=0)


@pytest.mark.parametrize("seed", range(8))
def test_all_detectors_together_are_quiet_on_healthy_runs(seed: int) -> None:
    (detector,) = default_detectors()
    assert verdicts(detector, enumerate(healthy(600, seed))) == []


def test_one_fault_that_shows_everywhere_is_one_warning_and_one_divergence() -> None:
    def fault(readings: Step, since: int) -> None:
        readings["weight_norm"]["blocks.1.mlp"] *= 40.0
        readings["loss"]["(all)"] *= 50.0
        for layer in LAYERS:
            readings["grad_norm"][layer] = 1e3 * 10.0**since if since < 20 else math.nan

    (detector,) = default_detectors()
    first, second = verdicts(detector, with_fault(200, 110, fault))
    assert (first.layer, first.kind, first.step) == ("blocks.1.mlp", "weight-jump", 110)
    assert (second.layer, second.severity, second.onset_step) == ("blocks.1.mlp", "divergence", 110)


def test_every_kind_has_remedies_with_a_source() -> None:
    for kind, remedies in REMEDIES.items():
        assert remedies, kind
        assert any(character.isdigit() for text in remedies for character in text), kind


def test_layers_may_come_go_and_miss_steps() -> None:
    (detector,) = default_detectors()
    for step, readings in enumerate(healthy(300)):
        if step % 7 == 0:
            readings = {}
        elif step % 5 == 0:
            readings = {quantity: dict(list(values.items())[:1]) for quantity, values in readings.items()}
        elif step > 150:
            readings["weight_norm"]["new"] = 5.0
            readings["grad_norm"]["new"] = 5.0
        assert detector.update(2 * step + (step > 200) * 50, readings) == []


def test_a_scaled_layer_is_found_among_the_others() -> None:
    (detector,) = default_detectors()
    fault = scaled("weight_norm", "head", lambda since: 0.1)
    (told,) = verdicts(detector, with_fault(160, 120, fault))
    assert (told.layer, told.onset_step) == ("head", 120)
    assert str(told).startswith("step 120: warning in head: weight norm went from")

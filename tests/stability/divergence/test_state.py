"""What is saved with a checkpoint: whoever resumes hears the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from stability.divergence import (
    Detector,
    EpisodeDetector,
    FrozenLayerDetector,
    GradientExplosionDetector,
    InitialisationDetector,
    LossDetector,
    NonFiniteDetector,
    VanishingGradientDetector,
    WeightJumpDetector,
    default_detectors,
    entropy_collapse_detector,
    logit_growth_detector,
    update_ratio_detector,
)
from tests.stability.divergence.series import Step, verdicts, with_fault

DETECTORS: list[Callable[[], Detector]] = [
    lambda: default_detectors()[0],
    NonFiniteDetector,
    WeightJumpDetector,
    InitialisationDetector,
    GradientExplosionDetector,
    VanishingGradientDetector,
    lambda: FrozenLayerDetector(num_records=1),
    LossDetector,
    entropy_collapse_detector,
    logit_growth_detector,
    update_ratio_detector,
]


def everything_goes_wrong(readings: Step, since: int) -> None:
    """Every detector has something to say, and then something more."""
    for quantity in ("attention/max_logit", "attention/entropy", "update_ratio"):
        for layer in readings.get(quantity, {}):
            readings[quantity][layer] *= 1e3 if quantity != "attention/entropy" else 1e-3
    if "adam_update_rms" in readings:
        readings["adam_update_rms"]["head"] *= 1e-5
    readings["weight_norm"]["head"] *= 1.1**since
    readings["grad_norm"]["embedding"] = 0.0
    readings["grad_norm"]["head"] *= 2.0**since
    readings["loss"]["(all)"] *= 1.5**since
    if since % 9 == 8:
        readings["grad_norm"]["blocks.0.mlp"] = math.nan


def two_losses(step: int) -> Step:
    return {"loss": {"(all)": 2 + 0.01 * (step % 7)}, "auxiliary": {"(all)": 50 + 0.1 * (step % 5)}}


def of_losses(*names: str) -> EpisodeDetector:
    return EpisodeDetector([LossDetector(name=name) for name in names])


@pytest.mark.parametrize("names", [("auxiliary", "loss"), ("other", "loss", "auxiliary"), ("auxiliary",)])
def test_each_loss_finds_its_own_past_whatever_their_order(names: tuple[str, ...]) -> None:
    before, resumed = of_losses("loss", "auxiliary"), of_losses(*names)
    for step in range(100):
        assert before.update(step, two_losses(step)) == []
    resumed.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert [resumed.update(step, two_losses(step)) for step in range(100, 120)] == [[]] * 20
    [alert] = resumed.update(120, {"loss": {"(all)": 2.0}, "auxiliary": {"(all)": 90.0}})
    assert alert.quantity == "auxiliary"


def test_a_state_that_numbered_losses_is_read() -> None:
    before, resumed = of_losses("loss", "auxiliary"), of_losses("loss", "auxiliary")
    for step in range(100):
        before.update(step, two_losses(step))
    state = before.state_dict()
    of_loss, of_auxiliary = state["detectors"].values()
    state["detectors"] = {"LossDetector": of_loss, "LossDetector 2": of_auxiliary}
    resumed.load_state_dict(state)
    assert resumed.state_dict() == before.state_dict()


@pytest.mark.parametrize("make", DETECTORS)
@pytest.mark.parametrize("cut", [0, 1, 17, 60, 101, 110, 113, 118, 130])
def test_save_load_resume_gives_the_same_verdicts(make: Callable[[], Detector], cut: int) -> None:
    series = list(with_fault(160, 100, everything_goes_wrong, seed=3))
    uninterrupted = make()
    before = verdicts(uninterrupted, series[:cut])
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    after, expected = verdicts(resumed, series[cut:]), verdicts(uninterrupted, series[cut:])
    assert repr(after) == repr(expected)  # NaN is not equal to itself
    if make is not InitialisationDetector and cut <= 100:
        assert not before
        assert expected
    # and the state itself goes on the same
    assert json.dumps(resumed.state_dict()) == json.dumps(uninterrupted.state_dict())


@pytest.mark.parametrize("make", DETECTORS)
def test_a_saved_state_does_not_change_with_the_detector(make: Callable[[], Detector]) -> None:
    detector = make()
    series = list(with_fault(160, 100, everything_goes_wrong))
    verdicts(detector, series[:105])
    state = detector.state_dict()
    text = json.dumps(state)
    verdicts(detector, series[105:])
    assert json.dumps(state) == text


def test_verdicts_are_deterministic() -> None:
    runs = [
        verdicts(default_detectors()[0], with_fault(160, 100, everything_goes_wrong, seed=5))
        for _ in range(2)
    ]
    assert repr(runs[0]) == repr(runs[1])
    assert runs[0]

"""Detectors asked together: what a forgotten step leaves behind, and detectors that fail."""

from __future__ import annotations

import random

import pytest

import probes
from probes.detection import SAVE_EVERY, Detection
from stability.divergence import Alert, Readings, default_detectors

LAYERS = ("embedding", "blocks.0", "blocks.1", "head")


def readings(rng: random.Random, scale: float = 1.0) -> Readings:
    quantities = ("grad_norm", "weight_norm", "activation_rms", "attention/entropy", "attention/max_logit")
    return {
        "loss": {"(all)": scale * rng.lognormvariate(0, 0.1)},
        **{name: {layer: scale * rng.lognormvariate(0, 0.3) for layer in LAYERS} for name in quantities},
    }


@pytest.mark.parametrize("forgotten", [(0,), (5, 6, 7), (SAVE_EVERY - 1, SAVE_EVERY), (40, 50, 63, 64, 65)])
def test_a_forgotten_step_leaves_nothing_behind(forgotten: tuple[int, ...]) -> None:
    rng = random.Random(0)
    forgetting = Detection(default_detectors(), can_forget=True)
    reference = Detection(default_detectors(), can_forget=False)
    alerts: tuple[list[Alert], list[Alert]] = ([], [])
    for step in range(90):
        if step in forgotten:
            forgetting.update(step, readings(rng, scale=1e6))
            forgetting.forget()
            continue
        given = readings(rng, scale=1e5 if step > 80 else 1.0)
        alerts[0].extend(forgetting.update(step, given))
        alerts[1].extend(reference.update(step, given))
    assert repr(alerts[0]) == repr(alerts[1])
    assert alerts[0]
    assert repr(forgetting.state_dict()) == repr(reference.state_dict())


class Broken:
    """A detector of which one method fails."""

    def __init__(self, method: str) -> None:
        self._method = method

    def update(self, step: int, given: Readings) -> list[Alert]:
        if self._method == "update":
            raise KeyError("bug")
        return []

    def state_dict(self) -> dict:
        if self._method == "state_dict":
            raise KeyError("bug")
        return {}

    def load_state_dict(self, state: dict) -> None:
        if self._method == "load_state_dict":
            raise KeyError("bug")


@pytest.mark.parametrize("method", ["update", "state_dict", "load_state_dict"])
def test_a_detector_that_fails_is_dropped_with_one_warning(method: str) -> None:
    detection = Detection([Broken(method), *default_detectors()], can_forget=True)
    with pytest.warns(probes.ProbeWarning, match="Broken failed and is dropped") as caught:
        for step in range(20):
            detection.update(step, readings(random.Random(step)))
            detection.forget()
    assert len(caught) == 1
    assert "Broken" not in [name for name, _ in detection.state_dict()]


def test_a_checkpoint_loaded_in_between_is_not_forgotten() -> None:
    rng = random.Random(0)
    first, second = (Detection(default_detectors(), can_forget=True) for _ in range(2))
    for step in range(5):
        first.update(step, readings(rng))
        second.update(step, readings(rng))
    state = first.state_dict()
    second.load_state_dict(state)
    second.update(5, readings(rng))
    second.forget()
    assert repr(second.state_dict()) == repr(state)

"""What ``Probe.load_state_dict`` refuses, and says of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import probes


def state_of(model: nn.Module) -> dict[str, Any]:
    with probes.attach(model) as probe:
        model(torch.ones(1, 2)).sum().backward()
        probe.step()
        return probe.state_dict()


@pytest.mark.parametrize(
    ("state", "error", "match"),
    [
        (None, TypeError, "got NoneType"),
        ({}, ValueError, "'step', 'detectors', 'layers' missing, got a dict with no keys"),
        ({"model": {}, "probe": {}}, ValueError, "got a dict with 'model', 'probe'.*give that entry"),
        ({"step": "7"}, TypeError, "its step must be an integer, got '7'"),
        ({"step": True}, TypeError, "its step must be an integer, got True"),
        ({"step": -5}, ValueError, "its step must not be negative, got -5"),
        ({"detectors": None}, TypeError, "its detectors must be a list, got None"),
        ({"layers": "0"}, TypeError, "its layers must be a list, got '0'"),
    ],
)
def test_what_is_no_state(state: Any, error: type[Exception], match: str) -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    good = state_of(model)
    is_changed_part = isinstance(state, dict) and set(state) <= set(good) and state
    with probes.attach(model) as probe:
        expected = r"`state` must be what Probe\.state_dict\(\) returned.*"
        with pytest.raises(error, match=expected + match):
            probe.load_state_dict({**good, **state} if is_changed_part else state)
        assert "step 0" in repr(probe)


def test_the_state_of_another_model() -> None:
    state = state_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    with probes.attach(nn.ModuleDict({"head": nn.Linear(2, 1)})) as probe:
        with pytest.raises(
            ValueError, match=r"of this model, whose layers are .*head; it is of one with 0, 1\. Load"
        ):
            probe.load_state_dict(state)


def test_the_state_of_a_model_of_which_a_part_is_new() -> None:
    state = state_of(nn.Sequential(nn.Linear(2, 2)))
    with probes.attach(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))) as probe:
        probe.load_state_dict(state)
        assert "step 1" in repr(probe)

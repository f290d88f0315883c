"""What ``Probe.load_state_dict`` refuses, and what it goes on without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import probes
from stability.divergence import LossDetector, NonFiniteDetector


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


def test_losses_that_have_changed_places_are_not_the_same_detectors() -> None:
    model, (first, second) = nn.Linear(2, 1), (LossDetector(name="a"), LossDetector(name="b"))
    with probes.attach(model, detectors=[first, second]) as probe:
        state = probe.state_dict()
    with probes.attach(model, detectors=[LossDetector(name="b"), LossDetector(name="a")]) as probe:
        with pytest.raises(ValueError, match=r"\['LossDetector a', 'LossDetector b'\]; this probe has"):
            probe.load_state_dict(state)
        of_an_earlier_version = [(name.split()[0], saved) for name, saved in state["detectors"]]
        probe.load_state_dict({**state, "detectors": of_an_earlier_version})


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 1)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained_for_three_steps() -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer) as probe:
        for _ in range(3):
            one_step(model, optimizer)
        return model, optimizer, probe.state_dict()


def test_a_detector_that_was_added_since_begins_anew_and_the_others_go_on() -> None:
    model, optimizer, state = trained_for_three_steps()
    [(_, saved)] = state["detectors"]
    del saved["detectors"]["FrozenLayerDetector"]
    with probes.attach(model, optimizer) as probe:
        probe.load_state_dict(state)
        [(_, loaded)] = probe.state_dict()["detectors"]
        assert loaded["detectors"].pop("FrozenLayerDetector")["num_frozen"] == {}
        assert loaded == saved


def test_a_detector_whose_state_cannot_be_read_begins_anew() -> None:
    model, optimizer, state = trained_for_three_steps()
    [(_, saved)] = state["detectors"]
    del saved["detectors"]["VanishingGradientDetector"]["num_gone"]
    with probes.attach(model, optimizer) as probe:
        nothing_known = probe.state_dict()["detectors"]
        with pytest.warns(probes.ProbeWarning, match="EpisodeDetector cannot be read .*num_gone") as told:
            probe.load_state_dict(state)
        assert told[0].filename == __file__
        assert (probe.state_dict()["step"], probe.state_dict()["detectors"]) == (3, nothing_known)


def test_a_detector_that_can_read_no_state_is_dropped() -> None:
    class Forgetful(NonFiniteDetector):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("habit")

    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer, detectors=[Forgetful()]) as probe:
        with pytest.warns(probes.ProbeWarning) as told:
            probe.load_state_dict(probe.state_dict())
        one_step(model, optimizer)
    assert ["cannot be read" in str(told[0].message), "is dropped" in str(told[1].message)] == [
        True,
        True,
    ]

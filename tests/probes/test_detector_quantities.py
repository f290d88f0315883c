from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import probes
from probes.failures import ProbeWarning
from stability.divergence import Detector, EpisodeDetector, LossDetector, QuantityRangeDetector


def threshold(quantity: str) -> QuantityRangeDetector:
    return QuantityRangeDetector(quantity, "kind", "meaning", limit=1.0, ratio=2.0)


def train(detector: Detector, steps: int = 25, **logged: float) -> list[str]:
    """What is warned of in a training that logs these numbers."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ProbeWarning)
        with probes.attach(model, optimizer, detectors=[detector], on_divergence="ignore") as probe:
            for _ in range(steps):
                probe.log(**logged)
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("wrap", [lambda detector: detector, lambda detector: EpisodeDetector([detector])])
def test_a_misspelt_quantity_is_refused_and_near_names_are_told(wrap) -> None:
    with pytest.raises(ValueError, match="got 'grad_nrm'. Near names: grad_norm, grad_max_abs. Numbers of"):
        train(wrap(threshold("grad_nrm")))


def test_a_quantity_like_no_other_is_refused_with_the_whole_list() -> None:
    with pytest.raises(ValueError, match="got 'zzz'. There are: grad_norm, .*, attention/saturated_share."):
        train(threshold("zzz"))


def test_a_quantity_that_is_only_logged_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'd_loss'.* Numbers of probe.log are no layer's."):
        train(threshold("d_loss"), d_loss=1.0)


@pytest.mark.parametrize("quantity", ["grad_norm", "attention/entropy"])
def test_quantities_of_a_probe_are_accepted(quantity: str) -> None:
    assert train(threshold(quantity)) == []


def test_a_loss_that_is_logged_under_another_name_is_warned_of_once() -> None:
    (warning,) = train(LossDetector(name="trian_loss"), steps=60, train_loss=1.0)
    assert warning == (
        "LossDetector(name='trian_loss') had nothing to judge: the script logged no such number in 60 "
        "steps. Near names: train_loss."
    )


@pytest.mark.parametrize(
    ("name", "steps", "logged"),
    [
        ("train_loss", 25, {"train_loss": 1.0}),
        ("loss", 25, {"d_loss": 1.0}),  # the default: who logs other losses does without
        ("grad_norm", 25, {"d_loss": 1.0}),  # the probe's own
        ("train_loss", 25, {}),
    ],
)
def test_no_warning(name: str, steps: int, logged: dict[str, float]) -> None:
    assert train(LossDetector(name=name), steps, **logged) == []

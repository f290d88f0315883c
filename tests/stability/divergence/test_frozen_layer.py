from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

import probes
from stability.divergence import Alert, FrozenLayerDetector

DETAILS_EVERY = 200


def verdicts(**sizes: Sequence[float]) -> list[Alert]:
    """Of Adam step sizes by layer, a record each `DETAILS_EVERY` steps."""
    detector = FrozenLayerDetector()
    return [
        alert
        for i, values in enumerate(zip(*sizes.values(), strict=True))
        for alert in detector.update(
            DETAILS_EVERY * i, {"adam_update_rms": dict(zip(sizes, values, strict=True))}
        )
    ]


def test_a_frozen_layer_is_told_once_with_the_step_since_when() -> None:
    (alert,) = verdicts(mlp=[1.0, 0.01, *[3e-5] * 6], head=[1.0, *[0.5] * 7])
    assert (alert.layer, alert.kind, alert.onset_step, alert.step) == ("mlp", "frozen-layer", 400, 800)
    assert "3e-05 of full size since step 400" in alert.reason
    assert "1 of 2 layers" in alert.reason
    assert alert.remedies


def test_the_first_to_freeze_is_the_origin() -> None:
    (alert,) = verdicts(early=[1.0, 0.5, *[1e-5] * 4], late=[1.0, *[1e-5] * 5], head=[1.0, *[0.5] * 5])
    assert (alert.layer, alert.onset_step, alert.step) == ("late", 200, 600)


def test_a_layer_that_thaws_and_freezes_again_is_told_twice() -> None:
    mlp = [*[1e-5] * 3, 0.1, *[1e-5] * 3]
    assert [alert.step for alert in verdicts(mlp=mlp, head=[1.0] * 7)] == [400, 1200]


def test_records_without_a_gradient_say_nothing() -> None:
    mlp = [1e-5, 0.0, 1e-5, 0.0, 1e-5, 0.0, 1e-5]
    assert [alert.step for alert in verdicts(mlp=mlp, head=[1.0] * 7)] == [800]


@pytest.mark.parametrize(
    ("mlp", "head"),
    [
        ([1.0, *[1e-5] * 2, 0.1, *[1e-5] * 2], [1.0] * 6),  # two records of its own
        ([1.0, *[2e-3] * 5], [1.0] * 6),  # small, as clean runs are
        ([1.0, *[1e-5] * 5], [1.0, *[0.05] * 5]),  # no layer learns much
        ([1.0, *[1e-5] * 5], [1.0, 0.5, 0.05, 0.5, 0.05, 0.5]),  # nor for long
        ([0.0] * 6, [1.0] * 6),  # no gradient at all: another detector's
        ([float("nan")] * 6, [1.0] * 6),
    ],
)
def test_quiet(mlp: list[float], head: list[float]) -> None:
    assert not verdicts(mlp=mlp, head=head)


def test_a_network_that_has_learned_its_samples_by_heart_is_quiet() -> None:
    """Its gradients fall by orders of magnitude, in some layers and batches sooner than in others."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 20)
    labels = (inputs[:, 0] * inputs[:, 1] > 0).long()
    hidden = [layer for _ in range(7) for layer in (nn.Linear(64, 64), nn.ReLU())]
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), *hidden, nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with probes.attach(model, optimizer, detectors=[FrozenLayerDetector()], details_every=50) as probe:
        for _ in range(600):
            batch = torch.randint(256, (32,))
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss < 1e-2
    assert not probe.alerts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0.0}, "limit must lie between 0 and 0.01, .* got 0.0"),
        ({"limit": 0.5}, "limit must lie between 0 and 0.01, .* got 0.5"),
        ({"num_records": 0}, "num_records must be at least 1; got 0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FrozenLayerDetector(**arguments)

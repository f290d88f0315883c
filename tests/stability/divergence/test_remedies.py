"""What is recommended of attention can be done to the attention that the alert is about."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import probes
import stability
from stability.divergence import (
    REMEDIES,
    Alert,
    dense_coupling_detector,
    entropy_collapse_detector,
    jacobian_growth_detector,
    row_sum_growth_detector,
    saturation_detector,
)
from tests.probes.models import SelfAttention, torch_attention

Recorded = dict[str, list[float]]

# Weights far below 1 are exponentials: divided by their sum they collapse as those of softmax do.
small_sigmoid = partial(stability.sigmoid_attention, bias=-60.0)


def sharpen(attention: Callable[..., Tensor]) -> tuple[list[Alert], Recorded]:
    """Verdicts and recorded values of a layer whose queries and keys grow by 10 % a step."""
    torch.manual_seed(0)
    layer, x = SelfAttention(attention), torch.randn(4, 32, 16)
    detectors = [  # with limits that 32 tokens reach
        entropy_collapse_detector(),
        dense_coupling_detector(limit=0.4),
        saturation_detector(limit=0.2),
        row_sum_growth_detector(limit=4.0, ratio=2.0),
        jacobian_growth_detector(limit=0.5, ratio=1.5),
    ]
    recorded: Recorded = {}
    with probes.attach(
        layer, attention_every=1, attention_rows=None, detectors=detectors, on_divergence="ignore"
    ) as probe:
        for _ in range(40):
            layer(x).square().mean().backward()
            probe.step()
            with torch.no_grad():
                layer.projection.weight[:32] *= 1.1
    for record in probe.records:
        if record.head is None:
            recorded.setdefault(record.quantity, []).append(record.value)
    return probe.alerts, recorded


def recommended(alerts: list[Alert], words: str) -> bool:
    return any(words in remedy for alert in alerts for remedy in alert.remedies)


@pytest.mark.parametrize("attention", [torch_attention, stability.softmax_attention])
def test_softmax_may_be_replaced_and_has_no_bias(attention: Callable[..., Tensor]) -> None:
    alerts, recorded = sharpen(attention)
    assert {alert.kind: alert.remedies for alert in alerts} == {
        kind: REMEDIES[kind] for kind in ("entropy-collapse", "dense-coupling")
    }
    assert recommended(alerts, "in place of softmax")
    assert not recommended(alerts, "sigmoid attention's bias")
    assert not recorded.keys() & {"attention/row_sum", "attention/saturated_share"}
    assert max(recorded["attention/jacobian_frobenius"]) <= 0.5


@pytest.mark.parametrize(
    ("attention", "kinds"),
    [
        (stability.sigmoid_attention, {"saturation", "row-sum-growth", "jacobian-growth"}),
        (small_sigmoid, {"entropy-collapse"}),
    ],
)
def test_sigmoid_is_not_told_to_become_sigmoid(attention: Callable[..., Tensor], kinds: set[str]) -> None:
    alerts, recorded = sharpen(attention)
    assert {alert.kind for alert in alerts} >= kinds
    assert all(alert.remedies for alert in alerts)
    assert not recommended(alerts, "in place of softmax")
    # Dense coupling, whose remedy it is too, cannot be told of a row Jacobian that is diagonal.
    assert set(recorded["attention/off_diagonal_share"]) == {0.0}


def test_the_other_remedies_of_a_collapse_stay_in_their_order() -> None:
    (alert,) = [alert for alert in sharpen(small_sigmoid)[0] if alert.kind == "entropy-collapse"]
    of_both = [remedy for remedy in REMEDIES["entropy-collapse"] if "in place of softmax" not in remedy]
    assert alert.remedies == tuple(of_both)
    assert len(of_both) == len(REMEDIES["entropy-collapse"]) - 1

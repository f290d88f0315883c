"""Updates are those that the optimizer makes, and Adam's second moments its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import probes
from tests.probes.models import train
from tests.probes.recorded import values_of

pytestmark = pytest.mark.filterwarnings("error::probes.ProbeWarning")


def test_adam_update_rms_is_that_of_the_bias_corrected_second_moment() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    with probes.attach(model, optimizer, details_every=1) as probe:
        train(model, lambda: torch.rand(4, 3), optimizer, steps=3)
        model(torch.rand(4, 3)).sum().backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
        moments = [
            optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.95**4) for parameter in model.parameters()
        ]
    ratios = torch.cat([(g**2 / v).flatten() for g, v in zip(gradients, moments, strict=True)])
    recorded = values_of(probe, "adam_update_rms", "(root)")
    assert recorded[0] == pytest.approx(1.0, rel=1e-4)  # after one step v̂ = g²
    assert recorded[-1] == pytest.approx(ratios.mean().sqrt().item(), rel=1e-5)


def test_betas_may_be_tensors_in_one_group_and_numbers_in_another() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    groups = [
        {"params": model[0].parameters(), "betas": (torch.tensor(0.9), torch.tensor(0.99))},
        {"params": model[1].parameters()},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, capturable=False, foreach=False)
    with probes.attach(model, optimizer, details_every=1) as probe:
        train(model, lambda: torch.rand(4, 3), optimizer, steps=1)
    for layer in ("0", "1"):
        assert values_of(probe, "adam_update_rms", layer) == [pytest.approx(1.0, rel=1e-4)]


class Wrapper(torch.optim.Optimizer):
    """Steps an optimizer within its own step, as those do that average weights or look ahead."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return self.inner.step(closure)


def test_an_optimizer_that_steps_within_another_is_measured_once() -> None:
    model = nn.Linear(3, 2)
    inner = torch.optim.AdamW(model.parameters())
    outer = Wrapper(inner)
    with probes.attach(model, [outer, inner], details_every=1) as probe:
        train(model, lambda: torch.rand(4, 3), outer, steps=3)
    assert len(values_of(probe, "update_ratio", "(root)")) == 3

"""A loop of one's own with Accelerate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import probes

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")


@pytest.fixture
def prepared() -> Any:
    accelerate.state.GradientState._reset_state()  # a Trainer of another test has left its own
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters()))


def test_a_step_ends_when_the_accumulated_gradients_are_applied(prepared: Any) -> None:
    accelerator, model, optimizer = prepared
    with probes.attach(accelerator.unwrap_model(model), optimizer.optimizer) as probe:
        for value in range(6):
            with accelerator.accumulate(model):
                probe.log(batch=value)
                accelerator.backward(model(torch.ones(2, 4)).sum())
                optimizer.step()
                optimizer.zero_grad()
    logged = {record.step: record.value for record in probe.records if record.quantity == "batch"}
    assert logged == {0: 0.5, 1: 2.5, 2: 4.5}
    assert {record.step for record in probe.records if record.quantity == "grad_norm"} == {0, 1, 2}


def test_the_wrapper_in_the_optimizers_place_is_refused(prepared: Any) -> None:
    _, model, optimizer = prepared
    with pytest.raises(
        ValueError, match=r"AcceleratedOptimizer wraps it\. Give that one: optimizer\.optimizer"
    ):
        probes.attach(model, optimizer)
    probes.attach(model, optimizer.optimizer).close()

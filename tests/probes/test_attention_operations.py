"""How many operations a step with attention statistics launches: hardly more for more layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import probes
import stability
from probes.record import Record
from tests.probes.models import SelfAttention, torch_attention


class _Operations(TorchDispatchMode):
    """Counts what is launched, views included: each costs the host about as much."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


class _Kernel:
    """Stands for the streaming kernel, which needs a GPU: one operation, on its argument `output`."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: arguments[8].fill_(0.5)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setattr("stability.attention.moments.can_stream", lambda query: True)
    monkeypatch.setattr("stability.attention.triton.row_statistics.row_statistics", _Kernel())


def operations(attention: Any, num_layers: int, rows: int | None, micro_batches: int = 1) -> int:
    """What a step with attention statistics launches beyond one without."""
    model = nn.Sequential(*(SelfAttention(attention) for _ in range(num_layers)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    counted = []
    with probes.attach(
        model, optimizer, attention_every=2, attention_rows=rows, activations_every=0, details_every=0
    ):
        for _ in range(4):
            with _Operations() as operations:
                for _ in range(micro_batches):
                    model(torch.rand(2, 96, 16)).square().sum().backward()
                optimizer.step()
            optimizer.zero_grad()
            counted.append(operations.number)
    return counted[2] - counted[3]


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("attention", [stability.softmax_attention, stability.sigmoid_attention])
@pytest.mark.parametrize(("rows", "once"), [(None, 36), (8, 73)])
def test_a_layer_more_is_its_kernel_its_output_and_one_view(
    attention: Any, rows: int | None, once: int
) -> None:
    of_two, of_twelve = (operations(attention, num_layers, rows) for num_layers in (2, 12))
    assert of_twelve - of_two == 3 * 10
    assert of_twelve <= 3 * 12 + once


@pytest.mark.usefixtures("without_gpu")
def test_micro_batches_are_summarised_together() -> None:
    of_one, of_three = (operations(stability.softmax_attention, 4, 8, n) for n in (1, 3))
    to_select = 20
    assert of_three - of_one <= 2 * (3 * 4 + to_select)


def records(*, steps: int = 2, same_step: bool = False, is_cut_short: bool = False) -> list[Record]:
    torch.manual_seed(0)
    model = nn.Sequential(*(SelfAttention(torch_attention) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with probes.attach(model, optimizer, attention_every=1, attention_rows=4, same_step=same_step) as probe:
        for step in range(steps):
            for tokens in (9, 12, 9):
                model(torch.rand(2, tokens, 16)).square().mean().backward()
            if is_cut_short and step == steps - 1:
                break
            optimizer.step()
            optimizer.zero_grad()
    return [record for record in probe.records if record.quantity.startswith("attention/")]


def test_rows_wait_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summarised a call at a time, when two calls are there, or at the end of the step: the same records."""
    together = records()
    for limit in (1, 2 * 2 * 4 + 1):
        monkeypatch.setattr("probes.attention_calls._MAX_WAITING_ROWS", limit)
        assert records() == together


def test_verdicts_before_the_update_see_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []
    original = probes.delivery.Delivery.judge

    def judge(self: Any, step: int, pending: Any) -> Any:
        judged.append(pending.has("attention/entropy"))
        return original(self, step, pending)

    monkeypatch.setattr("probes.delivery.Delivery.judge", judge)
    assert records(same_step=True) == records()
    assert judged == [True, True]


def test_a_step_that_is_cut_short_keeps_its_attention() -> None:
    assert {record.step for record in records(is_cut_short=True)} == {0, 1}


def test_what_a_step_measured_before_a_checkpoint_is_loaded_is_dropped() -> None:
    model = SelfAttention(torch_attention)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with probes.attach(model, optimizer, attention_every=1) as probe:
        state = probe.state_dict()
        model(torch.full((1, 4, 16), 1e6)).sum().backward()
        probe.load_state_dict(state)
    assert not probe.records

"""What the Hopper kernels take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stability.attention.hopper import eligibility


def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def test_views_of_tokens_before_heads_pass() -> None:
    assert eligibility.layout_problem("query", make(2, 10, 3, 64).transpose(1, 2)) is None


def test_strides_of_axes_of_one_element_do_not_matter() -> None:
    assert (
        eligibility.layout_problem("query", make(1, 1, 10, 64).as_strided((1, 1, 10, 64), (3, 5, 64, 1)))
        is None
    )


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (make(1, 2, 64, 10).transpose(2, 3), "query's last axis is not contiguous"),
        (make(1, 2, 10, 68)[..., :64], "query's rows do not start on 16-byte boundaries"),
        (make(2 * 10 * 64 + 1)[1:].view(1, 2, 10, 64), "query's rows do not start on 16-byte boundaries"),
        (make(1, 1, 10, 64).expand(1, 2, 10, 64), "query is expanded"),
    ],
)
def test_layouts_that_tma_does_not_read(tensor: torch.Tensor, reason: str) -> None:
    assert str(eligibility.layout_problem("query", tensor)).startswith(reason)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that has all that is needed, as far as the rule can see."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(eligibility, "version", lambda name: "3.6.0")
    monkeypatch.setattr(eligibility, "layout_problem", lambda name, tensor: None)
    return monkeypatch


def ask(
    head_dim: int = 64, value_dim: int = 64, dtype: torch.dtype = torch.bfloat16, **arguments: Any
) -> str | None:
    with FakeTensorMode():
        query = torch.empty(1, 4, 10, head_dim, dtype=dtype, device="cuda")
        key = torch.empty(1, 2, 10, head_dim, dtype=dtype, device="cuda")
        value = torch.empty(1, 2, 10, value_dim, dtype=dtype, device="cuda")
        return eligibility.can_run(query, key, value, **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_it_takes(hopper: Any, head_dim: int, dtype: torch.dtype) -> None:
    assert ask(head_dim, head_dim, dtype, is_causal=True, key_lengths=torch.tensor([3])) is None


def test_what_it_refuses(hopper: Any) -> None:
    assert ask(96, 96) == "head_dim is 96, not 64 or 128"
    assert ask(64, 128) == "value's head_dim 128 differs from query's 64"
    assert ask(dtype=torch.float32) == "the dtype is torch.float32, not bfloat16 or float16"
    strided = torch.empty(1, 20)[:, ::2]
    assert ask(score_bias=strided) == "score_bias's last axis is not contiguous (stride 2)"


def test_other_machines(hopper: Any) -> None:
    cpu = make(1, 2, 10, 64)
    assert eligibility.can_run(cpu, cpu, cpu) == "the tensors are on cpu, not on a CUDA device"
    hopper.setattr(eligibility, "version", lambda name: "3.7.1")
    assert ask() == "its Gluon kernels are written for triton 3.6, and 3.7.1 is installed"
    hopper.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert ask() == "the device's compute capability is 8.0, not 9.0"

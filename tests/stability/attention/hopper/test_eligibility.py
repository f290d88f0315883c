"""What the Hopper kernels take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stability.attention import dispatch
from stability.attention.hopper import eligibility
from stability.attention.kernel_call import choose_kernel
from stability.attention.operands import Operands


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


def test_of_tensors_that_differ_in_their_place_only_each_is_looked_at() -> None:
    buffer = make(2 * 10 * 64 + 8)
    views = [buffer[start : start + 2 * 10 * 64].view(1, 2, 10, 64) for start in (0, 1, 8)]
    problems = [eligibility.layout_problem("query", view) for view in views]
    assert [problem is None for problem in problems] == [True, False, True]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that has all that is needed, as far as the rule can see."""
    for module in (dispatch, eligibility):
        monkeypatch.setattr(module, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(eligibility, "installed_triton", lambda: "3.6")
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
    hopper.setattr(eligibility, "installed_triton", lambda: "3.5")
    assert ask() == "its Gluon kernels are written for triton 3.6, 3.7, 3.8, 3.9, not 3.5"
    hopper.setattr(eligibility, "compute_capability", lambda device: (8, 0))
    assert ask() == "the device's compute capability is 8.0, not 9.0"


def test_the_minor_version_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eligibility, "version", {"triton": "3.10.1+git0a"}.__getitem__)
    assert eligibility.installed_triton.__wrapped__() == "3.10"


def choose(implementation: str) -> tuple[str, dict[str, str]]:
    with FakeTensorMode():
        query = torch.empty(1, 4, 10, 64, dtype=torch.bfloat16, device="cuda")
        operands = Operands(query, query, query, torch.empty(1, 4, device="cuda"), *[None] * 5)
        return choose_kernel(
            operands, implementation, scale=1.0, is_causal=False, is_fast=False, needs_statistics=False
        )


@pytest.mark.parametrize("triton", eligibility.RUN_WITH)
def test_auto_takes_the_versions_that_a_gpu_has_run(hopper: Any, triton: str) -> None:
    hopper.setattr(eligibility, "installed_triton", lambda: triton)
    assert choose("auto") == ("hopper", {})


@pytest.mark.parametrize("triton", sorted({*eligibility.COMPILED_WITH} - {*eligibility.RUN_WITH}))
def test_versions_that_only_compile_are_for_those_who_ask_by_name(hopper: Any, triton: str) -> None:
    hopper.setattr(eligibility, "installed_triton", lambda: triton)
    chosen, refusals = choose("auto")
    assert chosen == "triton"
    assert refusals["hopper"].startswith(f"its kernels compile with triton {triton}, but no GPU has run them")
    assert choose("hopper") == ("hopper", {})


def test_no_name_helps_where_the_kernels_do_not_compile(hopper: Any) -> None:
    hopper.setattr(eligibility, "installed_triton", lambda: "3.5")
    assert choose("auto")[0] == "triton"
    with pytest.raises(ValueError, match="'hopper': its Gluon kernels are written for .*, not 3.5"):
        choose("hopper")

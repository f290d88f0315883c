"""The public functions' dispatch and observation point."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stability.attention import AttentionCall, observe, sigmoid_attention, softmax_attention


def test_every_implementation_name_computes_the_same() -> None:
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(sigmoid_attention(x, x, x), sigmoid_attention(x, x, x, implementation="reference"))


def test_observer_sees_the_arguments_before_the_computation() -> None:
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8)
    mask, score_bias = torch.ones(3, 5).bool(), torch.zeros(5)
    seen: list[AttentionCall] = []
    with observe(seen.append):
        softmax_attention(
            query, key, key, attn_mask=mask, is_causal=True, scale=0.5, enable_gqa=True, key_lengths=[5, 4]
        )
        sigmoid_attention(
            query, key, key, enable_gqa=True, query_lengths=[1, 2], bias=-2.0, score_bias=score_bias
        )
    softmax, sigmoid = seen
    assert vars(softmax) == {
        "mechanism": "softmax",
        "query": query,
        "key": key,
        "attn_mask": mask,
        "is_causal": True,
        "scale": 0.5,
        "enable_gqa": True,
        "key_lengths": [5, 4],
        "query_lengths": None,
        "bias": None,
        "score_bias": None,
    }
    assert (sigmoid.mechanism, sigmoid.query_lengths, sigmoid.bias) == ("sigmoid", [1, 2], -2.0)
    assert sigmoid.score_bias is score_bias


def test_observers_nest_and_leave_after_an_exception() -> None:
    x = torch.zeros(1, 1, 2, 4)
    inner: list[AttentionCall] = []
    outer: list[AttentionCall] = []

    def refuse(call: AttentionCall) -> None:
        raise RuntimeError("stop")

    with observe(outer.append):
        with observe(inner.append):
            softmax_attention(x, x, x)
        with pytest.raises(RuntimeError, match="stop"), observe(refuse):
            softmax_attention(x, x, x)
        softmax_attention(x, x, x)
    softmax_attention(x, x, x)
    assert (len(inner), len(outer)) == (1, 3)


def test_observers_are_not_called_for_invalid_calls() -> None:
    seen: list[AttentionCall] = []
    x = torch.zeros(1, 1, 2, 4)
    with observe(seen.append), pytest.raises(ValueError, match="`value`"):
        softmax_attention(x, x, x[:, :, :1])
    assert seen == []


def test_observer_sees_what_autocast_makes_of_the_inputs() -> None:
    x = torch.zeros(1, 1, 2, 4)
    seen: list[AttentionCall] = []
    with observe(seen.append), torch.autocast("cpu", dtype=torch.bfloat16):
        softmax_attention(x, x, x)
    assert seen[0].query.dtype is torch.bfloat16


@pytest.mark.parametrize("attention", [softmax_attention, sigmoid_attention])
def test_meta_tensors_pass_so_no_value_is_read(attention) -> None:
    """A meta tensor raises whenever its values are asked for, as a synchronising read on CUDA would."""
    x = torch.zeros(2, 4, 6, 8, device="meta", requires_grad=True)
    lengths = torch.ones(2, dtype=torch.int64, device="meta")
    output = attention(x, x, x, key_lengths=lengths, query_lengths=lengths, is_causal=True)
    output.sum().backward()
    assert output.shape == x.shape


@pytest.mark.parametrize("attention", [softmax_attention, sigmoid_attention])
def test_fake_tensors_pass(attention) -> None:
    lengths = torch.tensor([3, 6])
    with FakeTensorMode() as mode:
        x = torch.zeros(2, 4, 6, 8)
        for given in (mode.from_tensor(lengths), [3, 6]):
            assert attention(x, x, x, key_lengths=given, query_lengths=given).shape == x.shape


def _each_argument_alone(attention) -> list[str]:
    names = ["attn_mask", "boolean mask", "key_lengths", "query_lengths"]
    return names + (["bias", "0-d bias", "score_bias"] if attention is sigmoid_attention else [])


@pytest.mark.parametrize(
    ("attention", "argument"),
    [
        (attention, argument)
        for attention in (softmax_attention, sigmoid_attention)
        for argument in _each_argument_alone(attention)
    ],
)
def test_vmap_over_any_argument_alone(attention, argument: str) -> None:
    query, key, value = (torch.randn(2, 2, 5, 4) for _ in range(3))
    name = {"boolean mask": "attn_mask", "0-d bias": "bias"}.get(argument, argument)
    many = {
        "attn_mask": torch.randn(3, 5, 5),
        "boolean mask": torch.rand(3, 1, 2, 5, 5) > 0.5,
        "key_lengths": torch.tensor([[0, 5], [3, 1], [5, 5]]),
        "query_lengths": torch.tensor([[0, 5], [3, 1], [5, 5]]),
        "bias": torch.randn(3, 2),
        "0-d bias": torch.randn(3),
        "score_bias": torch.randn(3, 5),
    }[argument]

    def function(one: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, **{name: one})

    torch.testing.assert_close(torch.func.vmap(function)(many), torch.stack([function(one) for one in many]))


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [softmax_attention, sigmoid_attention])
def test_no_synchronisation_on_cuda(attention) -> None:
    x = torch.randn(2, 4, 64, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    on_device = torch.tensor([64, 10], device="cuda")
    attention(x, x, x).sum().backward()  # first use of the libraries may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lengths in (on_device, torch.tensor([64, 10]), [64, 10]):
            output = attention(x, x, x, key_lengths=lengths, query_lengths=lengths, is_causal=True)
            output.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.grad.isfinite().all()

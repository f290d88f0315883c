"""Packed sequences, on the CPU by the reference; the kernels' own tests are in test_sigmoid_kernels.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stability.attention import AttentionCall, observe, sigmoid_attention, sigmoid_attention_varlen

LENGTHS_Q, LENGTHS_K, UNUSED = [3, 0, 5], [4, 2, 1], 2


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def make() -> dict:
    tokens_q, tokens_k = sum(LENGTHS_Q) + UNUSED, sum(LENGTHS_K) + UNUSED
    return {
        "query": torch.randn(tokens_q, 4, 8, dtype=torch.float64),
        "key": torch.randn(tokens_k, 2, 8, dtype=torch.float64),
        "value": torch.randn(tokens_k, 2, 6, dtype=torch.float64),
        "cu_seqlens_q": offsets(LENGTHS_Q),
        "cu_seqlens_k": offsets(LENGTHS_K),
        "max_seqlen_q": 5,
        "max_seqlen_k": 4,
        "enable_gqa": True,
    }


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("bias", ["default", "number", "per head", "per sequence"])
def test_each_sequence_is_attended_alone(bias: str, is_causal: bool) -> None:
    arguments = make()
    given = {
        "default": None,
        "number": -0.5,
        "per head": torch.randn(4, dtype=torch.float64),
        "per sequence": torch.randn(3, 4, dtype=torch.float64),
    }[bias]
    score_bias = torch.randn(sum(LENGTHS_K) + UNUSED, dtype=torch.float64)
    packed = sigmoid_attention_varlen(**arguments, bias=given, score_bias=score_bias, is_causal=is_causal)
    for i, length_q in enumerate(LENGTHS_Q):
        if length_q == 0:
            continue
        rows = slice(sum(LENGTHS_Q[:i]), sum(LENGTHS_Q[: i + 1]))
        keys = slice(sum(LENGTHS_K[:i]), sum(LENGTHS_K[: i + 1]))
        query, key, value = (
            arguments[name][part].transpose(0, 1)[None]
            for name, part in (("query", rows), ("key", keys), ("value", keys))
        )
        alone = sigmoid_attention(
            query, key, value, enable_gqa=True, is_causal=is_causal, score_bias=score_bias[keys],
            bias=given[i : i + 1] if bias == "per sequence" else given,
        )  # fmt: skip
        torch.testing.assert_close(packed[rows], alone[0].transpose(0, 1))
    assert not packed[sum(LENGTHS_Q) :].any()


def test_what_lies_outside_the_sequences_is_not_read() -> None:
    arguments = make()
    expected = sigmoid_attention_varlen(**arguments)
    for name in ("query", "key", "value"):
        arguments[name][-UNUSED:] = math.nan
        arguments[name].requires_grad_()
    output = sigmoid_attention_varlen(**arguments)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    for name in ("query", "key", "value"):
        assert arguments[name].grad.isfinite().all()
        assert not arguments[name].grad[-UNUSED:].any()


def test_observers_see_padded_sequences() -> None:
    seen: list[AttentionCall] = []
    arguments = make()
    with observe(seen.append):
        sigmoid_attention_varlen(**arguments, score_bias=torch.arange(9.0))
    (call,) = seen
    assert call.query.shape == (3, 4, 5, 8)
    assert call.key.shape == (3, 2, 4, 8)
    assert (call.query_lengths.tolist(), call.key_lengths.tolist()) == (LENGTHS_Q, LENGTHS_K)
    assert call.score_bias[1, :2].tolist() == [4.0, 5.0]
    torch.testing.assert_close(call.query[2, :, 1], arguments["query"][4])


def test_meta_tensors_pass_so_no_value_is_read() -> None:
    arguments = {
        name: value.to("meta") if isinstance(value, Tensor) else value for name, value in make().items()
    }
    assert sigmoid_attention_varlen(**arguments).shape == (10, 4, 6)


def test_it_compiles_into_one_graph() -> None:
    arguments = make()
    torch._dynamo.reset()
    compiled = torch.compile(sigmoid_attention_varlen, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), sigmoid_attention_varlen(**arguments))


BAD = {
    "rank of query": (
        {"query": torch.zeros(1, 4, 10, 8)},
        ValueError,
        r"`query` must have shape \[total_tokens",
    ),
    "query is a list": ({"query": [1.0]}, TypeError, "`query` must be a tensor; got list"),
    "offsets are a list": (
        {"cu_seqlens_q": [0, 3, 3, 8]},
        TypeError,
        "`cu_seqlens_q` must be a tensor of int32",
    ),
    "float offsets": ({"cu_seqlens_k": offsets(LENGTHS_K).float()}, TypeError, "got torch.float32"),
    "one offset": ({"cu_seqlens_k": torch.tensor([0])}, ValueError, r"\[sequences \+ 1\]; got \(1,\)"),
    "falling offsets": (
        {"cu_seqlens_q": torch.tensor([0, 4, 3, 8])},
        ValueError,
        "must rise from 0 to at most",
    ),
    "offsets not from 0": ({"cu_seqlens_q": torch.tensor([1, 3, 3, 8])}, ValueError, "must rise from 0"),
    "too many tokens": ({"cu_seqlens_k": torch.tensor([0, 4, 6, 10])}, ValueError, "at most the 9 tokens"),
    "device of offsets": (
        {"cu_seqlens_k": offsets(LENGTHS_K).to("meta")},
        ValueError,
        "must be on the device",
    ),
    "numbers of sequences": (
        {"cu_seqlens_k": offsets([4, 2])},
        ValueError,
        "equally many sequences; got 3 and 2",
    ),
    "no queries at most": ({"max_seqlen_q": 0}, ValueError, "`max_seqlen_q` must be at least 1; got 0"),
    "fewer keys than there are": (
        {"max_seqlen_k": max(LENGTHS_K) - 1},
        ValueError,
        f"`max_seqlen_k` must be at least the longest sequence's {max(LENGTHS_K)} tokens",
    ),
    "fractional maximum": ({"max_seqlen_k": 4.0}, TypeError, "`max_seqlen_k` must be an integer; got float"),
    "score_bias per sequence": ({"score_bias": torch.zeros(3, 9)}, ValueError, r"shape \(9,\); got \(3, 9\)"),
    "bias per sequence": ({"bias": torch.zeros(2, 4)}, ValueError, r"\(3, 4\); got \(2, 4\)"),
    "value_dim": ({"value": torch.zeros(8, 2, 6).double()}, ValueError, "`value` must have shape"),
    "kernel by name": ({"implementation": "hopper"}, ValueError, "'hopper': "),
    "precision": ({"precision": "half"}, ValueError, "`precision` must be one of"),
}


@pytest.mark.parametrize(("change", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sigmoid_attention_varlen(**{**make(), **change})

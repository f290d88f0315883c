"""Every bad argument, named, with the message a caller gets."""

from __future__ import annotations

import math

import pytest
import torch

from stability.attention import sigmoid_attention, softmax_attention
from stability.attention.call import AttentionCall
from stability.attention.validation import logit_terms

BATCH, HEADS, TOKENS_Q, TOKENS_K, HEAD_DIM = 2, 4, 3, 5, 8


def good() -> dict:
    return {
        "query": torch.zeros(BATCH, HEADS, TOKENS_Q, HEAD_DIM),
        "key": torch.zeros(BATCH, HEADS, TOKENS_K, HEAD_DIM),
        "value": torch.zeros(BATCH, HEADS, TOKENS_K, 6),
    }


SHARED = {
    "query is not a tensor": ({"query": [[1.0]]}, TypeError, "`query` must be a tensor; got list"),
    "key is None": ({"key": None}, TypeError, "`key` must be a tensor; got NoneType"),
    "rank of query": ({"query": torch.zeros(4, 3, 8)}, ValueError, r"`query` must have shape .*\(4, 3, 8\)"),
    "rank of key": ({"key": torch.zeros(2, 4, 8)}, ValueError, r"`key` must have shape .*\(2, 4, 8\)"),
    "rank of value": ({"value": torch.zeros(2, 5, 6)}, ValueError, "`value` must have shape"),
    "integer query": (
        {"query": torch.zeros(2, 4, 3, 8).long()},
        TypeError,
        "floating point; got torch.int64",
    ),
    "complex key": ({"key": torch.zeros(2, 4, 5, 8) + 0j}, TypeError, "floating point; got torch.complex64"),
    "batch of key": (
        {"key": torch.zeros(3, 4, 5, 8)},
        ValueError,
        "`key` must have shape .*matching `query`",
    ),
    "head_dim of key": (
        {"key": torch.zeros(2, 4, 5, 7)},
        ValueError,
        r"\(2, 4, tokens_k, 8\).*\(2, 4, 5, 7\)",
    ),
    "heads of key": ({"key": torch.zeros(2, 2, 5, 8)}, ValueError, "Pass enable_gqa=True"),
    "indivisible heads": (
        {"key": torch.zeros(2, 3, 5, 8), "value": torch.zeros(2, 3, 5, 6), "enable_gqa": True},
        ValueError,
        "multiple of the key heads; got 4 and 3",
    ),
    "more key heads than query heads": (
        {"key": torch.zeros(2, 8, 5, 8), "value": torch.zeros(2, 8, 5, 6), "enable_gqa": True},
        ValueError,
        "got 4 and 8",
    ),
    "tokens of value": ({"value": torch.zeros(2, 4, 4, 6)}, ValueError, r"`value`.*\(2, 4, 5, value_dim\)"),
    "dtype of key": (
        {"key": torch.zeros(2, 4, 5, 8).half()},
        TypeError,
        "`key` must have the dtype of `query`",
    ),
    "dtype of value": ({"value": torch.zeros(2, 4, 5, 6).double()}, TypeError, "`value` must have the dtype"),
    "device of key": ({"key": torch.zeros(2, 4, 5, 8, device="meta")}, ValueError, "device of `query`, cpu"),
    "no batch": (
        {name: tensor[:0] for name, tensor in good().items()},
        ValueError,
        r"`query` must not be empty; got shape \(0, 4, 3, 8\)",
    ),
    "no queries": ({"query": torch.zeros(2, 4, 0, 8)}, ValueError, "`query` must not be empty"),
    "no keys": ({"key": torch.zeros(2, 4, 0, 8)}, ValueError, "`key` must not be empty"),
    "no value_dim": ({"value": torch.zeros(2, 4, 5, 0)}, ValueError, "`value` must not be empty"),
    "mask is a list": ({"attn_mask": [True]}, TypeError, "`attn_mask` must be a tensor"),
    "integer mask": (
        {"attn_mask": torch.ones(3, 5).long()},
        TypeError,
        r"got torch.int64. Convert it with .bool",
    ),
    "shape of mask": (
        {"attn_mask": torch.ones(5, 3).bool()},
        ValueError,
        r"broadcast to .*\(2, 4, 3, 5\); got",
    ),
    "rank of mask": (
        {"attn_mask": torch.ones(1, 1, 1, 3, 5).bool()},
        ValueError,
        "`attn_mask` must broadcast",
    ),
    "device of mask": (
        {"attn_mask": torch.ones(5, device="meta").bool()},
        ValueError,
        "`attn_mask` must be on",
    ),
    "dropout of 1": (
        {"dropout_p": 1.0},
        ValueError,
        r"`dropout_p` must be a probability in \[0, 1\); got 1.0",
    ),
    "negative dropout": ({"dropout_p": -0.1}, ValueError, "`dropout_p`"),
    "NaN dropout": ({"dropout_p": math.nan}, ValueError, "`dropout_p`"),
    "NaN scale": ({"scale": math.nan}, ValueError, "`scale` must be finite; got nan"),
    "scale is a string": ({"scale": "small"}, TypeError, "`scale` must be a number"),
    "negative length": (
        {"key_lengths": [-1, 2]},
        ValueError,
        r"`key_lengths` must lie within 0 and 5.*\[-1, 2\]",
    ),
    "too long": ({"key_lengths": torch.tensor([5, 6])}, ValueError, r"`key_lengths` must lie within 0 and 5"),
    "too long query": (
        {"query_lengths": [3, 4]},
        ValueError,
        "`query_lengths` must lie within 0 and 3 tokens",
    ),
    "number of lengths": ({"key_lengths": [1, 2, 3]}, ValueError, r"shape \(2,\); got \(3,\)"),
    "a single length": ({"key_lengths": 3}, ValueError, "one length per sequence"),
    "fractional lengths": ({"key_lengths": [1.5, 2.0]}, TypeError, "`key_lengths` must be integers"),
    "boolean lengths": ({"query_lengths": [True, False]}, TypeError, "`query_lengths` must be integers"),
}

SIGMOID = {
    "infinite bias": ({"bias": math.inf}, ValueError, "`bias` must be finite; got inf"),
    "NaN bias": ({"bias": math.nan}, ValueError, "`bias` must be finite; got nan"),
    "bias is a string": ({"bias": "-ln n"}, TypeError, "`bias` must be a number or None; got str"),
    "bias is a flag": ({"bias": True}, TypeError, "`bias` must be a number or None; got bool"),
    "integer bias": ({"bias": torch.zeros(4).long()}, TypeError, "`bias` must be floating point"),
    "bias per sequence": ({"bias": torch.zeros(2)}, ValueError, r"\[heads\] = \(4,\) .*got \(2,\)"),
    "device of bias": ({"bias": torch.zeros(4, device="meta")}, ValueError, "`bias` must be on the device"),
    "device of a bias that is one number": (
        {"bias": torch.zeros((), device="meta")},
        ValueError,
        "`bias` must be on the device of `query`, cpu; got meta",
    ),
    "score_bias is a number": ({"score_bias": 1.0}, TypeError, "`score_bias` must be a tensor"),
    "integer score_bias": ({"score_bias": torch.zeros(5).long()}, TypeError, "`score_bias` must be floating"),
    "shape of score_bias": ({"score_bias": torch.zeros(2, 3)}, ValueError, r"shape \(5,\) or \(2, 5\); got"),
    "device of score_bias": (
        {"score_bias": torch.zeros(5, device="meta")},
        ValueError,
        "`score_bias` must be on",
    ),
}


@pytest.mark.parametrize("attention", [softmax_attention, sigmoid_attention])
@pytest.mark.parametrize("case", SHARED)
def test_bad_argument(attention, case: str) -> None:
    change, error, message = SHARED[case]
    with pytest.raises(error, match=message):
        attention(**{**good(), **change})


@pytest.mark.parametrize("case", SIGMOID)
def test_bad_sigmoid_argument(case: str) -> None:
    change, error, message = SIGMOID[case]
    with pytest.raises(error, match=message):
        sigmoid_attention(**{**good(), **change})


def test_good_arguments_pass() -> None:
    for attention in (softmax_attention, sigmoid_attention):
        assert attention(**good()).shape == (BATCH, HEADS, TOKENS_Q, 6)


def test_mechanism_must_be_known() -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match='must be "softmax" or "sigmoid"; got \'linear\''):
        logit_terms(AttentionCall("linear", x, x))


@pytest.mark.parametrize("extra", [{"bias": 0.0}, {"score_bias": torch.zeros(2)}])
def test_softmax_takes_no_sigmoid_bias(extra: dict) -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="belongs to sigmoid attention"):
        logit_terms(AttentionCall("softmax", x, x, **extra))


def test_lengths_in_a_list_do_not_follow_the_default_device() -> None:
    arguments = good()
    with torch.device("meta"):
        output = sigmoid_attention(**arguments, key_lengths=[1, 5])
        with pytest.raises(ValueError, match="`key_lengths` must lie within 0 and 5 tokens"):
            sigmoid_attention(**arguments, key_lengths=[1, 6])
    assert output.device.type == "cpu"


@pytest.mark.gpu
def test_lengths_on_a_device_are_clamped_instead_of_checked() -> None:
    x = torch.randn(2, 1, 4, 8, device="cuda")
    torch.testing.assert_close(
        sigmoid_attention(x, x, x, key_lengths=torch.tensor([9, -1], device="cuda")),
        sigmoid_attention(x, x, x, key_lengths=[4, 0]),
    )

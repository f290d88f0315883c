"""The reference against closed values, torch's own attention, truncation, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import scaled_dot_product_attention

from stability.attention import sigmoid_attention, softmax_attention
from stability.testing import assert_within_error_budget

BOTH = pytest.mark.parametrize("attention", [softmax_attention, sigmoid_attention])


def inputs(
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 4,
    tokens_q: int = 7,
    tokens_k: int = 5,
    head_dim: int = 8,
    value_dim: int = 6,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(batch, heads, tokens_q, head_dim, dtype=dtype),
        torch.randn(batch, key_heads, tokens_k, head_dim, dtype=dtype),
        torch.randn(batch, key_heads, tokens_k, value_dim, dtype=dtype),
    )


def dense_sigmoid(query: Tensor, key: Tensor, value: Tensor, bias: float) -> Tensor:
    return torch.sigmoid(query @ key.mT / math.sqrt(query.shape[-1]) + bias) @ value


# ---- closed values


def test_equal_logits_average_the_values() -> None:
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 4, 4)
    value = torch.tensor([1.0, 2.0, 3.0, 6.0]).view(1, 1, 4, 1)
    torch.testing.assert_close(softmax_attention(query, key, value), torch.full((1, 1, 2, 1), 3.0))
    # σ(−ln n) = 1/(1 + n)
    torch.testing.assert_close(sigmoid_attention(query, key, value), torch.full((1, 1, 2, 1), 12 / 5))
    torch.testing.assert_close(sigmoid_attention(query, key, value, bias=0.0), torch.full((1, 1, 2, 1), 6.0))


def test_sigmoid_default_bias_is_that_of_each_sequence_also_under_causal_order() -> None:
    zeros = torch.zeros(3, 1, 4, 2, dtype=torch.float64)
    value = torch.ones(3, 1, 4, 1, dtype=torch.float64)
    output = sigmoid_attention(zeros, zeros, value, key_lengths=[4, 2, 0], is_causal=True)
    expected = torch.tensor([[1 / 5, 2 / 5, 3 / 5, 4 / 5], [1 / 3, 2 / 3, 2 / 3, 2 / 3], [0, 0, 0, 0]])
    torch.testing.assert_close(output.squeeze(), expected.double())


def test_score_bias_adds_to_each_key() -> None:
    query, key, value = inputs(batch=2, tokens_k=3)
    score_bias = torch.randn(2, 3, dtype=torch.float64)
    logits = query @ key.mT / math.sqrt(8) + score_bias[:, None, None] - math.log(3)
    torch.testing.assert_close(
        sigmoid_attention(query, key, value, score_bias=score_bias), logits.sigmoid() @ value
    )
    shared = sigmoid_attention(query, key, value, score_bias=score_bias[0])
    torch.testing.assert_close(
        shared, sigmoid_attention(query, key, value, score_bias=score_bias[:1].expand(2, 3))
    )


@pytest.mark.parametrize("shape", [(), (4,), (2, 4)])
def test_bias_per_head_and_sequence(shape: tuple[int, ...]) -> None:
    query, key, value = inputs()
    bias = torch.randn(shape, dtype=torch.float64)
    logits = query @ key.mT / math.sqrt(8) + bias[..., None, None]
    torch.testing.assert_close(sigmoid_attention(query, key, value, bias=bias), logits.sigmoid() @ value)


# ---- against torch


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"scale": -2},
        {"attn_mask": torch.rand(2, 4, 7, 5) > 0.3},
        {"attn_mask": torch.rand(7, 5) > 0.3},
        {"attn_mask": torch.arange(5).expand(2, 1, 1, 5) < torch.tensor([2, 5]).view(2, 1, 1, 1)},
        {"attn_mask": torch.randn(2, 1, 7, 5, dtype=torch.float64)},
        {
            "attn_mask": torch.randn(1, 4, 7, 5, dtype=torch.float64).log()
        },  # about half of it NaN → −inf below
    ],
    ids=lambda arguments: ",".join(arguments) or "plain",
)
def test_softmax_equals_torch(arguments: dict, dtype: torch.dtype) -> None:
    query, key, value = inputs(dtype=dtype)
    if (mask := arguments.get("attn_mask")) is not None and mask.is_floating_point():
        arguments = {"attn_mask": mask.nan_to_num(nan=-math.inf).to(dtype)}
    torch.testing.assert_close(
        softmax_attention(query, key, value, **arguments),
        scaled_dot_product_attention(query, key, value, **arguments),
        rtol=1e-12 if dtype is torch.float64 else 1e-5,
        atol=1e-14 if dtype is torch.float64 else 1e-6,
    )


@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries_equal_torch(key_heads: int) -> None:
    query, key, value = inputs(key_heads=key_heads)
    torch.testing.assert_close(
        softmax_attention(query, key, value, enable_gqa=True),
        scaled_dot_product_attention(query, key, value, enable_gqa=True),
    )
    repeats = 4 // key_heads
    torch.testing.assert_close(
        sigmoid_attention(query, key, value, enable_gqa=True),
        dense_sigmoid(
            query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), -math.log(5)
        ),
    )


def test_causal_order_and_mask_combine() -> None:
    query, key, value = inputs()
    mask = torch.rand(7, 5) > 0.3
    both = mask & torch.ones(7, 5).tril().bool()
    torch.testing.assert_close(
        softmax_attention(query, key, value, attn_mask=mask, is_causal=True),
        scaled_dot_product_attention(query, key, value, attn_mask=both),
    )


def test_dropout_keeps_the_mean_and_honours_zero() -> None:
    query = torch.zeros(1, 1, 64, 2)
    value = torch.ones(1, 1, 64, 1)
    for attention, expected in ((softmax_attention, 1.0), (sigmoid_attention, 64 / 65)):
        output = attention(query, query, value, dropout_p=0.5)
        assert output.std() > 0.01
        assert output.mean().item() == pytest.approx(expected, abs=0.1)


# ---- padding


@BOTH
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_equals_truncation(attention: Callable[..., Tensor], is_causal: bool) -> None:
    query, key, value = inputs(batch=4, tokens_q=6)
    key_lengths, query_lengths = [5, 3, 1, 0], [2, 6, 0, 3]
    output = attention(
        query, key, value, key_lengths=key_lengths, query_lengths=query_lengths, is_causal=is_causal
    )
    for b, (k, q) in enumerate(zip(key_lengths, query_lengths, strict=True)):
        if k and q:
            alone = attention(
                query[b:, :, :q][:1], key[b:, :, :k][:1], value[b:, :, :k][:1], is_causal=is_causal
            )
            torch.testing.assert_close(output[b, :, :q], alone[0], rtol=1e-13, atol=1e-14)
        assert (output[b, :, q if k else 0 :] == 0).all()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_garbage_in_padding_never_leaks(
    attention: Callable[..., Tensor], dtype: torch.dtype, garbage: float
) -> None:
    """Padded keys, values, query rows, masks and upstream gradients: bitwise the same as zeros there."""
    clean = [t.requires_grad_() for t in inputs(tokens_q=5, dtype=dtype)]
    mask = torch.randn(2, 1, 5, 5)
    upstream = torch.randn(2, 4, 5, 6).to(dtype)
    key_lengths, query_lengths = torch.tensor([3, 5]), torch.tensor([4, 0])
    query_padding = torch.arange(5) >= query_lengths[:, None]
    key_padding = torch.arange(5) >= key_lengths[:, None]
    mask_padding = (query_padding[:, :, None] | key_padding[:, None, :])[:, None]

    def run(fill: float) -> list[Tensor]:
        paddings = (query_padding, key_padding, key_padding)
        leaves = [
            t.detach().masked_fill(p[:, None, :, None], fill).requires_grad_()
            for t, p in zip(clean, paddings, strict=True)
        ]
        leaves.append(mask.masked_fill(mask_padding, fill).requires_grad_())
        score_bias = torch.linspace(-1, 1, 10).view(2, 5).masked_fill(key_padding, fill).requires_grad_()
        extra = {"score_bias": score_bias} if attention is sigmoid_attention else {}
        output = attention(
            *leaves[:3], attn_mask=leaves[3], key_lengths=key_lengths, query_lengths=query_lengths, **extra
        )
        gradient = upstream.masked_fill(query_padding[:, None, :, None], fill)
        leaves += extra.values()
        return [output, *torch.autograd.grad(output, leaves, gradient)]

    results = run(garbage)
    for result, expected in zip(results, run(0.0), strict=True):
        assert torch.equal(result, expected)
    output, query_grad, key_grad, value_grad, mask_grad, *_ = results
    assert (output.mT[query_padding[:, None, None].expand_as(output.mT)] == 0).all()
    for grad, padding in ((query_grad, query_padding), (key_grad, key_padding), (value_grad, key_padding)):
        assert (grad[padding[:, None].expand(grad.shape[:3])] == 0).all()
    assert (mask_grad[mask_padding] == 0).all()


def test_nan_in_a_valid_key_is_not_hidden() -> None:
    query, key, value = inputs()
    key[0, 0, 1] = math.nan
    for attention in (softmax_attention, sigmoid_attention):
        output = attention(query, key, value, key_lengths=[3, 5])
        assert output[0, 0].isnan().all()
        assert output[1].isfinite().all()


@BOTH
def test_row_without_allowed_key_is_zero_with_zero_gradient(attention: Callable[..., Tensor]) -> None:
    leaves = [t.requires_grad_() for t in inputs()]
    for mask in (torch.ones(7, 5).bool(), torch.zeros(7, 5)):
        mask[2] = False if mask.dtype is torch.bool else -math.inf
        output = attention(*leaves, attn_mask=mask)
        assert (output[:, :, 2] == 0).all()
        gradients = torch.autograd.grad(output.sum(), leaves)
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert (gradients[0][:, :, 2] == 0).all()


def test_key_lengths_alone_leave_all_query_rows_valid() -> None:
    query, key, value = inputs(tokens_q=5)
    assert (softmax_attention(query, key, value, key_lengths=[2, 2])[:, :, 4] != 0).all()


@pytest.mark.parametrize("make", [list, tuple, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_lengths_may_be_sequences_or_any_integer_tensor(make: Callable) -> None:
    query, key, value = inputs()
    torch.testing.assert_close(
        softmax_attention(query, key, value, key_lengths=make([1, 4])),
        softmax_attention(query, key, value, key_lengths=torch.tensor([1, 4])),
    )


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    is_causal=st.booleans(),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 2**16),
)
def test_shift_and_permutation(lengths: list[int], is_causal: bool, shift: float, seed: int) -> None:
    """A shift of the logits is nothing to softmax and a bias to sigmoid; the order of keys is free."""
    torch.manual_seed(seed)
    query, key, value = inputs(batch=len(lengths), tokens_q=6, tokens_k=6)
    lengths_of = {"key_lengths": lengths, "query_lengths": lengths}
    mask = torch.full((6, 6), shift, dtype=torch.float64)
    softmax = softmax_attention(query, key, value, is_causal=is_causal, **lengths_of)
    shifted = softmax_attention(query, key, value, attn_mask=mask, is_causal=is_causal, **lengths_of)
    torch.testing.assert_close(softmax, shifted, rtol=1e-9, atol=1e-12)
    sigmoid = sigmoid_attention(query, key, value, bias=-1.0, is_causal=is_causal, **lengths_of)
    shifted = sigmoid_attention(
        query, key, value, bias=-1.0 - shift, attn_mask=mask, is_causal=is_causal, **lengths_of
    )
    torch.testing.assert_close(sigmoid, shifted, rtol=1e-9, atol=1e-12)
    order = torch.randperm(6)
    for attention in (softmax_attention, sigmoid_attention):
        torch.testing.assert_close(
            attention(query, key, value), attention(query, key[:, :, order], value[:, :, order])
        )


# ---- derivatives

BOOLEAN_MASK = torch.tensor([[True, False, True, True], [False] * 4, [True, True, False, True]])
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "lengths": {"key_lengths": [4, 0], "query_lengths": [2, 3]},
    "lengths, causal": {"key_lengths": [2, 3], "query_lengths": [3, 1], "is_causal": True},
    "grouped": {"enable_gqa": True, "scale": 0.7},
    "boolean mask": {"attn_mask": BOOLEAN_MASK},
    "everything": {
        "attn_mask": BOOLEAN_MASK,
        "is_causal": True,
        "enable_gqa": True,
        "key_lengths": [3, 4],
        "query_lengths": [3, 2],
    },
}


def leaves_of(arguments: dict) -> list[Tensor]:
    tensors = inputs(2, 2, 1 if arguments.get("enable_gqa") else 2, 3, 4, 2, 2)
    return [t.requires_grad_() for t in tensors]


def check(function: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    assert gradcheck(function, leaves, check_forward_ad=True)
    assert gradgradcheck(function, leaves)


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_first_and_second_derivatives(attention: Callable[..., Tensor], case: str) -> None:
    arguments = CASES[case]
    check(lambda *tensors: attention(*tensors, **arguments), leaves_of(arguments))


@BOTH
def test_derivatives_of_a_float_mask(attention: Callable[..., Tensor]) -> None:
    mask = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    is_excluded = torch.zeros(2, 1, 3, 4, dtype=torch.bool)
    is_excluded[0, 0, 1, 2] = True
    check(
        lambda m, *tensors: attention(*tensors, attn_mask=m.masked_fill(is_excluded, -math.inf)),
        [mask, *leaves_of({})],
    )


@pytest.mark.parametrize("bias_shape", [(), (2,), (2, 2)])
def test_derivatives_of_bias_and_score_bias(bias_shape: tuple[int, ...]) -> None:
    bias = torch.randn(bias_shape, dtype=torch.float64, requires_grad=True)
    score_bias = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    lengths = {"key_lengths": [3, 4], "query_lengths": [3, 2]}
    check(
        lambda b, s, *tensors: sigmoid_attention(*tensors, bias=b, score_bias=s, **lengths),
        [bias, score_bias, *leaves_of({})],
    )


# ---- precision and memory


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_float32_weights_allow(
    attention: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """Forward and backward, against float32 arithmetic whose result is rounded once."""
    tensors = inputs(tokens_q=63, tokens_k=111, head_dim=16, value_dim=16, dtype=dtype)
    upstream = torch.randn(2, 4, 63, 16).to(dtype)

    def with_gradients(compute: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors[:3]]
        output = compute(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, tensors[3])

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = query @ key.mT / math.sqrt(16)
        if attention is softmax_attention:
            return logits.softmax(-1) @ value
        return torch.sigmoid(logits - math.log(111)) @ value

    actual = with_gradients(attention, *tensors, upstream)
    assert all(result.dtype is dtype for result in actual)
    assert_within_error_budget(actual, lambda *t: with_gradients(plain, *t), [*tensors, upstream], factor=1.5)


@BOTH
def test_half_precision_supports_forward_mode_and_double_backward(attention: Callable[..., Tensor]) -> None:
    tensors = inputs(tokens_q=5)
    tangents = inputs(tokens_q=5)

    def second(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query.requires_grad_()
        (first,) = torch.autograd.grad(attention(query, key, value).square().sum(), query, create_graph=True)
        return torch.autograd.grad(first.square().sum(), query)[0]

    def tangent(*tensors: Tensor) -> Tensor:
        return torch.func.jvp(attention, tensors[:3], tensors[3:])[1]

    for function, arguments in ((second, tensors), (tangent, (*tensors, *tangents))):
        expected = function(*(t.detach() for t in arguments))
        actual = function(*(t.detach().bfloat16() for t in arguments)).double()
        assert (actual - expected).norm() < 0.03 * expected.norm()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_one_float32_weight_matrix_for_the_backward_pass(
    attention: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    tokens = 64
    leaves = [t.requires_grad_() for t in inputs(1, 2, 2, tokens, tokens, 4, 4, dtype)]
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = attention(*leaves, key_lengths=[tokens - 3], query_lengths=[tokens - 5])
    matrix = 2 * tokens * tokens * 4
    assert matrix <= sum(kept.values()) < 1.5 * matrix
    output.sum().backward()


@BOTH
def test_autocast_casts_the_inputs_and_keeps_float32_logits(attention: Callable[..., Tensor]) -> None:
    tensors = inputs(dtype=torch.float32)
    mask = torch.randn(7, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = attention(*tensors, attn_mask=mask)
        in_float64 = attention(*(t.double() for t in tensors), attn_mask=mask)
    assert torch.equal(output, attention(*(t.bfloat16() for t in tensors), attn_mask=mask))
    assert output.dtype is torch.bfloat16
    assert in_float64.dtype is torch.float64


@BOTH
def test_views_of_token_major_tensors_need_no_copy(attention: Callable[..., Tensor]) -> None:
    tensors = inputs()
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    torch.testing.assert_close(attention(*views), attention(*tensors))

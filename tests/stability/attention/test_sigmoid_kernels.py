"""The kernels of sigmoid attention against float64: here in Triton's interpreter, on a GPU compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stability import attention_statistics
from stability.attention import sigmoid_attention, sigmoid_attention_varlen
from stability.attention.call import AttentionCall
from stability.attention.dispatch import why_not_hopper
from stability.attention.operands import make_operands
from stability.attention.operator import _backward, _forward, attend
from stability.attention.validation import logit_terms
from stability.testing import assert_within_error_budget
from tests.stability.attention.sigmoid_calls import (
    DEVICE,
    DTYPES,
    INPUTS,
    IS_INTERPRETED,
    SHAPES,
    attend_and_differentiate,
    make_inputs,
)

pytest.importorskip("triton", reason="Triton is not installed")

compares = pytest.mark.skipif(
    not IS_INTERPRETED and DEVICE == "cpu", reason="run by test_in_the_interpreter, or on a CUDA device"
)
IMPLEMENTATIONS = ["triton"]
if DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0):
    IMPLEMENTATIONS.append("hopper")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@pytest.mark.skipif(IS_INTERPRETED or DEVICE == "cuda", reason="the comparisons run in this process")
@pytest.mark.slow  # the interpreter takes a minute
def test_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


def skip_if_refused(implementation: str, inputs: dict[str, Tensor], is_causal: bool = False) -> None:
    if implementation != "hopper":
        return
    reason = why_not_hopper(
        inputs["query"], inputs["key"], inputs["value"], is_packed=False, needs_statistics=False,
        scale=1.0, bias=inputs["bias"], score_bias=inputs["score_bias"], key_lengths=None, query_lengths=None,
        is_causal=is_causal, is_fast=False,
    )  # fmt: skip
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=[False, True], ids=["", "deterministic"])
def is_deterministic(request: pytest.FixtureRequest):
    """Deterministic mode also fills what torch allocates with NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@compares
@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_as_accurate_as_the_reference(
    implementation: str, shape: str, dtype: torch.dtype, is_deterministic: bool
) -> None:
    inputs = make_inputs(shape, dtype)
    skip_if_refused(implementation, inputs, SHAPES[shape][6].get("is_causal", False))
    assert_within_error_budget(
        attend_and_differentiate(shape, implementation, *inputs.values()),
        partial(attend_and_differentiate, shape, "reference"),
        list(inputs.values()),
        factor=4.0,  # the gradient of the bias is one sum over all tokens, in another order
    )


@compares
@each_implementation
@pytest.mark.parametrize("shape", [name for name in SHAPES if "query_lengths" in SHAPES[name][6]])
def test_padding_is_zero_whatever_it_holds(implementation: str, shape: str, is_deterministic: bool) -> None:
    inputs = make_inputs(shape, DTYPES[-1])  # NaN in every padding
    skip_if_refused(implementation, inputs, SHAPES[shape][6].get("is_causal", False))
    output, dq, dk, dv, _, d_score_bias = attend_and_differentiate(shape, implementation, *inputs.values())
    arguments = SHAPES[shape][6]
    for i, length in enumerate(arguments["query_lengths"]):
        assert not output[i, :, length:].any()
        assert not dq[i, :, length:].any()
    for i, length in enumerate(arguments["key_lengths"]):
        assert not dk[i, :, length:].any()
        assert not dv[i, :, length:].any()
        assert not d_score_bias[i, length:].any()


@compares
@each_implementation
def test_repeated_runs_give_the_same_bits(implementation: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        shape = "padded, causal, head dim 64" if DEVICE == "cuda" else "padded, causal"
        inputs = make_inputs(shape, DTYPES[-1])
        skip_if_refused(implementation, inputs, is_causal=True)
        first = attend_and_differentiate(shape, implementation, *inputs.values())
        for _ in range(2 if IS_INTERPRETED else 50):
            again = attend_and_differentiate(shape, implementation, *inputs.values())
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def row_sums_of_single_keys(x: Tensor, dtype: torch.dtype, *, is_fast: bool) -> Tensor:
    """σ(x) as the portable kernel computes it, unrounded: the row sum of rows with one key."""
    zeros = torch.zeros(x.shape[0], 1, 1, 16, dtype=dtype, device=DEVICE)
    call = AttentionCall("sigmoid", zeros, zeros, bias=0.0, score_bias=x[:, None])
    operands = make_operands(zeros, zeros, zeros, logit_terms(call))
    _, row_sum, _ = attend(
        operands, scale=1.0, is_causal=False, is_fast=is_fast, implementation="triton", needs_statistics=True
    )
    return row_sum.flatten()


@compares
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sigmoid_is_accurate_where_it_is_small(dtype: torch.dtype) -> None:
    x = torch.linspace(-20, 20, 257 if IS_INTERPRETED else 60001, device=DEVICE)
    exact = x.double().sigmoid()
    error = (row_sums_of_single_keys(x, dtype, is_fast=False).double() / exact - 1).abs().max()
    assert error <= (2e-6 if dtype is torch.float32 else 2.5e-4)


@compares
@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter has no tanh.approx")
@pytest.mark.gpu
def test_the_fast_sigmoid_is_what_its_label_says() -> None:
    x = torch.linspace(-9, 0, 60001, device=DEVICE)
    error = (
        row_sums_of_single_keys(x, torch.bfloat16, is_fast=True).double() / x.double().sigmoid() - 1
    ).abs()
    assert 1e-3 < error.max() < 2e-2


@compares
@pytest.mark.parametrize("infinity", [-torch.inf, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_score_bias_decides_a_key(dtype: torch.dtype, infinity: float) -> None:
    inputs = make_inputs("odd", dtype)
    inputs["score_bias"][:, 5] = infinity
    results = attend_and_differentiate("odd", "triton", *inputs.values())
    assert all(result.isfinite().all() for result in results)
    exact = attend_and_differentiate("odd", "reference", *inputs.values())
    torch.testing.assert_close(results[0], exact[0], rtol=1e-2, atol=1e-2)


@compares
@pytest.mark.parametrize("shape", ["odd", "padded, causal", "grouped"])
def test_statistics_are_those_of_the_rows(shape: str, is_deterministic: bool) -> None:
    inputs = make_inputs(shape, torch.float32)
    call = AttentionCall(
        "sigmoid", *(inputs[name] for name in ("query", "key")), bias=inputs["bias"],
        score_bias=inputs["score_bias"], **SHAPES[shape][6],
    )  # fmt: skip
    terms = logit_terms(call)
    _, row_sum, derivative_max = attend(
        make_operands(call.query, call.key, inputs["value"], terms),
        scale=terms.scale,
        is_causal=terms.is_causal,
        is_fast=False,
        implementation="triton",
        needs_statistics=True,
    )
    expected = attention_statistics(**vars(call))
    torch.testing.assert_close(row_sum, expected.row_sum, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(derivative_max, expected.derivative_max, rtol=1e-5, atol=1e-7)


@compares
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_are_computed_one_by_one(dtype: torch.dtype, is_causal: bool) -> None:
    lengths_q, lengths_k = [5, 70, 0, 1], [66, 3, 4, 1]
    total_q, total_k, unused = sum(lengths_q), sum(lengths_k), 3
    query = torch.randn(total_q + unused, 4, 16).to(DEVICE, dtype)
    key, value = (torch.randn(total_k + unused, 2, 16).to(DEVICE, dtype) for _ in range(2))
    query[total_q:], key[total_k:], value[total_k:] = torch.nan, torch.nan, torch.nan
    score_bias = torch.randn(total_k + unused, device=DEVICE)
    bias = torch.randn(4, 4, device=DEVICE) - 2
    offsets_q, offsets_k = (
        torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32) for lengths in (lengths_q, lengths_k)
    )

    def packed(implementation: str) -> tuple[Tensor, ...]:
        leaves = [leaf.detach().requires_grad_() for leaf in (query, key, value, bias, score_bias)]
        output = sigmoid_attention_varlen(
            *leaves[:3], cu_seqlens_q=offsets_q, cu_seqlens_k=offsets_k, max_seqlen_q=70, max_seqlen_k=66,
            is_causal=is_causal, enable_gqa=True, bias=leaves[3], score_bias=leaves[4],
            implementation=implementation,
        )  # fmt: skip
        return output.detach(), *torch.autograd.grad(output[:total_q].sin().sum(), leaves)

    tolerance = 1e-5 if dtype is torch.float32 else 5e-3
    for actual, expected in zip(packed("triton"), packed("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert not packed("triton")[0][total_q:].any()


def operator_arguments() -> tuple[tuple[Tensor | None, ...], dict[str, object]]:
    inputs = make_inputs("odd", torch.float32)
    leaves = [inputs[name].detach().requires_grad_() for name in INPUTS[:5]]
    lengths = torch.tensor([111, 7], device=DEVICE)
    options = {
        "max_tokens_q": 63, "max_tokens_k": 111, "scale": 0.25, "is_causal": True, "is_fast": False,
        "implementation": "auto",
    }  # fmt: skip
    return (*leaves, lengths, None, None, None), options


@compares
@pytest.mark.parametrize("needs_statistics", [False, True])
def test_the_operator_passes_opcheck(needs_statistics: bool) -> None:
    tensors, options = operator_arguments()
    torch.library.opcheck(_forward, tensors, {**options, "needs_statistics": needs_statistics})


@compares
@pytest.mark.filterwarnings("ignore:Second derivatives")
def test_the_backward_operator_passes_opcheck() -> None:
    tensors, options = operator_arguments()
    needs = {"needs_bias_grad": True, "needs_score_bias_grad": False}
    grad_output = torch.randn_like(tensors[0])
    torch.library.opcheck(_backward, (grad_output, *tensors), {**options, **needs})


@compares
def test_second_derivatives_are_the_references_and_say_what_they_cost() -> None:
    from stability.attention.double_backward import _warn_of_the_cost

    _warn_of_the_cost.cache_clear()
    inputs = make_inputs("padded", torch.float32)
    inputs = {name: inputs[name].nan_to_num() for name in INPUTS[:5]}

    def second(implementation: str) -> tuple[Tensor, ...]:
        leaves = [leaf.detach().requires_grad_() for leaf in inputs.values()]
        output = sigmoid_attention(
            *leaves[:3], bias=leaves[3], score_bias=leaves[4], implementation=implementation,
            **SHAPES["padded"][6],
        )  # fmt: skip
        first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

    with pytest.warns(UserWarning, match="Second derivatives .* tokens_q × tokens_k") as warned:
        actual = second("triton")
        second("triton")
    assert len([w for w in warned if "Second derivatives" in str(w.message)]) == 1
    for a, b in zip(actual, second("reference"), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@compares
@pytest.mark.filterwarnings("ignore:Second derivatives")
@pytest.mark.parametrize("wanted", [INPUTS[:5], ("query",), ("key", "score_bias")])
def test_third_derivatives_are_the_references(wanted: tuple[str, ...]) -> None:
    inputs = make_inputs("padded", torch.float32)
    inputs = {name: inputs[name].nan_to_num() for name in INPUTS[:5]}

    def third(implementation: str) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()]
        output = sigmoid_attention(
            *leaves[:3], bias=leaves[3], score_bias=leaves[4], implementation=implementation,
            **SHAPES["padded"][6],
        )  # fmt: skip
        leaves = [leaf for leaf in leaves if leaf.requires_grad]
        first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in second), leaves)

    for a, b in zip(third("triton"), third("reference"), strict=True):
        assert 0 < b.norm() < torch.inf
        assert (a - b).norm() <= 1e-4 * b.norm()


@compares
@pytest.mark.filterwarnings("ignore:Second derivatives")
def test_second_derivatives_are_mapped_over() -> None:
    query, key, value = (torch.randn(1, 2, 3, 16, device=DEVICE) for _ in range(3))
    actual, expected = (
        torch.autograd.functional.hessian(
            lambda query: sigmoid_attention(query, key, value, implementation=name).sin().sum(),  # noqa: B023
            query,
            vectorize=True,
        )
        for name in ("triton", "reference")
    )
    torch.testing.assert_close(actual, expected)


@compares
@each_implementation
def test_it_compiles_into_one_graph(implementation: str) -> None:
    dtype = DTYPES[-1] if DEVICE == "cuda" else torch.float32
    query = torch.randn(2, 4, 32, 64, device=DEVICE, dtype=dtype)
    key = torch.randn(2, 32, 2, 64, device=DEVICE, dtype=dtype).transpose(1, 2)  # memory in another order
    value = torch.randn(2, 2, 32, 64, device=DEVICE, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]

    def function(*leaves: Tensor) -> Tensor:
        output = sigmoid_attention(*leaves, is_causal=True, enable_gqa=True, implementation=implementation)
        return output.float().sin()

    torch._dynamo.reset()
    compiled = torch.compile(
        function, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager"
    )
    expected = torch.autograd.grad(function(*leaves).sum(), leaves)
    actual = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    torch.testing.assert_close(actual, expected)


@compares
@each_implementation
def test_where_derivatives_come_from(implementation: str) -> None:
    """Recomputed, cut off, or not wanted at all."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    leaves = [torch.randn(1, 2, 32, 64, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)]

    def attend(*leaves: Tensor) -> Tensor:
        return sigmoid_attention(*leaves, implementation=implementation)

    output = attend(*leaves)
    expected = torch.autograd.grad(output.sum(), leaves)
    recomputed = torch.utils.checkpoint.checkpoint(attend, *leaves, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed.sum(), leaves), expected)

    class CutOff(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> None:
            return None

    CutOff.apply(attend(*leaves)).sum().backward()
    assert all(leaf.grad is None for leaf in leaves)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            unrecorded = attend(*leaves)
        assert not unrecorded.requires_grad
        torch.testing.assert_close(unrecorded, output, rtol=0, atol=0)


@compares
@each_implementation
def test_autocast_casts_the_inputs(implementation: str) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    query, key, value = (torch.randn(1, 2, 32, 64, device=DEVICE, requires_grad=True) for _ in range(3))
    with torch.autocast(DEVICE, dtype=dtype):
        output = sigmoid_attention(query, key, value, implementation=implementation)
    assert output.dtype is dtype
    cast = sigmoid_attention(*(x.to(dtype) for x in (query, key, value)), implementation=implementation)
    torch.testing.assert_close(output, cast, rtol=0, atol=0)
    output.sum().backward()
    assert query.grad.dtype is torch.float32


@compares
def test_memory_keeps_the_order_of_axes_and_is_not_copied() -> None:
    query = torch.randn(2, 40, 3, 16, device=DEVICE).transpose(1, 2).requires_grad_()
    fused = torch.randn(2, 40, 2, 3, 16, device=DEVICE)
    key, value = fused.unbind(2)
    output = sigmoid_attention(query, key.transpose(1, 2), value.transpose(1, 2), implementation="triton")
    assert output.transpose(1, 2).is_contiguous()
    expected = sigmoid_attention(
        query, key.transpose(1, 2), value.transpose(1, 2), implementation="reference"
    )
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(output.sum(), query)  # the gradient of a sum has strides of zero
    (expected_grad,) = torch.autograd.grad(expected.sum(), query)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)

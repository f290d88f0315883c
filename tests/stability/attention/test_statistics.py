"""Row statistics against the dense Jacobian in float64, whatever excludes keys and however rows collapse."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import stability.attention.moments
from stability.attention import AttentionCall, observe, sigmoid_attention
from stability.attention.statistics import attention_statistics
from tests.stability.attention.dense_attention_rows import (
    BATCH,
    FIELDS,
    HEADS,
    TOKENS_K,
    TOKENS_Q,
    assert_matches,
    make,
)

# Drawn at import, from a seed of its own: what else is imported before would change torch's own generator.
_DRAWN = torch.Generator().manual_seed(0)

CASES = {
    "plain": {},
    "scale": {"scale": 2.0},
    "causal": {"is_causal": True},
    "padded": {"key_lengths": [9, 3], "query_lengths": [4, 7]},
    "empty sequence": {"key_lengths": [0, 5], "query_lengths": [7, 0]},
    "padded, causal": {"key_lengths": [9, 3], "query_lengths": [7, 2], "is_causal": True},
    "boolean mask": {"attn_mask": torch.rand(1, HEADS, TOKENS_Q, TOKENS_K, generator=_DRAWN) > 0.6},
    "key padding mask": {"attn_mask": (torch.arange(9) < torch.tensor([[9], [4]]))[:, None, None]},
    "float mask": {
        "attn_mask": torch.randn(2, 1, TOKENS_Q, TOKENS_K, generator=_DRAWN).masked_fill(
            torch.rand(7, 9, generator=_DRAWN) > 0.7, -math.inf
        )
    },
    "grouped": {"enable_gqa": True},
}
SIGMOID_CASES = {
    "bias": {"bias": -1.5},
    "bias per head": {"bias": torch.tensor([-3.0, 0.0, 1.0, 7.0])},
    "score_bias": {"score_bias": torch.randn(BATCH, TOKENS_K, generator=_DRAWN), "key_lengths": [9, 6]},
}


@pytest.mark.parametrize("rows", [None, 5], ids=["all rows", "sampled"])
@pytest.mark.parametrize("sharpness", [1.0, 30.0], ids=["spread", "collapsed"])
@pytest.mark.parametrize(
    ("mechanism", "case"),
    [(mechanism, case) for mechanism in ("softmax", "sigmoid") for case in CASES]
    + [("sigmoid", case) for case in SIGMOID_CASES],
)
def test_equals_dense_float64(mechanism: str, case: str, sharpness: float, rows: int | None) -> None:
    extra = {**CASES, **SIGMOID_CASES}[case]
    arguments = {**make(sharpness=sharpness, key_heads=2 if "enable_gqa" in extra else HEADS), **extra}
    # Float32 logits alone cost a relative max|logit| · 2⁻²⁴; the bar of the project is 1e-6 · max|logit|.
    largest = sharpness * extra.get("scale", 1.0) * 12
    assert_matches(
        attention_statistics(**arguments, mechanism=mechanism, rows=rows, exact_spectral=True),
        arguments,
        rtol=1e-5 + 1e-6 * largest,
    )


@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
@pytest.mark.parametrize("exact_spectral", [False, True])
def test_float64_inputs_give_float64_statistics(mechanism: str, exact_spectral: bool) -> None:
    arguments = {**make(torch.float64), "key_lengths": [9, 4]}
    statistics = attention_statistics(**arguments, mechanism=mechanism, exact_spectral=exact_spectral)
    assert statistics.entropy.dtype is torch.float64
    assert_matches(statistics, arguments, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
def test_half_inputs_are_measured_in_float32_also_under_autocast(mechanism: str, dtype: torch.dtype) -> None:
    arguments = make(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        statistics = attention_statistics(**arguments, mechanism=mechanism, exact_spectral=True)
    assert statistics.entropy.dtype is torch.float32
    assert_matches(statistics, arguments, rtol=2e-5)


@pytest.mark.gpu
def test_tf32_does_not_reach_the_logits() -> None:
    arguments = make(sharpness=10.0)
    expected = attention_statistics(**arguments, mechanism="softmax")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        on_device = {name: tensor.cuda() for name, tensor in arguments.items()}
        actual = attention_statistics(**on_device, mechanism="softmax")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)
    torch.testing.assert_close(actual.max_logit.cpu(), expected.max_logit, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
def test_one_hot_rows_keep_their_smallest_numbers(mechanism: str) -> None:
    """At a logit gap of 40, p₁ = 1 − 4e-18: every textbook formula returns zero here."""
    query = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    key = torch.tensor([[20.0, 0.0], [-20.0, 0.0]]).view(1, 1, 2, 2)
    small = math.exp(-40.0) if mechanism == "softmax" else math.exp(-20.0)
    statistics = attention_statistics(
        query, key, mechanism=mechanism, scale=1.0, **({"bias": 0.0} if mechanism == "sigmoid" else {})
    )
    factor = 1 if mechanism == "softmax" else 2
    assert statistics.trace.item() == pytest.approx(2 * small, rel=1e-5)
    assert statistics.derivative_max.item() == pytest.approx(small, rel=1e-5)
    assert statistics.jacobian_frobenius.item() == pytest.approx(
        (2 if factor == 1 else 2**0.5) * small, rel=1e-5
    )
    assert 0 < statistics.entropy.item() < 1e-7


@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
def test_derivatives_below_the_root_of_the_smallest_float_survive(mechanism: str) -> None:
    query = torch.ones(1, 1, 1, 1)
    key = torch.tensor([30.0, -30.0]).view(1, 1, 2, 1)
    extra = {"bias": 60.0} if mechanism == "sigmoid" else {}
    statistics = attention_statistics(query, key, mechanism=mechanism, scale=1.0, **extra)
    assert statistics.jacobian_frobenius.item() > 0


def test_nan_reaches_the_statistics_and_their_summary() -> None:
    for mechanism in ("softmax", "sigmoid"):
        arguments = make()
        arguments["query"][0, 1, 2] = math.nan
        statistics = attention_statistics(**arguments, mechanism=mechanism)
        assert statistics.valid.all()
        assert statistics.max_logit[0, 1, 2].isnan()
        assert statistics.entropy[0, 1, 2].isnan()
        summary = statistics.summarize()
        assert summary["max_logit"].value.isnan()
        assert summary["jacobian_frobenius"].value.isnan()
        assert summary["jacobian_frobenius"].per_head[0].isfinite()


def test_garbage_in_padding_changes_nothing() -> None:
    lengths = {"key_lengths": [9, 3], "query_lengths": [7, 2]}
    arguments = make()
    soiled = {name: tensor.clone() for name, tensor in arguments.items()}
    soiled["key"][1, :, 3:] = math.nan
    soiled["query"][1, :, 2:] = math.inf
    for mechanism in ("softmax", "sigmoid"):
        clean = attention_statistics(**arguments, **lengths, mechanism=mechanism)
        dirty = attention_statistics(**soiled, **lengths, mechanism=mechanism)
        for name in FIELDS:
            if (expected := getattr(clean, name)) is not None:
                assert torch.equal(getattr(dirty, name), expected)


def test_given_rows_are_measured_in_their_order() -> None:
    arguments = {**make(), "is_causal": True}
    for rows in (torch.tensor([6, 0, 3]), torch.tensor([[6, 0, 3], [1, 1, 2]])):
        statistics = attention_statistics(**arguments, mechanism="softmax", rows=rows)
        assert torch.equal(statistics.rows, rows.expand(BATCH, 3))
        assert statistics.coverage == "given"
        assert_matches(statistics, arguments, rtol=2e-5)


def test_chunks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {
        **make(),
        "is_causal": True,
        "attn_mask": torch.rand(2, 1, 7, 9) > 0.2,
        "key_lengths": [9, 5],
    }
    for mechanism in ("softmax", "sigmoid"):
        whole = attention_statistics(**arguments, mechanism=mechanism, exact_spectral=True)
        with monkeypatch.context() as patch:
            patch.setattr(stability.attention.moments, "_CHUNK_ELEMENTS", 2 * BATCH * HEADS * TOKENS_K)
            chunked = attention_statistics(**arguments, mechanism=mechanism, exact_spectral=True)
        for name in FIELDS:
            if (expected := getattr(whole, name)) is not None:
                torch.testing.assert_close(getattr(chunked, name), expected, rtol=1e-6, atol=0)


def test_memory_is_linear_in_the_tokens() -> None:
    """The largest tensor made on the way holds a chunk of rows, not tokens × tokens logits."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            output = function(*args, **(kwargs or {}))
            if isinstance(output, Tensor):
                largest = max(largest, output.untyped_storage().nbytes())
            return output

    tokens = 4096
    query = torch.randn(1, 1, tokens, 4)
    with Watch():
        attention_statistics(query, query, mechanism="sigmoid", rows=2048)
    assert largest <= 8 * stability.attention.moments._CHUNK_ELEMENTS < 8 * 2048 * tokens


@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
def test_no_graph_is_kept(mechanism: str) -> None:
    arguments = {name: tensor.requires_grad_() for name, tensor in make().items()}
    statistics = attention_statistics(**arguments, mechanism=mechanism)
    assert not statistics.jacobian_frobenius.requires_grad


@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rows", [None, 3])
def test_meta_tensors_pass_so_no_value_is_read(mechanism: str, rows: int | None) -> None:
    """A meta tensor raises whenever its values are asked for, as a synchronising read on CUDA would."""
    x = torch.zeros(2, 4, 6, 8, device="meta")
    lengths = torch.ones(2, dtype=torch.int64, device="meta")
    statistics = attention_statistics(
        x,
        x,
        mechanism=mechanism,
        rows=rows,
        key_lengths=lengths,
        query_lengths=lengths,
        is_causal=True,
        exact_spectral=True,
    )
    assert statistics.summarize()["entropy"].per_head.shape == (4,)


@pytest.mark.gpu
@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rows", [None, 16])
def test_cuda_equals_cpu_without_synchronisation(mechanism: str, rows: int | None) -> None:
    x = torch.randn(2, 4, 64, 16)
    arguments = {"mechanism": mechanism, "rows": rows, "is_causal": True, "key_lengths": [64, 20]}
    expected = attention_statistics(x, x, **arguments)
    on_device = x.cuda()
    attention_statistics(on_device, on_device, **arguments).summarize()  # first use may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = attention_statistics(on_device, on_device, **arguments)
        actual.summarize()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(actual.rows.cpu(), expected.rows)
    for name in FIELDS:
        if (values := getattr(expected, name)) is not None:
            torch.testing.assert_close(getattr(actual, name).cpu(), values, rtol=1e-5, atol=1e-15)


def test_an_observed_call_can_be_measured_as_it_is() -> None:
    query, key = make().values()
    seen: list[AttentionCall] = []
    with observe(seen.append):
        sigmoid_attention(query, key, key, is_causal=True, key_lengths=[9, 4], bias=-1.0)
    statistics = attention_statistics(**vars(seen[0]), rows=4)
    expected = attention_statistics(
        query, key, mechanism="sigmoid", is_causal=True, key_lengths=[9, 4], bias=-1.0, rows=4
    )
    assert torch.equal(statistics.row_sum, expected.row_sum)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 12),
    sharpness=st.sampled_from([0.0, 1.0, 100.0, 1e4]),
    is_causal=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_statistics_stay_within_their_ranges(
    tokens: int, sharpness: float, is_causal: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    query, key = sharpness * torch.randn(1, 2, tokens, 4), torch.randn(1, 2, tokens, 4)
    slack = 1 + 1e-6
    for mechanism in ("softmax", "sigmoid"):
        found = attention_statistics(
            query, key, mechanism=mechanism, is_causal=is_causal, exact_spectral=True
        )
        assert found.valid.all()
        assert (found.derivative_max <= 0.25 * slack).all()
        assert (found.jacobian_spectral <= (0.5 if mechanism == "softmax" else 0.25) * slack).all()
        assert (found.jacobian_spectral <= found.jacobian_frobenius * slack).all()
        assert (found.jacobian_frobenius <= found.trace * slack).all()
        assert ((found.off_diagonal_share >= 0) & (found.off_diagonal_share < 1)).all()
        assert ((found.entropy >= 0) & (found.entropy <= math.log(tokens) + 1e-5)).all()


def bad_call(**change: object) -> None:
    arguments = {**make(), "mechanism": "sigmoid", **change}
    attention_statistics(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mechanism": "linear"}, ValueError, "`mechanism` must be"),
        ({"mechanism": "softmax", "bias": 0.0}, ValueError, "belongs to sigmoid attention"),
        ({"query": torch.zeros(4, 7, 8)}, ValueError, "`query` must have shape"),
        ({"query": torch.zeros(2, 4, 0, 8)}, ValueError, "`query` must not be empty"),
        ({"key": torch.zeros(2, 3, 9, 8), "enable_gqa": True}, ValueError, "multiple of the key heads"),
        ({"key_lengths": [10, 9]}, ValueError, "`key_lengths` must lie within"),
        ({"bias": math.nan}, ValueError, "`bias` must be finite"),
        ({"rows": 0}, ValueError, "`rows` must be at least 1"),
        ({"rows": 2.5}, TypeError, "`rows` must be None, an integer or an integer tensor; got float"),
    ],
)
def test_bad_argument(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bad_call(**change)

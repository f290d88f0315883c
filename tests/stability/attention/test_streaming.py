"""The streaming kernel on a GPU at the sizes it is for: accuracy, memory, no waiting.

What is compiled anew (dtype, head_dim, masks, a token count off the multiples of 16) is shared between tests:
compiling takes longer than running.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stability.attention.statistics import AttentionStatistics, attention_statistics

pytestmark = pytest.mark.gpu

TOKENS = 8192
FIELDS = (
    "max_logit", "log_sum_exp", "entropy", "jacobian_frobenius", "jacobian_spectral", "off_diagonal_share",
    "trace", "derivative_max", "row_sum", "saturated_share",
)  # fmt: skip


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def assert_agrees(actual: AttentionStatistics, exact: AttentionStatistics, largest_logit: float) -> None:
    relative = 1e-5 + 1e-6 * largest_logit
    assert torch.equal(actual.valid, exact.valid)
    for name in FIELDS:
        value, truth = getattr(actual, name), getattr(exact, name)
        assert (value is None) == (truth is None), name
        if value is None:
            continue
        is_same = value.double() == truth  # −inf of rows without keys
        error = (value.double() - truth).abs()
        allowed = relative * truth.abs() + 1e-15
        if name in ("max_logit", "log_sum_exp"):
            allowed += 1e-6 * largest_logit  # a logit near 0 is the difference of products that are not
        is_close = is_same | (error <= allowed)
        if name == "saturated_share":  # a count: keys at the threshold fall on either side of it
            assert is_close.float().mean() > 0.99
            continue
        assert is_close.all(), (name, (error / allowed)[~is_same].max().item())


@pytest.mark.parametrize("scale", [1.0, 30.0, 3000.0], ids=["gentle", "sharp", "collapsed"])
@pytest.mark.parametrize(
    "arguments",
    [{"is_causal": True}, {"key_lengths": [TOKENS, 5000], "query_lengths": [TOKENS, 5000]}],
    ids=["causal", "padded"],
)
@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
def test_it_agrees_with_float64_at_8192_tokens(
    mechanism: str, arguments: dict[str, Any], scale: float
) -> None:
    query, key = random(2, 2, TOKENS, 64), random(2, 2, TOKENS, 64)
    arguments = {**arguments, "scale": scale / 8, "mechanism": mechanism}
    largest_logit = (query.norm(dim=-1).max() * key.norm(dim=-1).max()).item() * scale / 8
    actual = attention_statistics(query, key, **arguments)
    exact = attention_statistics(query.double(), key.double(), **arguments)  # float64 is never streamed
    assert_agrees(actual, exact, largest_logit)


@pytest.mark.parametrize("bias", [-150.0, -20.0, 0.0, 10.0], ids=["vanishing", "small", "even", "saturated"])
@pytest.mark.parametrize("scale", [1.0, 10.0], ids=["gentle", "sharp"])
def test_sigmoid_weights_of_every_size(bias: float, scale: float) -> None:
    query, key = random(1, 2, 1000, 64, dtype=torch.bfloat16), random(1, 2, 1000, 64, dtype=torch.bfloat16)
    arguments = {"mechanism": "sigmoid", "bias": bias, "scale": scale / 8}
    actual = attention_statistics(query, key, **arguments)
    exact = attention_statistics(query.double(), key.double(), **arguments)
    assert_agrees(actual, exact, abs(bias) + 40 * scale)


@pytest.mark.parametrize("scale", [10.0, 30.0, 100.0])
def test_sigmoid_rows_with_few_large_weights(scale: float) -> None:
    """The bias leaves a row no large weight, one or several, so its entropy is near 0 or moderate."""
    query, key = random(1, 2, 1000, 64, dtype=torch.bfloat16), random(1, 2, 1000, 64, dtype=torch.bfloat16)
    arguments = {"mechanism": "sigmoid", "bias": -3 * scale, "scale": scale / 8}
    actual = attention_statistics(query, key, **arguments)
    exact = attention_statistics(query.double(), key.double(), **arguments)
    assert (exact.entropy < 0.4).any()
    assert (exact.entropy > 0.6).any()
    assert_agrees(actual, exact, 40 * scale)


@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
def test_equal_keys_count_once_each(mechanism: str) -> None:
    """Ties of the largest logit: neighbours, within a tile of keys and across tiles."""
    query, key = random(1, 2, 1000, 64, dtype=torch.bfloat16), random(1, 2, 1000, 64, dtype=torch.bfloat16)
    key[:, :, 500:] = key[:, :, :500]
    key[:, :, 5] = key[:, :, 6]
    key[:, :, 10] = key[:, :, 11]
    actual = attention_statistics(query, key, mechanism=mechanism, scale=3.0)
    exact = attention_statistics(query.double(), key.double(), mechanism=mechanism, scale=3.0)
    assert_agrees(actual, exact, 3.0 * 150)


@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("tokens", "head_dim", "dtype"),
    [
        (1, 16, torch.bfloat16),
        (111, 40, torch.float16),
        (63, 128, torch.bfloat16),
        (63, 256, torch.float16),
        (63, 256, torch.float32),
    ],
)
def test_odd_shapes_and_dtypes(mechanism: str, tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    query, key = random(3, 4, tokens, head_dim, dtype=dtype), random(3, 2, tokens + 3, head_dim, dtype=dtype)
    actual = attention_statistics(query, key, mechanism=mechanism, enable_gqa=True)
    exact = attention_statistics(query.double(), key.double(), mechanism=mechanism, enable_gqa=True)
    assert_agrees(actual, exact, 8 * head_dim**0.5)


@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
def test_memory_is_linear_in_the_tokens(mechanism: str) -> None:
    query, key = random(1, 12, 16384, 64), random(1, 12, 16384, 64)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention_statistics(query, key, mechanism=mechanism, is_causal=True)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 64 * 2**20


@pytest.mark.parametrize("mechanism", ["softmax", "sigmoid"])
def test_nothing_waits_for_the_device(mechanism: str) -> None:
    query, key = random(2, 2, 96, 64), random(2, 2, 96, 64)
    lengths = torch.tensor([96, 30], device="cuda")
    attention_statistics(query, key, mechanism=mechanism, rows=16, key_lengths=lengths).summarize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_statistics(query, key, mechanism=mechanism, rows=16, key_lengths=lengths).summarize()
    finally:
        torch.cuda.set_sync_debug_mode("default")

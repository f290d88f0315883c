"""Statistics of attention rows by the streaming Triton kernel: one pass over the keys, O(tokens) memory.

The rule, in one place: the kernel is taken for CUDA tensors in float16, bfloat16 or float32 with head_dim up
to 256 where Triton is installed; everything else goes through the chunks of `stability.attention.moments`,
which give the same numbers.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from stability.attention.rows import SelectedRows
from stability.attention.validation import LogitTerms

MAX_HEAD_DIM = 256

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def can_stream(query: Tensor) -> bool:
    """Whether the kernel takes this query; the rule of the module's docstring."""
    return query.is_cuda and query.dtype in _DTYPES and query.shape[3] <= MAX_HEAD_DIM and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def stream_row_statistics(
    query: Tensor, key: Tensor, terms: LogitTerms, selected: SelectedRows, *, saturated_weight: float | None
) -> dict[str, Tensor]:
    """Runs the kernel.

    Args:
        query: [batch, heads, tokens_q, head_dim], any strides.
        key: [batch, key_value_heads, tokens_k, head_dim].
        terms: Checked masks, lengths, scale and biases.
        selected: Rows to measure; a row of weight 0 counts as a row without keys.
        saturated_weight: For sigmoid, the weight above which a key counts as saturated; None for softmax.

    Returns:
        The statistics of `AttentionStatistics` under their names, each [batch, heads, num_rows] in float32;
        for softmax `jacobian_spectral` is the upper bound.
    """
    from stability.attention.triton.row_statistics import (
        SIGMOID_QUANTITIES,
        SOFTMAX_QUANTITIES,
        row_statistics,
    )

    batch, heads, _, head_dim = query.shape
    tokens_k, num_rows = key.shape[2], selected.rows.shape[1]
    is_sigmoid = saturated_weight is not None
    names = SIGMOID_QUANTITIES if is_sigmoid else SOFTMAX_QUANTITIES
    output = query.new_empty((len(names), batch, heads, num_rows), dtype=torch.float32)
    mask, score_bias = terms.attn_mask, terms.score_bias
    mask_strides = (0, 0, 0, 0) if mask is None else _broadcasting_strides(mask)
    score_bias_strides = (0, 0, 0, 0) if score_bias is None else _broadcasting_strides(score_bias)
    bias = _bias(terms.bias, query.device)
    bias_strides = _broadcasting_strides(bias) if isinstance(bias, Tensor) else (0, 0)
    configuration = _configuration(query.dtype, head_dim, is_sigmoid)
    grid = (-(-num_rows // configuration["BLOCK_ROWS"]), batch * heads)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        row_statistics[grid](
            query, key, selected.rows, selected.weights,
            query if terms.key_lengths is None else terms.key_lengths,
            query if mask is None else mask,
            query if score_bias is None else score_bias,
            bias, output,
            num_rows, tokens_k, terms.scale, heads, heads // key.shape[1],
            *query.stride(), *key.stride(), *selected.rows.stride(), *selected.weights.stride(),
            *mask_strides,
            score_bias_strides[0], score_bias_strides[3], bias_strides[0], bias_strides[1], output.stride(0),
            HEAD_DIM=head_dim, IS_SIGMOID=is_sigmoid,
            IS_CAUSAL=terms.is_causal, HAS_KEY_LENGTHS=terms.key_lengths is not None,
            MASK=0 if mask is None else 1 if mask.dtype is torch.bool else 2,
            HAS_SCORE_BIAS=score_bias is not None,
            SCALE_FIRST=_scale_comes_first(terms),
            SATURATED=saturated_weight or 0.0, IS_BIAS_TENSOR=isinstance(bias, Tensor),
            BLOCK_D=max(16, 1 << (head_dim - 1).bit_length()),
            **configuration,
        )  # fmt: skip
    quantities = dict(zip(names, output.unbind(), strict=True))
    if is_sigmoid:
        quantities["jacobian_spectral"] = quantities["derivative_max"]  # J is diagonal
    return quantities


def _configuration(dtype: torch.dtype, head_dim: int, is_sigmoid: bool) -> dict[str, int]:
    """Rows and keys of a program and how it is compiled: the fastest of those tried (docs/results/).

    Float32 products run without tensor cores and need the registers.
    """
    if dtype is torch.float32:
        return {"BLOCK_ROWS": 32, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 2}
    if head_dim > 128:
        return {"BLOCK_ROWS": 64, "BLOCK_KEYS": 32, "num_warps": 4, "num_stages": 2}
    if is_sigmoid:  # four programs share a multiprocessor
        return {"BLOCK_ROWS": 64, "BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 128}
    return {"BLOCK_ROWS": 64, "BLOCK_KEYS": 128, "num_warps": 4, "num_stages": 3}


def _scale_comes_first(terms: LogitTerms) -> bool:
    """Whether something is added to the scaled products, or the scale is too odd to be kept for the end."""
    is_added = terms.score_bias is not None or (
        terms.attn_mask is not None and terms.attn_mask.dtype is not torch.bool
    )
    return is_added or not 1e-6 <= terms.scale <= 1e6


def _bias(bias: float | Tensor, device: torch.device) -> float | Tensor:
    """A number, which is a cheaper argument, or a float32 tensor that broadcasts to [batch, heads, 1, 1]."""
    if isinstance(bias, Tensor) and bias.device == device:
        return bias.to(torch.float32)[(None,) * (4 - bias.dim())]
    return float(bias)


def _broadcasting_strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))

"""Moments of attention rows by the streaming Triton kernel: one pass over the keys, O(tokens) memory.

The rule, in one place: the kernel is taken for CUDA tensors in float16, bfloat16 or float32 with head_dim up
to 256 where Triton is installed; everything else goes through the chunks of `stability.attention.moments`,
which give the same numbers.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from stability.attention.rows import SelectedRows
from stability.attention.validation import LogitTerms
from stability.row_moments import NEGATIVE_INFINITY, SoftmaxRowMoments

MAX_HEAD_DIM = 256
LN_2 = math.log(2.0)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def can_stream(query: Tensor) -> bool:
    """Whether the kernel takes this query; the rule of the module's docstring."""
    return (
        query.is_cuda
        and query.dtype in _DTYPES
        and query.shape[3] <= MAX_HEAD_DIM
        and importlib.util.find_spec("triton") is not None
    )


def stream_row_moments(
    query: Tensor, key: Tensor, terms: LogitTerms, selected: SelectedRows, *, saturated_weight: float | None
) -> tuple[SoftmaxRowMoments, list[Tensor]]:
    """Runs the kernel.

    Args:
        query: [batch, heads, tokens_q, head_dim], any strides.
        key: [batch, key_value_heads, tokens_k, head_dim].
        terms: Checked masks, lengths, scale and biases.
        selected: Rows to measure; a row of weight 0 counts as a row without keys.
        saturated_weight: For sigmoid, the weight above which a key counts as saturated; None for softmax.

    Returns:
        Moments of the softmax rows, for sigmoid of the weights divided by their sum; and for sigmoid the
        largest logit without bias, Σ s, the saturated share, max d, Σ d and √Σd². All [batch, heads, rows].
    """
    from stability.attention.triton import row_moments as kernel

    batch, heads, _, head_dim = query.shape
    tokens_k, num_rows = key.shape[2], selected.rows.shape[1]
    is_sigmoid = saturated_weight is not None
    num_fields = kernel.SIGMOID_FIELDS if is_sigmoid else kernel.SOFTMAX_FIELDS
    output = query.new_empty((num_fields, batch, heads, num_rows), dtype=torch.float32)
    mask = terms.attn_mask
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask_strides = tuple(
            0 if size == 1 else step for size, step in zip(mask.shape, mask.stride(), strict=True)
        )
    score_bias = terms.score_bias
    bias = torch.as_tensor(terms.bias, dtype=torch.float32)
    if bias.device != query.device:  # a number: filling a new tensor waits for nothing, copying one would
        bias = torch.full((), float(terms.bias), dtype=torch.float32, device=query.device)
    bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape).expand(batch, heads, 1, 1)
    block_rows, block_keys = _block_sizes(query.dtype, head_dim, is_sigmoid)
    grid = (-(-num_rows // block_rows), batch * heads)
    kernel.row_moments[grid](
        query, key, selected.rows.contiguous(), selected.weights.contiguous(),
        terms.key_lengths if terms.key_lengths is not None else query,
        mask if mask is not None else query,
        score_bias if score_bias is not None else query,
        bias, output,
        num_rows, tokens_k, terms.scale,
        *query.stride(), *key.stride(), *mask_strides,
        0 if score_bias is None or score_bias.shape[0] == 1 else score_bias.stride(0),
        0 if score_bias is None else score_bias.stride(3),
        bias.stride(0), bias.stride(1), output.stride(0),
        heads=heads, group=heads // key.shape[1], head_dim=head_dim,
        IS_SIGMOID=is_sigmoid, IS_CAUSAL=terms.is_causal, HAS_KEY_LENGTHS=terms.key_lengths is not None,
        MASK=0 if mask is None else 1 if mask.dtype is torch.bool else 2,
        HAS_SCORE_BIAS=score_bias is not None,
        SATURATED_WEIGHT=saturated_weight or 0.0,
        BLOCK_D=max(16, 1 << (head_dim - 1).bit_length()), BLOCK_ROWS=block_rows, BLOCK_KEYS=block_keys,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return _moments(*output[:7]), list(output[7:])


def _block_sizes(dtype: torch.dtype, head_dim: int, is_sigmoid: bool) -> tuple[int, int]:
    """Rows and keys a program holds: the fastest of those tried on an H100 (docs/results/).

    Float32 products run without tensor cores and need the registers; so do sigmoid's additional sums.
    """
    if dtype is torch.float32 or head_dim > 128:
        return 32, 32
    return 64, 64 if is_sigmoid else 128


def _moments(
    largest: Tensor, second: Tensor, t1: Tensor, t2: Tensor, t3: Tensor, t4: Tensor, weighted: Tensor
) -> SoftmaxRowMoments:
    """From the kernel's running sums, whose logits are in units of ln 2, to the moments."""
    has_second = second > NEGATIVE_INFINITY
    # A NaN is dropped by the kernel's maxima but not by its sums.
    max_logit = torch.where(t1.isnan(), t1, largest * LN_2)
    gap = torch.where(has_second, (second - largest) * LN_2, NEGATIVE_INFINITY)  # ln(p₂/p₁) ≤ 0
    ratio = gap.exp()
    log_denominator = torch.log1p(ratio * t1)
    p1 = torch.where(largest > NEGATIVE_INFINITY, (-log_denominator).exp(), 0.0)
    p2 = ratio * p1
    # Σ pᵢ(m − zᵢ) over every key but the largest
    distance = torch.where(has_second, -(weighted * LN_2 + gap * t1), 0.0)
    entropy = log_denominator + torch.where(p2 == 0, 0.0, p2 * distance)
    return SoftmaxRowMoments(max_logit, max_logit + log_denominator, entropy, p1, p2, t1, t2, t3, t4)

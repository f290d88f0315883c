"""Logits of a block of rows and a block of keys, in the shape in which the sums are taken."""

from __future__ import annotations

import triton
import triton.language as tl

# What an excluded key's logit becomes. Finite: its exponential is 0, and 0 times it is no NaN.
EXCLUDED = tl.constexpr(-1.0e30)

# Half of the most negative number of a mask's dtype, with which many models mask; bfloat16's is float32's.
MASKED_OUT = tl.constexpr(-1.7e38)
MASKED_OUT_FLOAT16 = tl.constexpr(-32752.0)


@triton.jit
def logits(
    source, start, EXCLUDE: tl.constexpr,
    HEAD_DIM: tl.constexpr, IS_CAUSAL: tl.constexpr, MASK: tl.constexpr, HAS_SCORE_BIAS: tl.constexpr,
    SCALE_FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Logits of the keys from `start` on; without SCALE_FIRST they lack the scale.

    With EXCLUDE, keys at or beyond `end`, after the row or masked come out as EXCLUDED. Without it, there
    must be none.

    On tensor cores four threads share a row. They hold pairs of keys in turn, so of the tile
    [rows, keys / 8, 4, 2] the second and the last axis lie within a thread, and reducing them costs no
    exchange between threads.
    """
    (
        q, keys, mask, score_bias, position, end, scale,
        key_stride_t, mask_stride_k, score_bias_stride_k,
    ) = source  # fmt: skip
    column = start + tl.arange(0, BLOCK_KEYS)
    dims = tl.arange(0, q.shape[1])
    keys += tl.cast(start, tl.int64) * key_stride_t
    if EXCLUDE:
        k = tl.load(keys, mask=(column < end)[None, :] & (dims < HEAD_DIM)[:, None], other=0.0)
    elif q.shape[1] != HEAD_DIM:
        k = tl.load(keys, mask=(dims < HEAD_DIM)[:, None], other=0.0)
    else:
        k = tl.load(keys)
    z = tl.dot(q, k, input_precision="ieee")
    if SCALE_FIRST:
        z *= scale
    if HAS_SCORE_BIAS:
        added = tl.load(score_bias + column * score_bias_stride_k, mask=column < end, other=0.0)
        z += added.to(tl.float32)[None, :]
    if EXCLUDE:
        allowed = (column < end)[None, :] & (position >= 0)[:, None]
        if IS_CAUSAL:
            allowed &= column[None, :] <= position[:, None]
        if MASK != 0:
            entries = tl.load(mask + column.to(tl.int64)[None, :] * mask_stride_k, mask=allowed, other=0)
            if MASK == 1:
                allowed &= entries != 0
            else:
                z += entries.to(tl.float32)
                masked_out: tl.constexpr = MASKED_OUT_FLOAT16 if entries.dtype == tl.float16 else MASKED_OUT
                allowed &= (z > masked_out) | (z != z)
        z = tl.where(allowed, z, EXCLUDED)
    return tl.reshape(z, [BLOCK_ROWS, BLOCK_KEYS // 8, 4, 2])


@triton.jit
def sum_keys(tile):
    """Sums [rows, 4] over the keys that a thread holds of a tile [rows, keys / 8, 4, 2]."""
    return tl.sum(tl.sum(tile, 1), 2)


@triton.jit
def largest_key(tile):
    """The same with the maximum, which drops NaN."""
    return tl.max(tl.max(tile, 1), 2)

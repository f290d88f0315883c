"""Moments of attention rows in one pass over the keys: O(tokens) memory, no n × n matrix.

The online update. A row keeps its largest logit m, its second largest s and, over every key but the largest,
the sums Tₖ = Σ e^{k(z − s)} for k = 1..4 and E = Σ e^{z − s}(z − s). A block of keys with maximum m_b and
second largest s_b changes them to

    M = max(m, m_b),   S = max(min(m, m_b), s, s_b)
    Tₖ ← Tₖ e^{k(s − S)} + [m_b > m] (e^{k(m − S)} − 1) + Σ_block e^{k min(z − S, 0)}

If the block holds the new maximum, that key puts exactly 1 into the block's sum and the bracket takes it out
again, while the old maximum joins the rest; otherwise every key of the block lies at or under S. No exponent
is positive, so nothing overflows; and where 1 is taken out, the second largest key has put 1 in, so nothing
cancels. E follows the same way. Logits are held in units of ln 2, for the hardware's exp2.

Sigmoid rows run the same update over ln σ, whose softmax is the weights divided by their sum: their entropy
stays accurate when one weight holds nearly everything.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Squares of derivatives down to 1e-31 stay in float32's range with this factor, and 2¹⁶ of them do above.
DERIVATIVE_UNIT = tl.constexpr(2.0**50)

# Half of float32's most negative number, with which many models mask.
EXCLUDED = tl.constexpr(-1.7e38)

SOFTMAX_FIELDS = 7  # m, s, T1, T2, T3, T4, E
SIGMOID_FIELDS = (
    13  # the same of ln σ; then max logit, Σ s, saturated keys, keys, max d, Σ d... see the store
)


@triton.jit
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)  # one instruction, like the one that drops NaN


@triton.jit
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _two_largest(m_a, s_a, m_b, s_b):
    return _max(m_a, m_b), _max(_min(m_a, m_b), _max(s_a, s_b))


@triton.jit
def _add_block(z, m, s, t1, t2, t3, t4, e):
    """Takes a block of logits z [rows, keys] into the running moments [rows]."""
    negative_infinity: tl.constexpr = float("-inf")
    nothing = tl.full(z.shape, negative_infinity, tl.float32)
    m_b, s_b = tl.reduce((z, nothing), 1, _two_largest)
    second = _max(_min(m, m_b), _max(s, s_b))
    anchor = tl.where(second > negative_infinity, second, 0.0)

    # What was summed before, in units of the new second largest.
    shift = tl.where(s > negative_infinity, s - anchor, 0.0)
    f = tl.exp2(shift)
    f2 = f * f
    e = f * (e + shift * t1)
    t1 *= f
    t2 *= f2
    t3 *= f2 * f
    t4 *= f2 * f2

    # The old maximum joins the rest if the block holds a larger one, which then leaves the block's sums.
    is_new = m_b > m
    joining = tl.where(is_new & (m > negative_infinity), m - anchor, negative_infinity)
    g = tl.exp2(joining)
    g2 = g * g
    leaving = tl.where(is_new, 1.0, 0.0)
    e += g * tl.where(joining > negative_infinity, joining, 0.0)
    t1 += g - leaving
    t2 += g2 - leaving
    t3 += g2 * g - leaving
    t4 += g2 * g2 - leaving

    x = _min(z - anchor[:, None], 0.0)
    r = tl.exp2(x)
    r2 = r * r
    e += tl.sum(r * _max(x, -1e30), 1)
    t1 += tl.sum(r, 1)
    t2 += tl.sum(r2, 1)
    t3 += tl.sum(r2 * r, 1)
    t4 += tl.sum(r2 * r2, 1)

    # A row with a single key so far has no rest.
    has_second = (second > negative_infinity) | (second != second)
    return (
        _max(m, m_b),
        second,
        tl.where(has_second, t1, 0.0),
        tl.where(has_second, t2, 0.0),
        tl.where(has_second, t3, 0.0),
        tl.where(has_second, t4, 0.0),
        tl.where(has_second, e, 0.0),
    )


@triton.jit
def row_moments(
    query, key, rows, weights, key_lengths, mask, score_bias, bias, output,
    num_rows, tokens_k, scale,
    query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    score_bias_stride_b, score_bias_stride_k,
    bias_stride_b, bias_stride_h, output_stride,
    heads: tl.constexpr, group: tl.constexpr, head_dim: tl.constexpr,
    IS_SIGMOID: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_KEY_LENGTHS: tl.constexpr,
    MASK: tl.constexpr, HAS_SCORE_BIAS: tl.constexpr, SATURATED_WEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One program reduces BLOCK_ROWS rows of one head over all their keys.

    MASK: 0 none, 1 boolean, 2 added. Rows of weight 0 exclude every key.
    """
    negative_infinity: tl.constexpr = float("-inf")
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_range = row < num_rows
    position = tl.load(rows + batch * num_rows + row, mask=in_range, other=0)
    weight = tl.load(weights + batch * num_rows + row, mask=in_range, other=0)
    dims = tl.arange(0, BLOCK_D)

    # 64-bit offsets: batch × heads × tokens × head_dim may pass 2³¹.
    query += batch.to(tl.int64) * query_stride_b + head.to(tl.int64) * query_stride_h
    key += batch.to(tl.int64) * key_stride_b + (head // group).to(tl.int64) * key_stride_h
    q = tl.load(
        query + position.to(tl.int64)[:, None] * query_stride_t + dims[None, :] * query_stride_d,
        mask=in_range[:, None] & (dims < head_dim)[None, :],
        other=0.0,
    )

    end = tokens_k
    if HAS_KEY_LENGTHS:
        end = tl.minimum(end, tl.load(key_lengths + batch).to(tl.int32))
    if IS_CAUSAL:
        end = tl.minimum(end, (tl.max(tl.where(in_range, position, 0), 0) + 1).to(tl.int32))
    if IS_SIGMOID:
        row_bias = tl.load(bias + batch * bias_stride_b + head * bias_stride_h)

    zeros = tl.zeros([BLOCK_ROWS], tl.float32)
    m = zeros + negative_infinity
    s = zeros + negative_infinity
    t1, t2, t3, t4, e = zeros, zeros, zeros, zeros, zeros
    max_logit = zeros + negative_infinity
    row_sum, saturated, num_keys, d_max, d_sum, d_squares = zeros, zeros, zeros, zeros, zeros, zeros
    for start in range(0, end, BLOCK_KEYS):
        column = start + tl.arange(0, BLOCK_KEYS)
        k = tl.load(
            key + column.to(tl.int64)[None, :] * key_stride_t + dims[:, None] * key_stride_d,
            mask=(column < end)[None, :] & (dims < head_dim)[:, None],
            other=0.0,
        )
        z = tl.dot(q, k, input_precision="ieee") * scale
        allowed = (column < end)[None, :] & (weight > 0)[:, None]
        if IS_CAUSAL:
            allowed &= column[None, :] <= position[:, None]
        if MASK != 0:
            entries = tl.load(
                mask
                + batch.to(tl.int64) * mask_stride_b
                + head.to(tl.int64) * mask_stride_h
                + position.to(tl.int64)[:, None] * mask_stride_q
                + column.to(tl.int64)[None, :] * mask_stride_k,
                mask=allowed,
                other=0,
            )
            if MASK == 1:
                allowed &= entries != 0
            else:
                z += entries.to(tl.float32)
                allowed &= z > EXCLUDED
        if HAS_SCORE_BIAS:
            added = tl.load(
                score_bias + batch.to(tl.int64) * score_bias_stride_b + column * score_bias_stride_k,
                mask=column < end,
                other=0.0,
            )
            z += added.to(tl.float32)[None, :]
        z = tl.where(allowed, z, negative_infinity)
        if IS_SIGMOID:
            max_logit = tl.maximum(max_logit, tl.max(z, 1))
            # An excluded key has x = −inf: its weight, derivative and e^{−|x|} come out as 0 by themselves.
            x = (z + row_bias) * LOG2_E
            decay = tl.exp2(-tl.abs(x))
            denominator = 1.0 + decay
            minor = decay / denominator
            major = 1.0 - minor
            s_weight = tl.where(x >= 0, major, minor)
            d = minor * major
            row_sum += tl.sum(s_weight, 1)
            saturated += tl.sum(tl.where(s_weight > SATURATED_WEIGHT, 1.0, 0.0), 1)
            if MASK != 0:
                num_keys += tl.sum(tl.where(allowed, 1.0, 0.0), 1)
            d_max = tl.maximum(d_max, tl.max(d, 1))
            d_sum += tl.sum(d, 1)
            scaled = d * DERIVATIVE_UNIT
            d_squares += tl.sum(scaled * scaled, 1)
            # log₂ σ(x) = min(x, 0) − log₂(1 + 2^{−|x|}). Only differences of these count, in which an
            # absolute error of 1e-7 is a relative one of 1e-7 in the weights: no log1p is needed.
            z = tl.minimum(x, 0.0) - tl.log2(denominator)
        else:
            z *= LOG2_E
        m, s, t1, t2, t3, t4, e = _add_block(z, m, s, t1, t2, t3, t4, e)

    output += tl.program_id(1).to(tl.int64) * num_rows + row
    tl.store(output + 0 * output_stride, m, mask=in_range)
    tl.store(output + 1 * output_stride, s, mask=in_range)
    tl.store(output + 2 * output_stride, t1, mask=in_range)
    tl.store(output + 3 * output_stride, t2, mask=in_range)
    tl.store(output + 4 * output_stride, t3, mask=in_range)
    tl.store(output + 5 * output_stride, t4, mask=in_range)
    tl.store(output + 6 * output_stride, e, mask=in_range)
    if IS_SIGMOID:
        if MASK == 0:
            last = (position + 1).to(tl.int32) if IS_CAUSAL else zeros.to(tl.int32) + end
            num_keys = tl.where(weight > 0, tl.minimum(last, end), 0).to(tl.float32)
        tl.store(output + 7 * output_stride, max_logit, mask=in_range)
        tl.store(output + 8 * output_stride, row_sum, mask=in_range)
        tl.store(output + 9 * output_stride, saturated / tl.maximum(num_keys, 1.0), mask=in_range)
        tl.store(output + 10 * output_stride, d_max, mask=in_range)
        tl.store(output + 11 * output_stride, d_sum, mask=in_range)
        tl.store(output + 12 * output_stride, tl.sqrt(d_squares) / DERIVATIVE_UNIT, mask=in_range)

"""Statistics of attention rows in one pass over the keys: O(tokens) memory, no n × n matrix.

A program reduces a block of rows of one head. It goes over the keys that all its rows see without looking at
masks, then over the rest, and writes the finished statistics: nothing row-wise is left to launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stability.attention.triton.arithmetic import LOG2_E
from stability.attention.triton.logits import EXCLUDED
from stability.attention.triton.sigmoid_rows import sigmoid_row, sigmoid_sums
from stability.attention.triton.softmax_rows import softmax_row, softmax_sums

# The planes of the output. Off the diagonal a sigmoid row's Jacobian is zero.
SOFTMAX_QUANTITIES = (
    "max_logit", "log_sum_exp", "entropy", "jacobian_frobenius", "jacobian_spectral", "off_diagonal_share",
    "trace", "derivative_max",
)  # fmt: skip
SIGMOID_QUANTITIES = (
    "max_logit", "entropy", "jacobian_frobenius", "off_diagonal_share", "trace", "derivative_max", "row_sum",
    "saturated_share",
)  # fmt: skip


@triton.jit
def row_statistics(
    query, key, rows, weights, key_lengths, mask, score_bias, bias, output,
    num_rows, tokens_k, scale, heads, group,
    query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    rows_stride_b, rows_stride_r, weights_stride_b, weights_stride_r,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    score_bias_stride_b, score_bias_stride_k,
    bias_stride_b, bias_stride_h, output_stride,
    HEAD_DIM: tl.constexpr, IS_SIGMOID: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_KEY_LENGTHS: tl.constexpr,
    MASK: tl.constexpr, HAS_SCORE_BIAS: tl.constexpr, SCALE_FIRST: tl.constexpr, SATURATED: tl.constexpr,
    IS_BIAS_TENSOR: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One program writes the statistics of BLOCK_ROWS rows of one head.

    MASK: 0 none, 1 boolean, 2 added. SCALE_FIRST: every logit is multiplied by the scale, as it must be where
    something is added to it; otherwise the scale is part of the factor c in the exponents. IS_BIAS_TENSOR:
    the bias is not a number. Rows of weight 0 count as rows without keys.
    """
    negative_infinity: tl.constexpr = float("-inf")
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    # The last rows first: under causal order they take longest.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_range = row < num_rows
    position = tl.load(rows + batch * rows_stride_b + row * rows_stride_r, mask=in_range, other=0)
    position = position.to(tl.int32)
    weight = tl.load(weights + batch * weights_stride_b + row * weights_stride_r, mask=in_range, other=0)

    # 64-bit offsets: batch × heads × tokens × head_dim may pass 2³¹.
    dims = tl.arange(0, BLOCK_D)
    column = tl.arange(0, BLOCK_KEYS).to(tl.int64)
    query += batch.to(tl.int64) * query_stride_b + head.to(tl.int64) * query_stride_h
    key += batch.to(tl.int64) * key_stride_b + (head // group).to(tl.int64) * key_stride_h
    mask += batch.to(tl.int64) * mask_stride_b + head.to(tl.int64) * mask_stride_h
    q = tl.load(
        query + position.to(tl.int64)[:, None] * query_stride_t + dims[None, :] * query_stride_d,
        mask=(weight > 0)[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )

    # Every row sees the keys before `free`, and none those from `end` on.
    end = tokens_k
    if HAS_KEY_LENGTHS:
        end = tl.minimum(end, tl.load(key_lengths + batch).to(tl.int32))
    free = end
    if IS_CAUSAL:
        free = tl.minimum(free, tl.min(tl.where(in_range, position, tokens_k), 0) + 1)
        end = tl.minimum(end, tl.max(position, 0) + 1)
    if MASK != 0:
        free = 0
    free = free // BLOCK_KEYS * BLOCK_KEYS
    z_unit = 1.0 if SCALE_FIRST else scale
    c = z_unit * LOG2_E

    source = (
        q,
        key + column[None, :] * key_stride_t + dims[:, None] * key_stride_d,
        mask + position.to(tl.int64)[:, None] * mask_stride_q,
        score_bias + batch.to(tl.int64) * score_bias_stride_b,
        position, end, scale, key_stride_t, mask_stride_k, score_bias_stride_k,
    )  # fmt: skip
    b = 0.0
    if IS_SIGMOID:
        if IS_BIAS_TENSOR:
            bias = tl.load(bias + batch * bias_stride_b + head * bias_stride_h)
        b = bias * LOG2_E
        m, small_max, w, log_sum, d_sum, d_squares, d_max, saturated, num_keys = sigmoid_sums(
            source, free, end, c, b, SATURATED,
            HEAD_DIM, IS_CAUSAL, MASK, HAS_SCORE_BIAS, SCALE_FIRST, BLOCK_ROWS, BLOCK_KEYS,
        )  # fmt: skip
        m, entropy, frobenius, trace, d_max, row_sum, saturated, is_inaccurate = sigmoid_row(
            c, b, m, small_max, w, log_sum, d_sum, d_squares, d_max, saturated, num_keys
        )
        has_key = ((m > EXCLUDED) | (m != m)) & (weight > 0)
        is_inaccurate &= has_key
        # A second pass over the keys where a row needs it, over none where no row does.
        free = 0
        end = tl.where(tl.max(is_inaccurate.to(tl.int32), 0) > 0, end, 0)
    winners, unit, t1, t2, t3, t4, e = softmax_sums(
        source, free, end, c, b, IS_SIGMOID,
        HEAD_DIM, IS_CAUSAL, MASK, HAS_SCORE_BIAS, SCALE_FIRST, BLOCK_ROWS, BLOCK_KEYS,
    )  # fmt: skip
    soft_m, log_denominator, soft_entropy, soft_frobenius, off_diagonal, soft_trace, soft_d_max = softmax_row(
        winners, 1.0 if IS_SIGMOID else c, unit, t1, t2, t3, t4, e, BLOCK_ROWS, BLOCK_KEYS // 2
    )

    output += tl.program_id(1).to(tl.int64) * num_rows + row
    if IS_SIGMOID:
        entropy = tl.where(is_inaccurate, soft_entropy, entropy)
        tl.store(output, tl.where(has_key, m * z_unit, negative_infinity), mask=in_range)
        tl.store(output + output_stride, tl.where(has_key, entropy, 0.0), mask=in_range)
        tl.store(output + 2 * output_stride, tl.where(has_key, frobenius, 0.0), mask=in_range)
        tl.store(output + 3 * output_stride, tl.zeros_like(m), mask=in_range)
        tl.store(output + 4 * output_stride, tl.where(has_key, trace, 0.0), mask=in_range)
        tl.store(output + 5 * output_stride, tl.where(has_key, d_max, 0.0), mask=in_range)
        tl.store(output + 6 * output_stride, tl.where(has_key, row_sum, 0.0), mask=in_range)
        tl.store(output + 7 * output_stride, tl.where(has_key, saturated, 0.0), mask=in_range)
    else:
        has_key = ((soft_m > EXCLUDED) | (soft_m != soft_m)) & (weight > 0)
        max_logit = tl.where(has_key, soft_m * z_unit, negative_infinity)
        log_denominator = tl.where(has_key, log_denominator, 0.0)
        frobenius = tl.where(has_key, soft_frobenius, 0.0)
        trace = tl.where(has_key, soft_trace, 0.0)
        d_max = tl.where(has_key, soft_d_max, 0.0)
        spectral = tl.minimum(tl.minimum(frobenius, trace), 2.0 * d_max)
        tl.store(output, max_logit, mask=in_range)
        tl.store(output + output_stride, max_logit + log_denominator, mask=in_range)
        tl.store(output + 2 * output_stride, tl.where(has_key, soft_entropy, 0.0), mask=in_range)
        tl.store(output + 3 * output_stride, frobenius, mask=in_range)
        tl.store(output + 4 * output_stride, spectral, mask=in_range)
        tl.store(output + 5 * output_stride, tl.where(has_key, off_diagonal, 0.0), mask=in_range)
        tl.store(output + 6 * output_stride, trace, mask=in_range)
        tl.store(output + 7 * output_stride, d_max, mask=in_range)

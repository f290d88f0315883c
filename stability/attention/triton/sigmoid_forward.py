"""Forward pass of sigmoid attention, O = σ(scale · Q Kᵀ + bias) V, in one pass over the keys.

Weights need no normalisation, so nothing is carried from block to block but the output: no running maximum,
no denominator, no rescaling.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stability.attention.triton.sigmoid_tiles import extent, load_tile, logit_unit, sigmoid, store_tile, tile


@triton.jit
def sigmoid_forward(
    query, key, value, bias, score_bias, key_lengths, query_lengths, query_offsets, key_offsets,
    output, row_sum, derivative_max,
    scale, heads, num_blocks, tokens_q, tokens_k,
    query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    value_stride_b, value_stride_h, value_stride_t, value_stride_d,
    output_stride_b, output_stride_h, output_stride_t,
    bias_stride_b, bias_stride_h, score_bias_stride_b, statistics_stride_b, statistics_stride_h,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_Q output rows of one head.

    `score_bias`, lengths, offsets and the statistics may be None.
    """
    block = tl.program_id(0) % num_blocks
    if IS_CAUSAL:
        block = num_blocks - 1 - block  # the rows with most keys first
    batch = tl.program_id(0) // num_blocks // heads
    head = tl.program_id(0) // num_blocks % heads
    first_q, stored_q, valid_q = extent(batch, tokens_q, query_lengths, query_offsets)
    first_k, _, valid_k = extent(batch, tokens_k, key_lengths, key_offsets)
    start_q = block * BLOCK_Q
    if start_q >= stored_q:
        return
    rows = start_q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_K)

    # 64-bit offsets: batch × heads × tokens × head_dim may pass 2³¹.
    batch = batch.to(tl.int64)
    head = head.to(tl.int64)
    query += batch * query_stride_b + head * query_stride_h + first_q * query_stride_t
    key += batch * key_stride_b + (head // GROUP) * key_stride_h + first_k * key_stride_t
    value += batch * value_stride_b + (head // GROUP) * value_stride_h + first_k * value_stride_t
    output += batch * output_stride_b + head * output_stride_h + first_q * output_stride_t
    k_tile = tile(key, columns, key_stride_t, key_stride_d, BLOCK_D)
    v_tile = tile(value, columns, value_stride_t, value_stride_d, BLOCK_V)
    q_tile = tile(query, rows, query_stride_t, query_stride_d, BLOCK_D)
    q = load_tile(q_tile, rows, valid_q, HEAD_DIM, BLOCK_D, True)

    unit: tl.constexpr = logit_unit(METHOD)
    factor = scale * unit
    shift = tl.load(bias + batch * bias_stride_b + head * bias_stride_h) * unit

    # Keys before `clear` are seen by every row of the block; only those from there to `end` need masks.
    end = tl.where(start_q < valid_q, valid_k, 0)
    clear = end
    if IS_CAUSAL:
        end = tl.minimum(end, start_q + BLOCK_Q)
        clear = tl.minimum(end, start_q + 1)
    clear = clear // BLOCK_K * BLOCK_K

    accumulator = tl.zeros([BLOCK_Q, BLOCK_V], tl.float32)
    sums = tl.zeros([BLOCK_Q], tl.float32)
    largest = tl.zeros([BLOCK_Q], tl.float32)
    for IS_BOUNDARY in tl.static_range(2):
        for start in range(clear if IS_BOUNDARY else 0, end if IS_BOUNDARY else clear, BLOCK_K):
            keys = start + columns
            offset = tl.cast(start, tl.int64)
            k = load_tile(k_tile + offset * key_stride_t, keys, end, HEAD_DIM, BLOCK_D, IS_BOUNDARY)
            products = tl.dot(q, tl.trans(k), input_precision="ieee")
            if score_bias is not None:
                pointers = score_bias + batch * score_bias_stride_b + first_k + keys
                added = tl.load(pointers, mask=keys < end, other=0.0) if IS_BOUNDARY else tl.load(pointers)
                weights = sigmoid(tl.fma(products, factor, (shift + added * unit)[None, :]), METHOD)
            else:
                weights = sigmoid(tl.fma(products, factor, shift), METHOD)
            if IS_CAUSAL and IS_BOUNDARY:
                weights = tl.where(rows[:, None] >= keys[None, :], weights, 0.0)
            if row_sum is not None:
                counted = tl.where((keys < end)[None, :], weights, 0.0) if IS_BOUNDARY else weights
                sums += tl.sum(counted, 1)
                largest = tl.maximum(largest, tl.max(tl.fma(-counted, counted, counted), 1))
            v = load_tile(v_tile + offset * value_stride_t, keys, end, VALUE_DIM, BLOCK_V, IS_BOUNDARY)
            accumulator = tl.dot(weights.to(v.dtype), v, accumulator, input_precision="ieee")

    o_tile = tile(output, rows, output_stride_t, 1, BLOCK_V)
    store_tile(o_tile, accumulator, rows, valid_q, stored_q, VALUE_DIM, BLOCK_V)
    if row_sum is not None:
        at = batch * statistics_stride_b + head * statistics_stride_h + first_q + rows
        tl.store(row_sum + at, tl.where(rows < valid_q, sums, 0.0), mask=rows < stored_q)
        tl.store(derivative_max + at, tl.where(rows < valid_q, largest, 0.0), mask=rows < stored_q)

"""Backward pass of sigmoid attention in two kernels without atomics: the same bits on every run.

With P = σ(S), S = scale · Q Kᵀ + bias and the output's gradient dO,

    dP = dO Vᵀ,   dS = dP ∘ P ∘ (1 − P),   dV = Pᵀ dO,   dK = scale · dSᵀ Q,   dQ = scale · dS K,
    dbias = Σ dS over queries and keys,   dscore_bias = Σ dS over heads and queries.

P is computed again from Q and K: σ, unlike softmax, needs nothing kept from the forward pass. The kernel of
dK and dV holds a block of keys and runs over the queries; that of dQ holds queries and runs over the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from stability.attention.triton.sigmoid_tiles import extent, load_tile, logit_unit, sigmoid, store_tile, tile


@triton.jit
def sigmoid_backward_keys(
    grad_output, query, key, value, bias, score_bias, key_lengths, query_lengths, query_offsets, key_offsets,
    grad_key, grad_value, block_sums, key_sums,
    scale, heads, num_blocks, tokens_q, tokens_k,
    grad_output_stride_b, grad_output_stride_h, grad_output_stride_t, grad_output_stride_d,
    query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    value_stride_b, value_stride_h, value_stride_t, value_stride_d,
    grad_key_stride_b, grad_key_stride_h, grad_key_stride_t,
    grad_value_stride_b, grad_value_stride_h, grad_value_stride_t,
    bias_stride_b, bias_stride_h, score_bias_stride_b, key_sums_stride_b, key_sums_stride_h,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """One program computes dK and dV of BLOCK_K keys, summed over the query heads that share them.

    `block_sums` [batch, heads, num_blocks] and `key_sums` (per key) take Σ dS over the queries; or None.
    """
    key_heads = heads // GROUP
    block = tl.program_id(0) % num_blocks
    batch = tl.program_id(0) // num_blocks // key_heads
    key_head = tl.program_id(0) // num_blocks % key_heads
    first_q, _, valid_q = extent(batch, tokens_q, query_lengths, query_offsets)
    first_k, stored_k, valid_k = extent(batch, tokens_k, key_lengths, key_offsets)
    start_k = block * BLOCK_K
    if start_k >= stored_k:
        return
    keys = start_k + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_Q)

    batch = batch.to(tl.int64)
    key_head = key_head.to(tl.int64)
    key += batch * key_stride_b + key_head * key_stride_h + first_k * key_stride_t
    value += batch * value_stride_b + key_head * value_stride_h + first_k * value_stride_t
    grad_key += batch * grad_key_stride_b + key_head * grad_key_stride_h + first_k * grad_key_stride_t
    grad_value += batch * grad_value_stride_b + key_head * grad_value_stride_h + first_k * grad_value_stride_t
    query += batch * query_stride_b + first_q * query_stride_t
    grad_output += batch * grad_output_stride_b + first_q * grad_output_stride_t
    k_tile = tile(key, keys, key_stride_t, key_stride_d, BLOCK_D)
    v_tile = tile(value, keys, value_stride_t, value_stride_d, BLOCK_V)
    k = load_tile(k_tile, keys, valid_k, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_tile, keys, valid_k, VALUE_DIM, BLOCK_V, True)

    unit: tl.constexpr = logit_unit(METHOD)
    factor = scale * unit
    key_shift = tl.zeros([BLOCK_K], tl.float32)
    if score_bias is not None:
        pointers = score_bias + batch * score_bias_stride_b + first_k + keys
        key_shift = tl.load(pointers, mask=keys < valid_k, other=0.0) * unit

    # Queries in three parts: those the causal order cuts, those without masks, the last block.
    end = tl.where(start_k < valid_k, valid_q, 0)
    begin = 0
    clear = 0
    if IS_CAUSAL:
        begin = tl.minimum(start_k // BLOCK_Q * BLOCK_Q, end)
        clear = tl.minimum(tl.cdiv(start_k + BLOCK_K - 1, BLOCK_Q) * BLOCK_Q, end)
    whole = tl.maximum(end // BLOCK_Q * BLOCK_Q, clear)

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        q_tile = tile(query + head * query_stride_h, columns, query_stride_t, query_stride_d, BLOCK_D)
        do_tile = tile(
            grad_output + head * grad_output_stride_h,
            columns,
            grad_output_stride_t,
            grad_output_stride_d,
            BLOCK_V,
        )
        shift = tl.load(bias + batch * bias_stride_b + head * bias_stride_h) * unit + key_shift
        sums = tl.zeros([BLOCK_K], tl.float32)
        for PART in tl.static_range(0 if IS_CAUSAL else 1, 3):
            from_q = begin if PART == 0 else clear if PART == 1 else whole
            to_q = clear if PART == 0 else whole if PART == 1 else end
            for start in range(from_q, to_q, BLOCK_Q):
                rows = start + columns
                offset = tl.cast(start, tl.int64)
                q = load_tile(q_tile + offset * query_stride_t, rows, end, HEAD_DIM, BLOCK_D, PART != 1)
                products = tl.dot(k, tl.trans(q), input_precision="ieee")
                do = load_tile(
                    do_tile + offset * grad_output_stride_t, rows, end, VALUE_DIM, BLOCK_V, PART != 1
                )
                dp = tl.dot(v, tl.trans(do), input_precision="ieee")
                p = sigmoid(tl.fma(products, factor, shift[:, None]), METHOD)
                if PART == 0:
                    p = tl.where(rows[None, :] >= keys[:, None], p, 0.0)
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
                ds = dp * tl.fma(-p, p, p)
                if block_sums is not None:
                    sums += tl.sum(ds, 1)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        if block_sums is not None:
            tl.store(block_sums + (batch * heads + head) * num_blocks + block, tl.sum(sums, 0))
            at = batch * key_sums_stride_b + head * key_sums_stride_h + first_k + keys
            tl.store(key_sums + at, sums, mask=keys < stored_k)

    dk_tile = tile(grad_key, keys, grad_key_stride_t, 1, BLOCK_D)
    dv_tile = tile(grad_value, keys, grad_value_stride_t, 1, BLOCK_V)
    store_tile(dk_tile, dk * scale, keys, valid_k, stored_k, HEAD_DIM, BLOCK_D)
    store_tile(dv_tile, dv, keys, valid_k, stored_k, VALUE_DIM, BLOCK_V)


@triton.jit
def sigmoid_backward_queries(
    grad_output, query, key, value, bias, score_bias, key_lengths, query_lengths, query_offsets, key_offsets,
    grad_query,
    scale, heads, num_blocks, tokens_q, tokens_k,
    grad_output_stride_b, grad_output_stride_h, grad_output_stride_t, grad_output_stride_d,
    query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    value_stride_b, value_stride_h, value_stride_t, value_stride_d,
    grad_query_stride_b, grad_query_stride_h, grad_query_stride_t,
    bias_stride_b, bias_stride_h, score_bias_stride_b,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_CAUSAL: tl.constexpr, METHOD: tl.constexpr,
):  # fmt: skip
    """One program computes dQ of BLOCK_Q queries of one head."""
    block = tl.program_id(0) % num_blocks
    if IS_CAUSAL:
        block = num_blocks - 1 - block
    batch = tl.program_id(0) // num_blocks // heads
    head = tl.program_id(0) // num_blocks % heads
    first_q, stored_q, valid_q = extent(batch, tokens_q, query_lengths, query_offsets)
    first_k, _, valid_k = extent(batch, tokens_k, key_lengths, key_offsets)
    start_q = block * BLOCK_Q
    if start_q >= stored_q:
        return
    rows = start_q + tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_K)

    batch = batch.to(tl.int64)
    head = head.to(tl.int64)
    query += batch * query_stride_b + head * query_stride_h + first_q * query_stride_t
    grad_output += batch * grad_output_stride_b + head * grad_output_stride_h + first_q * grad_output_stride_t
    grad_query += batch * grad_query_stride_b + head * grad_query_stride_h + first_q * grad_query_stride_t
    key += batch * key_stride_b + (head // GROUP) * key_stride_h + first_k * key_stride_t
    value += batch * value_stride_b + (head // GROUP) * value_stride_h + first_k * value_stride_t
    k_tile = tile(key, columns, key_stride_t, key_stride_d, BLOCK_D)
    v_tile = tile(value, columns, value_stride_t, value_stride_d, BLOCK_V)
    q_tile = tile(query, rows, query_stride_t, query_stride_d, BLOCK_D)
    do_tile = tile(grad_output, rows, grad_output_stride_t, grad_output_stride_d, BLOCK_V)
    q = load_tile(q_tile, rows, valid_q, HEAD_DIM, BLOCK_D, True)
    do = load_tile(do_tile, rows, valid_q, VALUE_DIM, BLOCK_V, True)

    unit: tl.constexpr = logit_unit(METHOD)
    factor = scale * unit
    shift = tl.load(bias + batch * bias_stride_b + head * bias_stride_h) * unit

    end = tl.where(start_q < valid_q, valid_k, 0)
    clear = end
    if IS_CAUSAL:
        end = tl.minimum(end, start_q + BLOCK_Q)
        clear = tl.minimum(end, start_q + 1)
    clear = clear // BLOCK_K * BLOCK_K

    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for IS_BOUNDARY in tl.static_range(2):
        for start in range(clear if IS_BOUNDARY else 0, end if IS_BOUNDARY else clear, BLOCK_K):
            keys = start + columns
            offset = tl.cast(start, tl.int64)
            k = load_tile(k_tile + offset * key_stride_t, keys, end, HEAD_DIM, BLOCK_D, IS_BOUNDARY)
            products = tl.dot(q, tl.trans(k), input_precision="ieee")
            v = load_tile(v_tile + offset * value_stride_t, keys, end, VALUE_DIM, BLOCK_V, IS_BOUNDARY)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            if score_bias is not None:
                pointers = score_bias + batch * score_bias_stride_b + first_k + keys
                added = tl.load(pointers, mask=keys < end, other=0.0) if IS_BOUNDARY else tl.load(pointers)
                p = sigmoid(tl.fma(products, factor, (shift + added * unit)[None, :]), METHOD)
            else:
                p = sigmoid(tl.fma(products, factor, shift), METHOD)
            if IS_CAUSAL and IS_BOUNDARY:
                p = tl.where(rows[:, None] >= keys[None, :], p, 0.0)
            ds = dp * tl.fma(-p, p, p)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    dq_tile = tile(grad_query, rows, grad_query_stride_t, 1, BLOCK_D)
    store_tile(dq_tile, dq * scale, rows, valid_q, stored_q, HEAD_DIM, BLOCK_D)

"""Sigmoid attention forward for Hopper: O = σ(scale·QKᵀ + bias) V without the n × n matrix.

One program per multiprocessor walks over query tiles of 64 rows per consumer: the next tile's first loads run
under the last products and the store of the one before. Without a mask tiles cost the same and are dealt out;
with lengths or causal they are drawn from a counter (`tile_scheduler`). The warps have roles:

* the producer (one warp, 24 registers) keeps TMA loads of K and V blocks in flight, `STAGES` deep, and draws;
* each consumer (a warpgroup) owns 64 query rows and their output accumulator in registers.

A consumer issues QKᵀ of block j + 1 and PV of block j together, then waits for the first alone: σ of block j
+ 1 runs while the tensor cores work on PV of block j. ptxas would sink the σ below the wait for PV; the wait
on an mbarrier between them is a branch it does not move arithmetic across. An accumulator may not be in
flight across the loop's back edge (ptxas then serialises every wgmma, warning C7514), so PV is waited for at
the end.

The consumers take turns (ping-pong): named barrier 8 + i lets consumer i issue its matrix products, and it
hands the turn on at once, so their σ phases spread out instead of falling together and leaving the tensor
cores idle.

Masks. Key blocks are visited from the last to the first: the one that a key length or the causal diagonal
cuts comes first, ahead of the loop, which therefore masks nothing. Tiles past a query length load nothing and
write zeros. In the cut block, weights of padded keys are set to zero, and so are padded rows of V in shared
memory: 0 × NaN is NaN. All consumers write the same zeros before their own PV, so they need not wait for each
other.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from stability.attention.hopper.gluon_versions import async_load, async_store
from stability.attention.hopper.sigmoid import logit_coefficients, narrow, sigmoid, weight_factor
from stability.attention.hopper.tile_scheduler import allocate_ring, draw, receive
from stability.attention.hopper.tiles import clear_padding

ROWS = gl.constexpr(64)  # of a consumer: the height of a wgmma


@gluon.jit
def _take_turn(consumer: gl.constexpr):
    gl.inline_asm_elementwise(
        f"bar.sync {8 + consumer}, 256; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _pass_turn(consumer: gl.constexpr):
    gl.inline_asm_elementwise(
        f"bar.arrive {8 + consumer}, 256; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _tile(
    index, key_lengths, query_lengths, tokens_k, heads, blocks_q,
    TILE_ROWS: gl.constexpr, BLOCK_K: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    """Tile index → batch, head, first row, valid rows of its batch, valid keys, key blocks to visit."""
    block = index % blocks_q
    if IS_CAUSAL:
        block = blocks_q - 1 - block  # the long rows first: they fill the chip to the end
    batch = index // blocks_q // heads
    head = index // blocks_q % heads
    start = block * TILE_ROWS
    rows = start + TILE_ROWS
    keys = tokens_k
    if key_lengths is not None:
        keys = gl.minimum(gl.load(key_lengths + batch).to(gl.int32), tokens_k)
    visited = keys
    if IS_CAUSAL:
        visited = gl.minimum(keys, start + TILE_ROWS)
    if query_lengths is not None:
        rows = gl.load(query_lengths + batch).to(gl.int32)
        visited = gl.where(start < rows, visited, 0)
    return batch, head, start, rows, keys, (visited + BLOCK_K - 1) // BLOCK_K


@gluon.jit
def _produce(
    query, key, value, buffers, barriers, schedule, sizes, key_lengths, query_lengths,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    BLOCK_K: gl.constexpr = key.block_shape[2]
    queries, _, keys, values = buffers
    query_full, query_empty, key_full, key_empty, value_full, value_empty = barriers
    tokens_k, heads, group, blocks_q, tiles, _, _, _ = sizes
    counter, ring = schedule
    step = 0
    query_phase = 1
    draws = 0
    index = gl.program_id(0)
    while index < tiles:
        batch, head, start, _, _, blocks = _tile(
            index, key_lengths, query_lengths, tokens_k, heads, blocks_q, CONSUMERS * ROWS, BLOCK_K, IS_CAUSAL
        )
        key_head = head // group
        if blocks > 0:
            mbarrier.wait(query_empty, query_phase)
            query_phase ^= 1
            mbarrier.expect(query_full, CONSUMERS * query.block_type.nbytes)
            for consumer in gl.static_range(CONSUMERS):
                async_load(
                    query,
                    [batch, head, start + consumer * ROWS, 0],
                    query_full,
                    queries.index(consumer).reshape(query.block_shape),
                )
        for visit in range(blocks):
            block = blocks - 1 - visit
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(key_empty.index(stage), phase ^ 1)
            mbarrier.expect(key_full.index(stage), key.block_type.nbytes)
            async_load(
                key,
                [batch, key_head, block * BLOCK_K, 0],
                key_full.index(stage),
                keys.index(stage).reshape(key.block_shape),
            )
            mbarrier.wait(value_empty.index(stage), phase ^ 1)
            mbarrier.expect(value_full.index(stage), value.block_type.nbytes)
            async_load(
                value,
                [batch, key_head, block * BLOCK_K, 0],
                value_full.index(stage),
                values.index(stage).reshape(value.block_shape),
            )
            step += 1
        index = draw(index, draws, counter, ring)
        draws += 1


@gluon.jit
def _weights(s, a, b, score_bias, column, tokens_k, MODE: gl.constexpr):
    """Attention weights of scores s [rows, keys] whose first key is `column`."""
    if score_bias is None:
        w = gl.fma(s, a, b)
    else:
        key = column + gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        added = gl.load(score_bias + key, mask=key < tokens_k, other=0.0)
        unit, _ = logit_coefficients(1.0, 0.0, MODE)
        w = gl.fma(s, a, gl.fma(added, unit, b)[None, :])
    return sigmoid(w, b, MODE)


@gluon.jit
def _mask(p, row, column, keys, IS_CAUSAL: gl.constexpr):
    """Zeros the weights [rows, keys] of keys from `keys` on and, if causal, of keys after the query."""
    layout: gl.constexpr = p.type.layout
    key = column + gl.arange(0, p.shape[1], gl.SliceLayout(0, layout))
    allowed = (key < keys)[None, :]
    if IS_CAUSAL:
        query = row + gl.arange(0, p.shape[0], gl.SliceLayout(1, layout))
        allowed = allowed & (query[:, None] >= key[None, :])
    return gl.where(allowed, p, 0.0)


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, output, buffers, barriers, schedule, terms, sizes,
    STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, MODE: gl.constexpr, QUERY_IN_REGISTERS: gl.constexpr,
):  # fmt: skip
    queries, outputs, keys, values = buffers
    bias, score_bias, key_lengths, query_lengths, scale = terms
    HAS_LENGTHS: gl.constexpr = key_lengths is not None
    dtype: gl.constexpr = queries.dtype
    BLOCK_K: gl.constexpr = keys.shape[1]
    HEAD_DIM: gl.constexpr = keys.shape[2]
    if IS_CAUSAL:
        gl.static_assert(CONSUMERS * ROWS <= BLOCK_K, "the diagonal has to cut one block only")
    NEXT: gl.constexpr = (CONSUMER + 1) % CONSUMERS
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    query_operand: gl.constexpr = gl.DotOperandLayout(0, scores, 2)
    weight_operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    query_full, query_empty, key_full, key_empty, value_full, value_empty = barriers
    tokens_k, heads, _, blocks_q, tiles, bias_stride_b, bias_stride_h, score_bias_stride_b = sizes
    no_scores = gl.zeros([ROWS, BLOCK_K], gl.float32, scores)
    counter, ring = schedule
    step = 0
    query_phase = 0
    draws = 0
    if CONSUMER == CONSUMERS - 1:
        _pass_turn(0)
    index = gl.program_id(0)
    while index < tiles:
        batch, head, start, rows, valid, blocks = _tile(
            index, key_lengths, query_lengths, tokens_k, heads, blocks_q, CONSUMERS * ROWS, BLOCK_K, IS_CAUSAL
        )
        row = start + CONSUMER * ROWS
        offset = batch.to(gl.int64) * bias_stride_b + head.to(gl.int64) * bias_stride_h
        a, b = logit_coefficients(scale, gl.load(bias + offset), MODE)
        added = score_bias
        if score_bias is not None:
            added = score_bias + batch.to(gl.int64) * score_bias_stride_b
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, sums)
        if blocks > 0:
            mbarrier.wait(query_full, query_phase)
            query_phase ^= 1
            q = queries.index(CONSUMER)
            if QUERY_IN_REGISTERS:
                q = q.load(query_operand)
                fence_async_shared()
                mbarrier.arrive(query_empty, count=1)
            stage = step % STAGES
            mbarrier.wait(key_full.index(stage), (step // STAGES) & 1)
            _take_turn(CONSUMER)
            s = warpgroup_mma(q, keys.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
            _pass_turn(NEXT)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(key_empty.index(stage), count=1)
            column = (blocks - 1) * BLOCK_K
            p = _weights(s, a, b, added, column, tokens_k, MODE)
            if IS_CAUSAL or HAS_LENGTHS:
                p = _mask(p, row, column, valid, IS_CAUSAL)
            if HAS_LENGTHS and column + BLOCK_K > valid:
                mbarrier.wait(value_full.index(stage), (step // STAGES) & 1)
                clear_padding(values.index(stage), valid - column)
            after = step + 1
            mbarrier.wait(key_full.index(after % STAGES), (after // STAGES) & 1, pred=blocks > 1)
            p = gl.convert_layout(narrow(p, dtype), weight_operand)
            for visit in range(1, blocks):
                value_stage = step % STAGES
                value_phase = (step // STAGES) & 1
                step += 1
                stage = step % STAGES
                _take_turn(CONSUMER)
                s = warpgroup_mma(
                    q, keys.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
                )
                mbarrier.wait(value_full.index(value_stage), value_phase)
                acc = warpgroup_mma(p, values.index(value_stage), acc, is_async=True)
                _pass_turn(NEXT)
                s = warpgroup_mma_wait(1, deps=(s,))
                mbarrier.arrive(key_empty.index(stage), count=1)
                weights = _weights(s, a, b, added, (blocks - 1 - visit) * BLOCK_K, tokens_k, MODE)
                after = step + 1
                mbarrier.wait(key_full.index(after % STAGES), (after // STAGES) & 1, pred=visit + 1 < blocks)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(value_empty.index(value_stage), count=1)
                p = gl.convert_layout(narrow(weights, dtype), weight_operand)
            if not QUERY_IN_REGISTERS:
                mbarrier.arrive(query_empty, count=1)
            stage = step % STAGES
            mbarrier.wait(value_full.index(stage), (step // STAGES) & 1)
            acc = warpgroup_mma(p, values.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(value_empty.index(stage), count=1)
            step += 1
        acc *= weight_factor(MODE, dtype)
        if query_lengths is not None:
            valid_row = row + gl.arange(0, ROWS, gl.SliceLayout(1, sums)) < rows
            acc = gl.where(valid_row[:, None], acc, 0.0)
        tma.store_wait(0)
        outputs.index(CONSUMER).store(acc.to(dtype))
        fence_async_shared()
        async_store(output, [batch, head, row, 0], outputs.index(CONSUMER).reshape(output.block_shape))
        index = receive(index, draws, counter, ring)
        draws += 1
    tma.store_wait(0)
    if CONSUMER == 0:
        _take_turn(0)  # consumes the last turn passed: a barrier must not end half full


@gluon.jit(do_not_specialize=[
    "bias_stride_b", "bias_stride_h", "score_bias_stride_b",
    "tokens_k", "heads", "group", "blocks_q", "tiles",
], do_not_specialize_on_alignment=["bias", "score_bias"])  # fmt: skip
def sigmoid_forward(
    query, key, value, output, bias, score_bias, key_lengths, query_lengths, counter,
    bias_stride_b, bias_stride_h, score_bias_stride_b, scale, tokens_k, heads, group, blocks_q, tiles,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, MODE: gl.constexpr,
    QUERY_IN_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Descriptors, lengths and bias → output; see the module's docstring for the schedule."""
    BLOCK_K: gl.constexpr = key.block_shape[2]
    HEAD_DIM: gl.constexpr = key.block_shape[3]
    dtype: gl.constexpr = query.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype)
    queries = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD_DIM], layout)
    outputs = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD_DIM], layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, HEAD_DIM], layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, HEAD_DIM], layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    query_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    query_empty = gl.allocate_shared_memory(gl.int64, [1], barrier)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(query_full, count=1)
    mbarrier.init(query_empty, count=CONSUMERS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(value_full.index(stage), count=1)
        mbarrier.init(key_empty.index(stage), count=CONSUMERS)
        mbarrier.init(value_empty.index(stage), count=CONSUMERS)
    ring = ()
    if counter is not None:
        ring = allocate_ring(CONSUMERS)
    fence_async_shared()
    barriers = (query_full, query_empty, key_full, key_empty, value_full, value_empty)
    sizes = (tokens_k, heads, group, blocks_q, tiles, bias_stride_b, bias_stride_h, score_bias_stride_b)
    buffers = (queries, outputs, keys, values)
    schedule = (counter, ring)
    terms = (bias, score_bias, key_lengths, query_lengths, scale)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, 2, output, buffers, barriers, schedule, terms, sizes,
                            STAGES, IS_CAUSAL, MODE, QUERY_IN_REGISTERS)),
                (_consume, (1, 2, output, buffers, barriers, schedule, terms, sizes,
                            STAGES, IS_CAUSAL, MODE, QUERY_IN_REGISTERS)),
                (_produce, (query, key, value, buffers, barriers, schedule, sizes, key_lengths, query_lengths,
                            2, STAGES, IS_CAUSAL)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (0, 3, output, buffers, barriers, schedule, terms, sizes,
                            STAGES, IS_CAUSAL, MODE, QUERY_IN_REGISTERS)),
                (_consume, (1, 3, output, buffers, barriers, schedule, terms, sizes,
                            STAGES, IS_CAUSAL, MODE, QUERY_IN_REGISTERS)),
                (_consume, (2, 3, output, buffers, barriers, schedule, terms, sizes,
                            STAGES, IS_CAUSAL, MODE, QUERY_IN_REGISTERS)),
                (_produce, (query, key, value, buffers, barriers, schedule, sizes, key_lengths, query_lengths,
                            3, STAGES, IS_CAUSAL)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, 24],
        )  # fmt: skip

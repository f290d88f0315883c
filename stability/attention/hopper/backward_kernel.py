"""Sigmoid attention backward for Hopper: one loop that gives dK and dV, or dQ, or all three.

With P = σ(S) and dS = dP ∘ P ∘ (1 − P):  dV = PᵀdO,  dK = scale·dSᵀQ,  dQ = scale·dS·K,  where dP = dO Vᵀ.
No row statistics are needed from the forward: sigmoid rows have no normaliser.

A program holds 128 rows of one side and lets the other side's rows pass by in blocks of 64. Two consumer
warpgroups hold 64 rows each and sum their gradients up in registers; a producer warp keeps TMA loads of the
streamed blocks in flight. What is held and what is streamed is the `PASS`:

            held points, values    streamed points, values    gives
    FUSED   K, V                   Q, dO                      dK, dV and dQ
    KEYS    K, V                   Q, dO                      dK and dV
    QUERIES Q, dO                  K, V                       dQ

The formulas are symmetric: S' = held points · streamed pointsᵀ and dP' = held values · streamed valuesᵀ are S
and dP or their transposes, and dS' · streamed points is dK or dQ. Accumulators become operands in registers
(P' and dS' for the products with what is streamed); held operands stay in registers where there is room,
which spares shared memory, the bottleneck next to the tensor cores, two of its reads.

FUSED sums dQ over programs by a float32 TMA reduce-add in no fixed order: it is not deterministic. dS'
reaches dQ = dS'ᵀK through shared memory, because a block's dQ sums over both consumers' keys. At head_dim 128
each consumer computes half of its columns, at 64 they take turns by block. A finished block of dQ leaves
after the next block's first products have been issued, so that the tensor cores have work meanwhile.

Padding. Rows past a length are zeroed in shared memory where a block is cut: then dP, dS and their products
are zero there, whatever the padding held; dV rows of padded keys are zeroed when stored. Streamed blocks are
visited from the last, so that the cut one comes ahead of the loop, whose registers are all taken. Causal
blocks on the diagonal lower the logits of the keys that a query does not see to −∞.
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

from stability.attention.hopper.backward_schedule import CONSUMERS, FUSED, QUERIES, ROWS, find_tile, produce
from stability.attention.hopper.gluon_versions import HOLDS_OPERANDS, async_atomic_add, async_store
from stability.attention.hopper.sigmoid import (
    logit_coefficients,
    narrow,
    sigmoid_and_slope,
    slope_factor,
    weight_factor,
)
from stability.attention.hopper.tiles import clear_padding


@gluon.jit
def _both_consumers():
    gl.inline_asm_elementwise("bar.sync 8, 256; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _hide_unseen(w, mine, row, PASS: gl.constexpr):
    """Logits [held, streamed] that give no weight and no slope where the key comes after the query."""
    held = mine + gl.arange(0, w.shape[0], gl.SliceLayout(1, w.type.layout))
    streamed = row + gl.arange(0, w.shape[1], gl.SliceLayout(0, w.type.layout))
    if PASS == QUERIES:
        return gl.where(held[:, None] >= streamed[None, :], w, -1e30)
    return gl.where(streamed[None, :] >= held[:, None], w, -1e30)


@gluon.jit
def _send(grad_query, block, at, dq):
    """Adds a block of dQ to global memory, by way of shared memory."""
    tma.store_wait(0)
    block.store(dq)
    fence_async_shared()
    async_atomic_add(grad_query, at, block.reshape(grad_query.block_shape))


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr, grads, buffers, barriers, terms, strides, sizes,
    STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, MODE: gl.constexpr, PASS: gl.constexpr,
):  # fmt: skip
    grad_query, grad_points, grad_values = grads
    all_points, all_values, points, values, slopes, partial = buffers
    held_full, points_full, points_empty, values_full, values_empty = barriers
    bias, score_bias, row_sums, held_lengths, streamed_lengths, scale = terms
    bias_stride_b, bias_stride_h, score_bias_stride_b = strides
    tokens_held, tokens_streamed, heads, _, _ = sizes
    dtype: gl.constexpr = points.dtype
    HEAD_DIM: gl.constexpr = points.shape[2]
    # At head_dim 64 only the fused loop: in the others ptxas 12.8 reuses the held registers (see the test of
    # overwritten operands), and every block after the first would be multiplied by slopes.
    HOLDING: gl.constexpr = QUERIES if HEAD_DIM == 128 else FUSED
    HELD_IN_REGISTERS: gl.constexpr = HOLDS_OPERANDS and PASS == HOLDING
    HALVES: gl.constexpr = HEAD_DIM == 128
    COLUMNS: gl.constexpr = HEAD_DIM // 2 if HALVES else HEAD_DIM  # of dQ that a consumer computes
    column: gl.constexpr = CONSUMER * COLUMNS if HALVES else 0
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    dq_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    batch, head, start, first, blocks, valid_held, valid_streamed = find_tile(
        held_lengths, streamed_lengths, tokens_held, tokens_streamed, heads, IS_CAUSAL, PASS
    )
    mine = start + CONSUMER * ROWS
    offset = batch.to(gl.int64) * bias_stride_b + head.to(gl.int64) * bias_stride_h
    a, b = logit_coefficients(scale, gl.load(bias + offset), MODE)
    unit, _ = logit_coefficients(1.0, 0.0, MODE)
    my_row = mine + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
    if score_bias is not None:
        score_bias += batch.to(gl.int64) * score_bias_stride_b
        if PASS != QUERIES:
            added = gl.load(score_bias + my_row, mask=my_row < valid_held, other=0.0)
            b = gl.fma(added, unit, b)[:, None]
    held_points = all_points.index(CONSUMER)
    held_values = all_values.index(CONSUMER)
    d_points = gl.zeros([ROWS, HEAD_DIM], gl.float32, sums)
    d_values = gl.zeros([ROWS, HEAD_DIM], gl.float32, sums)
    no_scores = gl.zeros([ROWS, ROWS], gl.float32, scores)
    no_dq = gl.zeros([ROWS, COLUMNS], gl.float32, dq_sums)
    dq = no_dq
    if row_sums is not None:
        row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, scores))
    if blocks > 0:
        mbarrier.wait(held_full, 0)
        if held_lengths is not None:
            if mine + ROWS > valid_held:
                clear_padding(held_points, valid_held - mine)
                clear_padding(held_values, valid_held - mine)
            if PASS == FUSED:
                _both_consumers()  # dQ reads both consumers' keys
        left = held_points
        right = held_values
        if HELD_IN_REGISTERS:
            left = held_points.load(gl.DotOperandLayout(0, scores, 2))
            right = held_values.load(gl.DotOperandLayout(0, scores, 2))
        if streamed_lengths is not None:
            row = (first + blocks - 1) * ROWS
            if row + ROWS > valid_streamed:
                mbarrier.wait(points_full.index(0), 0)
                mbarrier.wait(values_full.index(0), 0)
                clear_padding(points.index(0), valid_streamed - row)
                clear_padding(values.index(0), valid_streamed - row)
        for step in range(blocks):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            row = (first + blocks - 1 - step) * ROWS
            x = points.index(stage)
            y = values.index(stage)
            mbarrier.wait(points_full.index(stage), phase)
            s = warpgroup_mma(left, x.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            if PASS == FUSED:  # of the block before; ahead of the first, zeros
                if HALVES:
                    _send(grad_query, partial.index(CONSUMER), [batch, head, row + ROWS, column], dq)
                else:
                    if step % 2 != CONSUMER:
                        _send(grad_query, partial.index(CONSUMER), [batch, head, row + ROWS, column], dq)
            mbarrier.wait(values_full.index(stage), phase)
            dp = warpgroup_mma(right, y.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            if score_bias is not None and PASS == QUERIES:
                key = row + gl.arange(0, ROWS, gl.SliceLayout(0, scores))
                added = gl.load(score_bias + key, mask=key < valid_streamed, other=0.0)
                w = gl.fma(s, a, gl.fma(added, unit, b)[None, :])
            else:
                w = gl.fma(s, a, b)
            if IS_CAUSAL and (mine < row + ROWS if PASS == QUERIES else row < mine + ROWS):
                w = _hide_unseen(w, mine, row, PASS)
            p, slope = sigmoid_and_slope(w, MODE)
            if PASS == QUERIES:
                dp = warpgroup_mma_wait(0, deps=(dp,))
            else:
                p = gl.convert_layout(narrow(p, dtype), operand)
                d_values = warpgroup_mma(p, y, d_values, is_async=True)
                dp = warpgroup_mma_wait(1, deps=(dp,))
            ds = dp * slope
            if row_sums is not None:
                row_sum += gl.sum(ds, 1)
            ds = ds.to(dtype)
            d_points = warpgroup_mma(gl.convert_layout(ds, operand), x, d_points, is_async=True)
            if PASS == FUSED:
                # Two buffers: a consumer may run a block ahead of the other's reads, not two.
                buffer = (step % 2) * CONSUMERS
                slopes.index(buffer + CONSUMER).store(ds)
                fence_async_shared()
                _both_consumers()
                if HALVES:
                    for keys in gl.static_range(CONSUMERS):
                        dq = warpgroup_mma(
                            slopes.index(buffer + keys).permute((1, 0)),
                            all_points.index(keys).slice(column, COLUMNS, dim=1),
                            no_dq if keys == 0 else dq,
                            use_acc=keys > 0,
                            is_async=True,
                        )
                    d_points, d_values = warpgroup_mma_wait(CONSUMERS, deps=(d_points, d_values))
                else:
                    if step % 2 == CONSUMER:
                        for keys in gl.static_range(CONSUMERS):
                            dq = warpgroup_mma(
                                slopes.index(buffer + keys).permute((1, 0)),
                                all_points.index(keys),
                                no_dq if keys == 0 else dq,
                                use_acc=keys > 0,
                                is_async=True,
                            )
                        dq = warpgroup_mma_wait(0, deps=(dq,))
            if PASS != FUSED or not HALVES:
                d_points, d_values = warpgroup_mma_wait(0, deps=(d_points, d_values))
            mbarrier.arrive(points_empty.index(stage), count=1)
            mbarrier.arrive(values_empty.index(stage), count=1)
            if PASS == FUSED and HALVES:
                dq = warpgroup_mma_wait(0, deps=(dq,))
        if PASS == FUSED:
            row = first * ROWS
            if HALVES or blocks % 2 != CONSUMER:
                _send(grad_query, partial.index(CONSUMER), [batch, head, row, column], dq)
    d_points *= slope_factor(MODE) * scale
    if row_sums is not None:
        at = (batch * heads + head).to(gl.int64) * tokens_held + my_row
        gl.store(row_sums + at, row_sum * slope_factor(MODE), mask=my_row < tokens_held)
    # The held values have been read for the last time by their only reader: the gradients leave through them.
    if PASS != QUERIES:
        d_values *= weight_factor(MODE, dtype)
        if held_lengths is not None:
            is_valid = mine + gl.arange(0, ROWS, gl.SliceLayout(1, sums)) < valid_held
            d_values = gl.where(is_valid[:, None], d_values, 0.0)
        held_values.store(d_values.to(dtype))
        fence_async_shared()
        async_store(grad_values, [batch, head, mine, 0], held_values.reshape(grad_values.block_shape))
        tma.store_wait(0)
    held_values.store(d_points.to(dtype))
    fence_async_shared()
    async_store(grad_points, [batch, head, mine, 0], held_values.reshape(grad_points.block_shape))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "bias_stride_b", "bias_stride_h", "score_bias_stride_b", "tokens_held", "tokens_streamed", "heads",
    "held_group", "streamed_group",
], do_not_specialize_on_alignment=["bias", "score_bias"])  # fmt: skip
def sigmoid_backward(
    held_points, held_values, streamed_points, streamed_values, grad_query, grad_points, grad_values,
    bias, score_bias, row_sums, held_lengths, streamed_lengths, scale,
    bias_stride_b, bias_stride_h, score_bias_stride_b,
    tokens_held, tokens_streamed, heads, held_group, streamed_group,
    STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, MODE: gl.constexpr, PASS: gl.constexpr,
):  # fmt: skip
    """Descriptors, bias and lengths → gradients by `PASS`, and sums of dS over the queries.

    ``grad_query`` is added up in float32, over scale and `slope_factor`.
    """
    HEAD_DIM: gl.constexpr = held_points.block_shape[3]
    dtype: gl.constexpr = held_points.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, ROWS], dtype)
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 64], gl.float32)
    all_points = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD_DIM], layout)
    all_values = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD_DIM], layout)
    points = gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEAD_DIM], layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEAD_DIM], layout)
    slopes = gl.allocate_shared_memory(dtype, [2 * CONSUMERS if PASS == FUSED else 1, ROWS, ROWS], square)
    partial = gl.allocate_shared_memory(gl.float32, [CONSUMERS if PASS == FUSED else 1, ROWS, 64], wide)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    held_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    points_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    points_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    values_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(held_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(points_full.index(stage), count=1)
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(points_empty.index(stage), count=CONSUMERS)
        mbarrier.init(values_empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    descriptors = (held_points, held_values, streamed_points, streamed_values)
    grads = (grad_query, grad_points, grad_values)
    buffers = (all_points, all_values, points, values, slopes, partial)
    barriers = (held_full, points_full, points_empty, values_full, values_empty)
    strides = (bias_stride_b, bias_stride_h, score_bias_stride_b)
    sizes = (tokens_held, tokens_streamed, heads, held_group, streamed_group)
    terms = (bias, score_bias, row_sums, held_lengths, streamed_lengths, scale)
    gl.warp_specialize(
        [
            (_consume, (0, grads, buffers, barriers, terms, strides, sizes, STAGES, IS_CAUSAL, MODE, PASS)),
            (_consume, (1, grads, buffers, barriers, terms, strides, sizes, STAGES, IS_CAUSAL, MODE, PASS)),
            (produce, (descriptors, buffers, barriers, held_lengths, streamed_lengths, sizes,
                       STAGES, IS_CAUSAL, PASS)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip

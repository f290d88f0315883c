"""Sigmoid attention backward for Hopper, key-stationary: dK, dV and, if asked, dQ in one pass over queries.

With P = σ(S) and dS = dP ∘ P ∘ (1 − P):  dV = PᵀdO,  dK = scale·dSᵀQ,  dQ = scale·dS·K,  where dP = dO Vᵀ.
No row statistics are needed from the forward: sigmoid rows have no normaliser.

A program holds 128 keys: two consumer warpgroups of 64, their dK and dV in registers, K and V in shared memory;
a producer warp keeps blocks of 64 queries and their dO in flight. Everything is transposed (Sᵀ = KQᵀ), so that P
and dS are operands in registers for dV and dK. dS goes through shared memory for dQ, which sums over both
consumers' keys; the sum over programs is a float32 TMA reduce-add in no fixed order, so not deterministic. How
consumers split dQ (`DQ`):

    NONE       none: the deterministic two-pass backward computes dQ in a kernel of its own
    HALVES     each consumer does half of head_dim over all 128 keys (head_dim 128)
    TURNS      they alternate by query block (head_dim 64)

Padding. Rows of K, V, Q and dO past a length are zeroed in shared memory where a block is cut: then dP, dS and
their products are zero there, whatever the padding held; dV rows of padded keys are zeroed when stored.
"""

import torch
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from stability.attention.layout import empty_like_tokens

from .eligibility import layout_problem
from .launch import descriptor
from .sigmoid import ACCURATE, CURVATURE, FAST, logit_coefficients, output_factor, sigmoid_and_slope
from .sigmoid_forward import clear_padding

ROWS = gl.constexpr(64)  # queries of a block and keys of a consumer
CONSUMERS = gl.constexpr(2)
NONE = gl.constexpr(0)
HALVES = gl.constexpr(1)
TURNS = gl.constexpr(2)


@builtin
def _reduce_add(descriptor, coordinates, source, _semantic=None):
    """Adds a block in shared memory to global memory by TMA. Gluon 3.6 has the operation, not the function."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, source.handle
    )


@gluon.jit
def _both_consumers():
    gl.inline_asm_elementwise("bar.sync 8, 256; mov.b32 $0, 0;", "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def _range(start, batch, key_lengths, query_lengths, tokens_q, tokens_k, IS_CAUSAL: gl.constexpr):
    """First query block, number of blocks, valid queries, valid keys."""
    queries = tokens_q
    keys = tokens_k
    if query_lengths is not None:
        queries = gl.minimum(gl.load(query_lengths + batch).to(gl.int32), tokens_q)
    if key_lengths is not None:
        keys = gl.minimum(gl.load(key_lengths + batch).to(gl.int32), tokens_k)
    first = 0
    if IS_CAUSAL:
        first = start // ROWS
    blocks = gl.maximum((queries + ROWS - 1) // ROWS - first, 0)
    blocks = gl.where(start < keys, blocks, 0)
    return first, blocks, queries, keys


@gluon.jit
def _produce(
    query, key, value, grad_output, buffers, barriers, key_lengths, query_lengths, tokens_q, tokens_k, heads,
    STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr,
):  # fmt: skip
    keys, values, queries, grads, _, _ = buffers
    key_full, query_full, query_empty, grad_full, grad_empty = barriers
    batch = gl.program_id(1) // heads
    head = gl.program_id(1) % heads
    start = gl.program_id(0) * (CONSUMERS * ROWS)
    first, blocks, _, _ = _range(start, batch, key_lengths, query_lengths, tokens_q, tokens_k, IS_CAUSAL)
    if blocks > 0:
        mbarrier.expect(key_full, 2 * CONSUMERS * key.block_type.nbytes)
        for consumer in gl.static_range(CONSUMERS):
            at = [batch, head, start + consumer * ROWS, 0]
            tma.async_copy_global_to_shared(key, at, key_full, keys.index(consumer).reshape(key.block_shape))
            tma.async_copy_global_to_shared(value, at, key_full, values.index(consumer).reshape(value.block_shape))
    for step in range(blocks):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        at = [batch, head, (first + step) * ROWS, 0]
        mbarrier.wait(query_empty.index(stage), phase ^ 1)
        mbarrier.expect(query_full.index(stage), query.block_type.nbytes)
        tma.async_copy_global_to_shared(
            query, at, query_full.index(stage), queries.index(stage).reshape(query.block_shape)
        )
        mbarrier.wait(grad_empty.index(stage), phase ^ 1)
        mbarrier.expect(grad_full.index(stage), grad_output.block_type.nbytes)
        tma.async_copy_global_to_shared(
            grad_output, at, grad_full.index(stage), grads.index(stage).reshape(grad_output.block_shape)
        )


@gluon.jit
def _mask(x, key, query):
    """Zeros x [keys, queries] where the key comes after the query."""
    layout: gl.constexpr = x.type.layout
    k = key + gl.arange(0, x.shape[0], gl.SliceLayout(1, layout))
    q = query + gl.arange(0, x.shape[1], gl.SliceLayout(0, layout))
    return gl.where(q[None, :] >= k[:, None], x, 0.0)


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr, grad_query, grad_key, grad_value, buffers, barriers, bias, score_bias, row_sums,
    key_lengths, query_lengths, scale, bias_stride_b, bias_stride_h, score_bias_stride_b, tokens_q, tokens_k, heads,
    STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, MODE: gl.constexpr, DQ: gl.constexpr,
):  # fmt: skip
    keys, values, queries, grads, slopes, partial = buffers
    key_full, query_full, query_empty, grad_full, grad_empty = barriers
    dtype: gl.constexpr = keys.dtype
    HEAD_DIM: gl.constexpr = keys.shape[2]
    HALF: gl.constexpr = HEAD_DIM // 2
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    halves: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    batch = gl.program_id(1) // heads
    head = gl.program_id(1) % heads
    start = gl.program_id(0) * (CONSUMERS * ROWS)
    mine = start + CONSUMER * ROWS
    first, blocks, valid_queries, valid_keys = _range(
        start, batch, key_lengths, query_lengths, tokens_q, tokens_k, IS_CAUSAL
    )
    offset = batch.to(gl.int64) * bias_stride_b + head.to(gl.int64) * bias_stride_h
    a, b = logit_coefficients(scale, gl.load(bias + offset), MODE)
    my_key = mine + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
    if score_bias is not None:
        unit, _ = logit_coefficients(1.0, 0.0, MODE)
        added = gl.load(
            score_bias + batch.to(gl.int64) * score_bias_stride_b + my_key, mask=my_key < tokens_k, other=0.0
        )
        b = gl.fma(added, unit, b)[:, None]
    k = keys.index(CONSUMER)
    v = values.index(CONSUMER)
    dk = gl.zeros([ROWS, HEAD_DIM], gl.float32, sums)
    dv = gl.zeros([ROWS, HEAD_DIM], gl.float32, sums)
    no_scores = gl.zeros([ROWS, ROWS], gl.float32, scores)
    if row_sums is not None:
        row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, scores))
    if blocks > 0:
        mbarrier.wait(key_full, 0)
        if key_lengths is not None:
            if mine + ROWS > valid_keys:
                clear_padding(k, valid_keys - mine)
                clear_padding(v, valid_keys - mine)
            if DQ != NONE:
                _both_consumers()  # dQ reads both consumers' keys
        for step in range(blocks):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            row = (first + step) * ROWS
            q = queries.index(stage)
            do = grads.index(stage)
            mbarrier.wait(query_full.index(stage), phase)
            if query_lengths is not None:
                if row + ROWS > valid_queries:
                    mbarrier.wait(grad_full.index(stage), phase)
                    clear_padding(q, valid_queries - row)
                    clear_padding(do, valid_queries - row)
            s = warpgroup_mma(k, q.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            mbarrier.wait(grad_full.index(stage), phase)
            dp = warpgroup_mma(v, do.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            p, slope = sigmoid_and_slope(gl.fma(s, a, b), MODE)
            if IS_CAUSAL:
                if row < mine + ROWS:
                    p = _mask(p, mine, row)
                    slope = _mask(slope, mine, row)
            dv = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), do, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            ds = dp * slope
            if row_sums is not None:
                row_sum += gl.sum(ds, 1)
            ds = ds.to(dtype)
            dk = warpgroup_mma(gl.convert_layout(ds, operand), q, dk, is_async=True)
            if DQ == NONE:
                dv, dk = warpgroup_mma_wait(0, deps=(dv, dk))
                mbarrier.arrive(query_empty.index(stage), count=1)
                mbarrier.arrive(grad_empty.index(stage), count=1)
            else:
                # Two buffers: a consumer may run a block ahead of the other's reads, not two.
                buffer = (step % 2) * CONSUMERS
                slopes.index(buffer + CONSUMER).store(ds)
                fence_async_shared()
                _both_consumers()
                if DQ == HALVES:
                    columns: gl.constexpr = CONSUMER * HALF
                    dq = warpgroup_mma(
                        slopes.index(buffer).permute((1, 0)),
                        keys.index(0).slice(columns, HALF, dim=1),
                        gl.zeros([ROWS, HALF], gl.float32, halves),
                        use_acc=False,
                        is_async=True,
                    )
                    dq = warpgroup_mma(
                        slopes.index(buffer + 1).permute((1, 0)),
                        keys.index(1).slice(columns, HALF, dim=1),
                        dq,
                        is_async=True,
                    )
                    dv, dk = warpgroup_mma_wait(2, deps=(dv, dk))
                    mbarrier.arrive(query_empty.index(stage), count=1)
                    mbarrier.arrive(grad_empty.index(stage), count=1)
                    dq = warpgroup_mma_wait(0, deps=(dq,))
                    tma.store_wait(0)
                    partial.index(CONSUMER).store(dq)
                    fence_async_shared()
                    _reduce_add(
                        grad_query,
                        [batch, head, row, columns],
                        partial.index(CONSUMER).reshape(grad_query.block_shape),
                    )
                else:
                    if step % 2 == CONSUMER:
                        dq = warpgroup_mma(
                            slopes.index(buffer).permute((1, 0)),
                            keys.index(0),
                            gl.zeros([ROWS, HEAD_DIM], gl.float32, sums),
                            use_acc=False,
                            is_async=True,
                        )
                        dq = warpgroup_mma(
                            slopes.index(buffer + 1).permute((1, 0)), keys.index(1), dq, is_async=True
                        )
                        dq = warpgroup_mma_wait(0, deps=(dq,))
                        tma.store_wait(0)
                        partial.index(CONSUMER).store(dq)
                        fence_async_shared()
                        _reduce_add(
                            grad_query,
                            [batch, head, row, 0],
                            partial.index(CONSUMER).reshape(grad_query.block_shape),
                        )
                    dv, dk = warpgroup_mma_wait(0, deps=(dv, dk))
                    mbarrier.arrive(query_empty.index(stage), count=1)
                    mbarrier.arrive(grad_empty.index(stage), count=1)
    factor = output_factor(MODE)
    dv *= factor
    dk *= factor * scale
    if key_lengths is not None:
        valid = mine + gl.arange(0, ROWS, gl.SliceLayout(1, sums)) < valid_keys
        dv = gl.where(valid[:, None], dv, 0.0)
    if row_sums is not None:
        at = gl.program_id(1).to(gl.int64) * tokens_k + my_key
        gl.store(row_sums + at, row_sum * factor, mask=my_key < tokens_k)
    # V has been read for the last time by this consumer, its only reader: dV and dK leave through it.
    v.store(dv.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(grad_value, [batch, head, mine, 0], v.reshape(grad_value.block_shape))
    tma.store_wait(0)
    v.store(dk.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(grad_key, [batch, head, mine, 0], v.reshape(grad_key.block_shape))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=[
    "bias_stride_b", "bias_stride_h", "score_bias_stride_b", "tokens_q", "tokens_k", "heads",
])  # fmt: skip
def sigmoid_backward(
    query, key, value, grad_output, grad_query, grad_key, grad_value, bias, score_bias, row_sums,
    key_lengths, query_lengths, scale, bias_stride_b, bias_stride_h, score_bias_stride_b, tokens_q, tokens_k, heads,
    STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, MODE: gl.constexpr, DQ: gl.constexpr,
):  # fmt: skip
    """Descriptors, bias and lengths → dK, dV, sums of dS over the queries, and dQ / scale added up in float32."""
    HEAD_DIM: gl.constexpr = key.block_shape[3]
    dtype: gl.constexpr = query.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype)
    keys = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD_DIM], layout)
    values = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD_DIM], layout)
    queries = gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEAD_DIM], layout)
    grads = gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEAD_DIM], layout)
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, ROWS], dtype)
    slopes = gl.allocate_shared_memory(dtype, [1 if DQ == NONE else 2 * CONSUMERS, ROWS, ROWS], square)
    WIDTH: gl.constexpr = 32 if DQ == NONE else (HEAD_DIM // 2 if DQ == HALVES else HEAD_DIM)
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], gl.float32)
    partial = gl.allocate_shared_memory(gl.float32, [1 if DQ == NONE else CONSUMERS, ROWS, WIDTH], wide)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    key_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    query_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    query_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    grad_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    grad_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(key_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(query_full.index(stage), count=1)
        mbarrier.init(grad_full.index(stage), count=1)
        mbarrier.init(query_empty.index(stage), count=CONSUMERS)
        mbarrier.init(grad_empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    buffers = (keys, values, queries, grads, slopes, partial)
    barriers = (key_full, query_full, query_empty, grad_full, grad_empty)
    gl.warp_specialize(
        [
            (_consume, (0, grad_query, grad_key, grad_value, buffers, barriers, bias, score_bias, row_sums,
                        key_lengths, query_lengths, scale, bias_stride_b, bias_stride_h, score_bias_stride_b,
                        tokens_q, tokens_k, heads, STAGES, IS_CAUSAL, MODE, DQ)),
            (_consume, (1, grad_query, grad_key, grad_value, buffers, barriers, bias, score_bias, row_sums,
                        key_lengths, query_lengths, scale, bias_stride_b, bias_stride_h, score_bias_stride_b,
                        tokens_q, tokens_k, heads, STAGES, IS_CAUSAL, MODE, DQ)),
            (_produce, (query, key, value, grad_output, buffers, barriers, key_lengths, query_lengths,
                        tokens_q, tokens_k, heads, STAGES, IS_CAUSAL)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor,
    score_bias: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    query_lengths: torch.Tensor | None,
    is_causal: bool,
    is_fast: bool = False,
    is_deterministic: bool = False,
    needs_bias_grad: bool = False,
    needs_score_bias_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `forward`.

    Args:
        grad_output: Like ``query``.
        query: As in `forward`, and so are the others up to ``is_fast``.
        key: As in `forward`.
        value: As in `forward`.
        scale: As in `forward`.
        bias: As in `forward`.
        score_bias: As in `forward`.
        key_lengths: As in `forward`.
        query_lengths: As in `forward`.
        is_causal: As in `forward`.
        is_fast: As in `forward`.
        is_deterministic: Bitwise equal from run to run, by a second pass for the query's gradient.
        needs_bias_grad: Whether the fourth result is wanted.
        needs_score_bias_grad: Whether the fifth result is wanted.

    Returns:
        Gradients of query, key, value, bias [batch, heads] and score_bias [like score_bias], the last two float32
        or None.
    """
    if is_deterministic:
        raise NotImplementedError("the deterministic two-pass backward follows")
    batch, heads, tokens_q, head_dim = query.shape
    tokens_k = key.shape[2]
    if layout_problem("grad_output", grad_output) is not None:
        grad_output = empty_like_tokens(query, head_dim).copy_(grad_output)
    grad_key, grad_value = empty_like_tokens(key, head_dim), empty_like_tokens(value, head_dim)
    grad_query = empty_like_tokens(query, head_dim)
    accumulated = torch.zeros_like(grad_query, dtype=torch.float32)
    row_sums = None
    if needs_bias_grad or needs_score_bias_grad:
        row_sums = torch.empty(batch, heads, tokens_k, dtype=torch.float32, device=query.device)
    split = HALVES if head_dim == 128 else TURNS
    sigmoid_backward[(-(-tokens_k // 128), batch * heads)](
        descriptor(query, 64),
        descriptor(key, 64),
        descriptor(value, 64),
        descriptor(grad_output, 64),
        descriptor(accumulated, 64, 64),
        descriptor(grad_key, 64),
        descriptor(grad_value, 64),
        bias,
        score_bias,
        row_sums,
        key_lengths,
        query_lengths,
        scale,
        bias.stride(0),
        bias.stride(1),
        0 if score_bias is None or score_bias.shape[0] == 1 else score_bias.stride(0),
        tokens_q,
        tokens_k,
        heads,
        STAGES=2,
        IS_CAUSAL=is_causal,
        MODE=FAST.value if is_fast else ACCURATE.value,
        DQ=split.value,
        num_warps=4,
        maxnreg=168,
    )
    factor = scale if is_fast else scale / CURVATURE
    torch.mul(accumulated, factor, out=grad_query)
    grad_bias = row_sums.sum(2) if needs_bias_grad else None
    grad_score_bias = None
    if needs_score_bias_grad:
        grad_score_bias = row_sums.sum(1)
        if score_bias.shape[0] == 1:
            grad_score_bias = grad_score_bias.sum(0, keepdim=True)
    return grad_query, grad_key, grad_value, grad_bias, grad_score_bias

"""What a program of the backward works on, and the warp that loads it; see `backward_kernel`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from stability.attention.hopper.gluon_versions import async_load

ROWS = gl.constexpr(64)  # of a streamed block, and that a consumer holds
CONSUMERS = gl.constexpr(2)
FUSED = gl.constexpr(0)
KEYS = gl.constexpr(1)
QUERIES = gl.constexpr(2)


@gluon.jit
def find_tile(
    held_lengths, streamed_lengths, tokens_held, tokens_streamed, heads,
    IS_CAUSAL: gl.constexpr, PASS: gl.constexpr,
):  # fmt: skip
    """Batch, head, first held row, first streamed block, number of blocks, valid rows held and streamed."""
    tiles = (tokens_held + CONSUMERS * ROWS - 1) // (CONSUMERS * ROWS)
    tile = gl.program_id(0) % tiles
    batch = gl.program_id(0) // tiles // heads
    head = gl.program_id(0) // tiles % heads
    if IS_CAUSAL and PASS == QUERIES:
        tile = tiles - 1 - tile  # the long ones first: they fill the chip to the end
    start = tile * (CONSUMERS * ROWS)
    held = tokens_held
    streamed = tokens_streamed
    if held_lengths is not None:
        held = gl.minimum(gl.load(held_lengths + batch).to(gl.int32), held)
    if streamed_lengths is not None:
        streamed = gl.minimum(gl.load(streamed_lengths + batch).to(gl.int32), streamed)
    first = 0
    end = streamed
    if IS_CAUSAL:
        if PASS == QUERIES:
            end = gl.minimum(streamed, start + CONSUMERS * ROWS)
        else:
            first = start // ROWS
    blocks = gl.maximum((end + ROWS - 1) // ROWS - first, 0)
    return batch, head, start, first, gl.where(start < held, blocks, 0), held, streamed


@gluon.jit
def produce(
    descriptors, buffers, barriers, held_lengths, streamed_lengths, sizes,
    STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, PASS: gl.constexpr,
):  # fmt: skip
    """Keeps TMA loads in flight: what the program holds once, then what passes by, from the last block."""
    held_points, held_values, streamed_points, streamed_values = descriptors
    my_points, my_values, points, values, _, _ = buffers
    held_full, points_full, points_empty, values_full, values_empty = barriers
    tokens_held, tokens_streamed, heads, held_group, streamed_group = sizes
    batch, head, start, first, blocks, _, _ = find_tile(
        held_lengths, streamed_lengths, tokens_held, tokens_streamed, heads, IS_CAUSAL, PASS
    )
    if blocks > 0:
        mbarrier.expect(held_full, 2 * CONSUMERS * held_points.block_type.nbytes)
        for consumer in gl.static_range(CONSUMERS):
            at = [batch, head // held_group, start + consumer * ROWS, 0]
            async_load(held_points, at, held_full, my_points.index(consumer).reshape(held_points.block_shape))
            async_load(held_values, at, held_full, my_values.index(consumer).reshape(held_values.block_shape))
    for step in range(blocks):
        stage = step % STAGES
        phase = (step // STAGES) & 1
        at = [batch, head // streamed_group, (first + blocks - 1 - step) * ROWS, 0]
        mbarrier.wait(points_empty.index(stage), phase ^ 1)
        mbarrier.expect(points_full.index(stage), streamed_points.block_type.nbytes)
        async_load(
            streamed_points,
            at,
            points_full.index(stage),
            points.index(stage).reshape(streamed_points.block_shape),
        )
        mbarrier.wait(values_empty.index(stage), phase ^ 1)
        mbarrier.expect(values_full.index(stage), streamed_values.block_type.nbytes)
        async_load(
            streamed_values,
            at,
            values_full.index(stage),
            values.index(stage).reshape(streamed_values.block_shape),
        )

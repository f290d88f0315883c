"""Which tile a persistent program takes next.

Tiles of equal cost are dealt out beforehand: program i of p takes tiles i, i + p, i + 2p, …

Tiles of unequal cost are drawn from a counter in global memory, zero at the launch, so that whichever program
is free takes the next one. Program i begins with tile i. Its producer draws a successor once it has asked for
the last block of a tile, a few blocks before the consumers are done with it: late enough to balance the load,
early enough to hide the latency of the atomic. The consumers learn the index through a ring in shared memory:

    producer: wait for `empty` of the slot, write the index, arrive at `full`
    consumer: wait for `full` of the slot, read the index, arrive at `empty`

An index past the last tile ends whoever reads it. With two slots the producer loads for a tile that the
consumers have not begun with. An empty tile costs a pass through the ring and its store of zeros.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

SLOTS = gl.constexpr(2)


@gluon.jit
def allocate_ring(CONSUMERS: gl.constexpr):
    """Indices on their way from the producer to the consumers, and the barriers of their slots."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    indices = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    return indices, full, empty


@gluon.jit
def draw(index, draws, counter, ring):
    """The producer's next tile after `index`, its draw number `draws`, which the consumers will `receive`."""
    if counter is None:
        index += gl.num_programs(0)
    else:
        indices, full, empty = ring
        slot = draws % SLOTS
        index = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        mbarrier.wait(empty.index(slot), (draws // SLOTS & 1) ^ 1)
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        indices.index(slot).store(gl.full([1], index, gl.int32, layout))
        mbarrier.arrive(full.index(slot), count=1)
    return index


@gluon.jit
def receive(index, draws, counter, ring):
    """A consumer's next tile after `index`: what `draw` gave the producer."""
    if counter is None:
        index += gl.num_programs(0)
    else:
        indices, full, empty = ring
        slot = draws % SLOTS
        mbarrier.wait(full.index(slot), draws // SLOTS & 1)
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        index = indices.index(slot).load(layout).item()
        mbarrier.arrive(empty.index(slot), count=1)
    return index

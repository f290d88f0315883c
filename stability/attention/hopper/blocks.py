"""Block sizes of the Hopper kernels and their reasons."""

from __future__ import annotations

from typing import NamedTuple

from stability.attention.hopper.gluon_versions import HOLDS_OPERANDS


class ForwardBlocks(NamedTuple):
    """How a forward program divides its work."""

    consumers: int  # warpgroups of 64 query rows
    keys: int  # per block
    stages: int  # blocks of K and of V in flight
    is_query_in_registers: bool
    launch_registers: int  # per thread, before warps trade them
    consumer_registers: int  # per thread of a consumer, afterwards


def forward_blocks(head_dim: int, is_causal: bool, has_score_bias: bool) -> ForwardBlocks:
    """The measured best for ``head_dim`` 64 or 128.

    A consumer thread holds head_dim / 2 sums, and of a 64 × 128 block 64 scores and 32 packed weights. Three
    consumers, whose σ phases cover each other, fit in 64 Ki registers with such blocks at head_dim 64, and
    with blocks of 64 keys at 128 (704 TFLOP/s against 683 with two). A causal diagonal has to cut one block
    only, so no tile may be taller than a block is wide; and a bias per key needs registers of its own: then
    two consumers, with the query in registers too where Gluon lets it stay there, which halves what QKᵀ reads
    from shared memory.
    """
    if head_dim == 64 and (is_causal or has_score_bias):
        return ForwardBlocks(2, 128, 4, HOLDS_OPERANDS.value, 168, 240)
    if head_dim == 64:
        return ForwardBlocks(3, 128, 3, False, 128, 160)
    if is_causal or has_score_bias:
        return ForwardBlocks(2, 128, 2, HOLDS_OPERANDS.value, 168, 240)
    return ForwardBlocks(3, 64, 3, False, 128, 160)

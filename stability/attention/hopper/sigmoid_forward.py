"""Sigmoid attention forward on Hopper: the launch."""

from __future__ import annotations

import torch
from torch import Tensor

from stability.attention.hopper.blocks import forward_blocks
from stability.attention.hopper.forward_kernel import sigmoid_forward
from stability.attention.hopper.launch import descriptor, multiprocessors
from stability.attention.hopper.sigmoid import ACCURATE, FAST
from stability.attention.layout import empty_like_tokens


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    bias: Tensor,
    score_bias: Tensor | None,
    key_lengths: Tensor | None,
    query_lengths: Tensor | None,
    is_causal: bool,
    is_fast: bool = False,
) -> Tensor:
    """σ(scale·QKᵀ + bias + score_bias) V.

    Args:
        query: [batch, heads, tokens_q, head_dim], bfloat16 or float16; see `can_run` for what else is asked.
        key: [batch, key_heads, tokens_k, head_dim].
        value: Like ``key``.
        scale: Factor of the dot products.
        bias: [batch, heads] float32, any strides.
        score_bias: [batch or 1, tokens_k] float32, last axis contiguous, or None.
        key_lengths: [batch] integers, or None: keys from there on are padding.
        query_lengths: [batch] integers, or None: rows from there on are zero.
        is_causal: Query i sees keys 0 … i.
        is_fast: tanh.approx for every σ; see `sigmoid` for its error.

    Returns:
        [batch, heads, tokens_q, head_dim] in the memory order of ``query``.
    """
    batch, heads, tokens_q, head_dim = query.shape
    blocks = forward_blocks(head_dim, is_causal, score_bias is not None)
    output = empty_like_tokens(query, head_dim)
    blocks_q = -(-tokens_q // (64 * blocks.consumers))
    tiles = blocks_q * batch * heads
    counter = None
    if is_causal or key_lengths is not None or query_lengths is not None:
        # Tiles of unequal cost. A counter of its own for each launch: others may run at the same time.
        counter = torch.zeros(1, dtype=torch.int32, device=query.device)
    sigmoid_forward[(min(tiles, multiprocessors(query.device)),)](
        descriptor(query, 64),
        descriptor(key, blocks.keys),
        descriptor(value, blocks.keys),
        descriptor(output, 64),
        bias,
        score_bias,
        key_lengths,
        query_lengths,
        counter,
        bias.stride(0),
        bias.stride(1),
        0 if score_bias is None or score_bias.shape[0] == 1 else score_bias.stride(0),
        scale,
        key.shape[2],
        heads,
        heads // key.shape[1],
        blocks_q,
        tiles,
        CONSUMERS=blocks.consumers,
        STAGES=blocks.stages,
        IS_CAUSAL=is_causal,
        MODE=FAST.value if is_fast else ACCURATE.value,
        QUERY_IN_REGISTERS=blocks.is_query_in_registers,
        CONSUMER_REGISTERS=blocks.consumer_registers,
        num_warps=4,
        maxnreg=blocks.launch_registers,
    )
    return output

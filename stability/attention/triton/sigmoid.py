"""Launches the portable sigmoid attention kernels: what the operator calls when the rule chooses "triton".

:func:`forward` and :func:`backward` have the signatures of every CUDA implementation. Their arguments:

    query, key, value    [batch, heads or key_heads, tokens, dim], any strides; packed: batch 1, all tokens
    scale, is_causal     as in the public function
    bias                 float32 [batch, heads], may be expanded; packed: one row per sequence
    score_bias           float32 [batch or 1, tokens_k], or None
    key_lengths          int64 [batch] on the device, or None; likewise query_lengths
    is_fast              tanh.approx in place of the accurate sigmoid; half precision only
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stability.attention.layout import empty_like_tokens
from stability.attention.packing import Packing
from stability.attention.triton import sigmoid_tiles
from stability.attention.triton.sigmoid_backward import sigmoid_backward_keys, sigmoid_backward_queries
from stability.attention.triton.sigmoid_forward import sigmoid_forward

Tile = tuple[int, int, int, int]  # queries and keys of a block, warps, stages

# By the head dimension rounded up to a power of two. Chosen so that no loop spills and 99 KiB of shared
# memory suffice (compute capability 8.6); tests/stability/attention/triton/test_compiles.py holds them to it.
FORWARD_TILES: dict[int, Tile] = {64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 8, 2)}
KEYS_TILES: dict[int, Tile] = {64: (32, 64, 4, 2), 128: (32, 64, 8, 3), 256: (32, 32, 8, 2)}
QUERIES_TILES: dict[int, Tile] = {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 32, 8, 2)}
# Float32 products run without tensor cores and hold their operands in registers.
FORWARD_TILES_FLOAT32: dict[int, Tile] = {64: (32, 32, 4, 2), 128: (32, 32, 4, 2), 256: (16, 16, 4, 1)}
KEYS_TILES_FLOAT32: dict[int, Tile] = {64: (32, 32, 4, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 1)}
QUERIES_TILES_FLOAT32: dict[int, Tile] = {64: (32, 32, 4, 2), 128: (32, 32, 4, 2), 256: (16, 16, 8, 1)}


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
    packing: Packing | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """σ(scale · Q Kᵀ + score_bias + bias) V.

    `statistics` are two float32 tensors [batch, heads, tokens_q], contiguous, that take Σ σ and max σ(1 − σ)
    of every row, 0 in padding.
    """
    value_dim = value.shape[3]
    output = empty_like_tokens(query, value_dim, is_zeroed=packing is not None)
    row_sum, derivative_max = statistics or (None, None)
    tiles = FORWARD_TILES_FLOAT32 if query.dtype is torch.float32 else FORWARD_TILES
    block_q, block_k, num_warps, num_stages = tiles[_tile_dim(query, value)]
    tokens_q = packing.max_tokens_q if packing is not None else query.shape[2]
    num_blocks = _cdiv(tokens_q, block_q)
    sigmoid_forward[(num_blocks * bias.shape[0] * query.shape[1],)](
        query, key, value,
        *_logit_pointers(bias, score_bias, key_lengths, query_lengths, packing),
        output, row_sum, derivative_max,
        scale, query.shape[1], num_blocks, tokens_q, key.shape[2],
        *_strides(query, packing), *_strides(key, packing), *_strides(value, packing),
        *_strides(output, packing)[:3], *_bias_strides(bias, score_bias),
        *((0, 0) if row_sum is None else _strides(row_sum, packing)[:2]),
        BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages,
        **_constants(query, key, value, is_causal, is_fast),
    )  # fmt: skip
    return output


def backward(
    grad_output: Tensor,
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
    packing: Packing | None = None,
    is_deterministic: bool,
    needs_bias_grad: bool,
    needs_score_bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, bias (float32, its shape) and score_bias (float32, its shape).

    `is_deterministic` is accepted for the common signature: these kernels use no atomics and always are.
    """
    head_dim, value_dim = query.shape[3], value.shape[3]
    batch, heads = bias.shape[0], query.shape[1]
    tokens_q = packing.max_tokens_q if packing is not None else query.shape[2]
    tokens_k = packing.max_tokens_k if packing is not None else key.shape[2]
    is_packed = packing is not None
    grad_query = empty_like_tokens(query, head_dim, is_zeroed=is_packed)
    grad_key = empty_like_tokens(key, head_dim, is_zeroed=is_packed)
    grad_value = empty_like_tokens(value, value_dim, is_zeroed=is_packed)
    is_float32 = query.dtype is torch.float32
    tile_dim = _tile_dim(query, value)
    inputs = (grad_output, query, key, value)
    pointers = (*inputs, *_logit_pointers(bias, score_bias, key_lengths, query_lengths, packing))
    strides = [step for tensor in inputs for step in _strides(tensor, packing)]
    constants = _constants(query, key, value, is_causal, is_fast)

    block_q, block_k, num_warps, num_stages = (KEYS_TILES_FLOAT32 if is_float32 else KEYS_TILES)[tile_dim]
    num_blocks = _cdiv(tokens_k, block_k)
    # Σ dS of every block of keys and of every key: added up below, in a fixed order.
    block_sums = key_sums = None
    if needs_bias_grad or needs_score_bias_grad:
        block_sums = bias.new_zeros((batch, heads, num_blocks))
        key_sums = bias.new_zeros((query.shape[0], heads, key.shape[2]))
    sigmoid_backward_keys[(num_blocks * batch * key.shape[1],)](
        *pointers, grad_key, grad_value, block_sums, key_sums,
        scale, heads, num_blocks, tokens_q, tokens_k,
        *strides, *_strides(grad_key, packing)[:3], *_strides(grad_value, packing)[:3],
        *_bias_strides(bias, score_bias), 0 if is_packed else heads * key.shape[2], key.shape[2],
        BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages, **constants,
    )  # fmt: skip
    block_q, block_k, num_warps, num_stages = (QUERIES_TILES_FLOAT32 if is_float32 else QUERIES_TILES)[
        tile_dim
    ]
    num_blocks = _cdiv(tokens_q, block_q)
    sigmoid_backward_queries[(num_blocks * batch * heads,)](
        *pointers, grad_query,
        scale, heads, num_blocks, tokens_q, tokens_k,
        *strides, *_strides(grad_query, packing)[:3], *_bias_strides(bias, score_bias),
        BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=num_warps, num_stages=num_stages, **constants,
    )  # fmt: skip

    grad_bias = grad_score_bias = None
    if needs_bias_grad and block_sums is not None:
        grad_bias = block_sums.sum(2)
    if needs_score_bias_grad and key_sums is not None and score_bias is not None:
        grad_score_bias = key_sums.sum(1)
        if score_bias.shape[0] == 1:
            grad_score_bias = grad_score_bias.sum(0, keepdim=True)
    return grad_query, grad_key, grad_value, grad_bias, grad_score_bias


def _power_of_2(dim: int) -> int:
    """The least power that holds `dim`, at least 16; Triton's own function takes 10 μs."""
    return max(16, 1 << (dim - 1).bit_length())


def _cdiv(number: int, block: int) -> int:
    return -(-number // block)


def _tile_dim(query: Tensor, value: Tensor) -> int:
    return max(64, _power_of_2(max(query.shape[3], value.shape[3])))


def _logit_pointers(
    bias: Tensor,
    score_bias: Tensor | None,
    key_lengths: Tensor | None,
    query_lengths: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor | None, ...]:
    offsets = (None, None) if packing is None else (packing.query_offsets, packing.key_offsets)
    return bias, score_bias, key_lengths, query_lengths, *offsets


def _strides(tensor: Tensor, packing: Packing | None) -> tuple[int, ...]:
    """Packed sequences are told apart by their offsets, so they share one batch entry."""
    return tensor.stride() if packing is None else (0, *tensor.stride()[1:])


def _bias_strides(bias: Tensor, score_bias: Tensor | None) -> tuple[int, int, int]:
    stride_b, stride_h = bias.stride()
    if score_bias is None or score_bias.shape[0] == 1:
        return stride_b, stride_h, 0
    return stride_b, stride_h, score_bias.stride(0)


def _constants(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, is_fast: bool) -> dict[str, Any]:
    head_dim, value_dim = query.shape[3], value.shape[3]
    method = sigmoid_tiles.TANH if is_fast else sigmoid_tiles.EX2
    if query.dtype is torch.float32:
        method = sigmoid_tiles.FLOAT32
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": _power_of_2(head_dim),
        "BLOCK_V": _power_of_2(value_dim),
        "IS_CAUSAL": is_causal,
        "METHOD": method.value,
    }

"""Gradients of sigmoid attention on Hopper: which passes run, and what is left to add up."""

from __future__ import annotations

import torch
from torch import Tensor

from stability.attention.hopper.backward_kernel import sigmoid_backward
from stability.attention.hopper.backward_schedule import FUSED, KEYS, QUERIES
from stability.attention.hopper.eligibility import layout_problem
from stability.attention.hopper.launch import descriptor
from stability.attention.hopper.sigmoid import ACCURATE, CURVATURE, FAST
from stability.attention.layout import empty_like_tokens

HELD_ROWS = 128  # of a program: two consumers of 64
STREAMED_ROWS = 64


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
    is_deterministic: bool = False,
    needs_bias_grad: bool = False,
    needs_score_bias_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
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
        Gradients of query, key and value, each in the memory order of its tensor, and of bias [batch, heads]
        and score_bias [like score_bias], float32 or None.
    """
    batch, heads, tokens_q, head_dim = query.shape
    key_heads, tokens_k = key.shape[1:3]
    group = heads // key_heads
    if layout_problem("grad_output", grad_output) is not None:
        grad_output = empty_like_tokens(query, head_dim).copy_(grad_output)
    grad_query = empty_like_tokens(query, head_dim)
    if group == 1:
        grad_key, grad_value = empty_like_tokens(key, head_dim), empty_like_tokens(value, head_dim)
    else:  # of shared key heads, every query head gets a gradient of its own first
        grad_key, grad_value = (key.new_empty(batch, heads, tokens_k, head_dim) for _ in range(2))
    row_sums = None
    if needs_bias_grad or needs_score_bias_grad:
        row_sums = torch.empty(batch, heads, tokens_k, dtype=torch.float32, device=query.device)

    arguments = {
        "bias": bias,
        "score_bias": score_bias,
        "scale": scale,
        "bias_stride_b": bias.stride(0),
        "bias_stride_h": bias.stride(1),
        "score_bias_stride_b": 0 if score_bias is None or score_bias.shape[0] == 1 else score_bias.stride(0),
        "heads": heads,
        "STAGES": 2,
        "IS_CAUSAL": is_causal,
        "MODE": FAST.value if is_fast else ACCURATE.value,
        "num_warps": 4,
        "maxnreg": 168,
    }
    tiles = [descriptor(tensor, STREAMED_ROWS) for tensor in (key, value, query, grad_output)]
    accumulated = None if is_deterministic else torch.zeros_like(grad_query, dtype=torch.float32)
    sigmoid_backward[(-(-tokens_k // HELD_ROWS) * batch * heads,)](
        *tiles,
        None if accumulated is None else descriptor(accumulated, STREAMED_ROWS, 64),
        descriptor(grad_key, STREAMED_ROWS),
        descriptor(grad_value, STREAMED_ROWS),
        row_sums=row_sums,
        held_lengths=key_lengths,
        streamed_lengths=query_lengths,
        tokens_held=tokens_k,
        tokens_streamed=tokens_q,
        held_group=group,
        streamed_group=1,
        PASS=KEYS.value if is_deterministic else FUSED.value,
        **arguments,
    )
    if accumulated is not None:
        torch.mul(accumulated, scale if is_fast else scale / CURVATURE, out=grad_query)
    else:
        sigmoid_backward[(-(-tokens_q // HELD_ROWS) * batch * heads,)](
            *tiles[2:],
            *tiles[:2],
            None,
            descriptor(grad_query, STREAMED_ROWS),
            None,
            row_sums=None,
            held_lengths=query_lengths,
            streamed_lengths=key_lengths,
            tokens_held=tokens_q,
            tokens_streamed=tokens_k,
            held_group=1,
            streamed_group=group,
            PASS=QUERIES.value,
            **arguments,
        )
    if group > 1:
        grad_key, grad_value = (
            empty_like_tokens(tensor, head_dim).copy_(
                grad.unflatten(1, (key_heads, group)).sum(2, dtype=torch.float32)
            )
            for tensor, grad in ((key, grad_key), (value, grad_value))
        )
    grad_bias = None if row_sums is None or not needs_bias_grad else row_sums.sum(2)
    grad_score_bias = None
    if row_sums is not None and score_bias is not None and needs_score_bias_grad:
        grad_score_bias = row_sums.sum(1)
        if score_bias.shape[0] == 1:
            grad_score_bias = grad_score_bias.sum(0, keepdim=True)
    return grad_query, grad_key, grad_value, grad_bias, grad_score_bias

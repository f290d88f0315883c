"""Logits of FlexAttention calls, whose score and mask are functions of positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stability.attention.call import AttentionCall
from stability.attention.logits import NEGATIVE_INFINITY
from stability.attention.seen import SeenAttention, UnseenAttentionError, scaled_products


def read_flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    *_: Any,
    **__: Any,
) -> SeenAttention:
    """A call of ``torch.nn.attention.flex_attention.flex_attention``; its arguments.

    `score_mod` and the mask's `mask_mod` are evaluated, by ``torch.vmap`` as FlexAttention itself does, for
    the rows that are measured only.
    """
    if key.shape[0] != query.shape[0]:
        key = key.expand(query.shape[0], -1, -1, -1)
    call = AttentionCall("softmax", query, key, None, False, scale, enable_gqa)
    mask_mod = None if block_mask is None else block_mask.mask_mod
    if score_mod is None and mask_mod is None:
        return SeenAttention(call)

    @torch.no_grad()
    def row_logits(rows: Tensor) -> Tensor:
        logits = scaled_products(call, rows)
        positions = _positions(call, rows)
        if score_mod is not None:
            logits = _over_positions(score_mod, (0,))(logits, *positions).to(logits.dtype)
        if mask_mod is not None:
            logits = logits.masked_fill(~allowed_keys(call, mask_mod, rows), NEGATIVE_INFINITY)
        return logits

    return SeenAttention(call, row_logits)


def read_transformers_flex_attention(
    module: object,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> SeenAttention:
    """A call of Hugging Face transformers' ``flex_attention_forward``; its arguments."""
    if s_aux is not None:
        raise UnseenAttentionError("it has attention sinks, which are added to the denominator afterwards")
    is_score = isinstance(attention_mask, Tensor)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if is_score:
            score = score + attention_mask[batch, 0, row, column]
        if position_bias is not None:
            score = score + position_bias[batch, head, row, column]
        return score

    has_score = softcap is not None or is_score or position_bias is not None
    return read_flex_attention(
        query,
        key,
        value,
        score_mod if has_score else None,
        None if is_score else attention_mask,
        scaling,
        query.shape[1] != key.shape[1],
    )


@torch.no_grad()
def allowed_keys(call: AttentionCall, mask_mod: Callable[..., Tensor], rows: Tensor) -> Tensor:
    """What a mask's function says of rows [batch, rows]: [batch, heads, rows, tokens_k], boolean."""
    return _over_positions(mask_mod, ())(*_positions(call, rows))


def _positions(call: AttentionCall, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions of (batch, head, rows, keys), as functions of FlexAttention take them."""
    batch, heads, tokens_k = *call.query.shape[:2], call.key.shape[2]
    device = call.query.device
    each_batch, each_head = torch.arange(batch, device=device), torch.arange(heads, device=device)
    return each_batch, each_head, rows, torch.arange(tokens_k, device=device)


def _over_positions(function: Callable[..., Tensor], score: tuple[int, ...]) -> Callable[..., Tensor]:
    """Maps a function of scalars ([score,] batch, head, row, key) over all of them; rows differ by batch."""
    for axes in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, 0, None)):
        function = torch.vmap(function, in_dims=(*score, *axes))
    return function

"""Logits of FlashAttention calls, as the ``flash_attn`` package and Hugging Face transformers make them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from stability.attention.call import AttentionCall
from stability.attention.logits import NEGATIVE_INFINITY
from stability.attention.seen import SeenAttention, UnseenAttentionError, scaled_products

_UNLIMITED = (-1, -1)


def read_flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> SeenAttention:
    """A call of ``flash_attn.flash_attn_func``; its arguments, [batch, tokens, heads, head_dim]."""
    call = _call(q.transpose(1, 2), k.transpose(1, 2), softmax_scale)
    return flash_attention(
        call, causal=causal, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes
    )


def read_flash_attn_qkvpacked(qkv: Tensor, *args: Any, **kwargs: Any) -> SeenAttention:
    """A call of ``flash_attn.flash_attn_qkvpacked_func``; [batch, tokens, 3, heads, head_dim]."""
    query, key, value = qkv.unbind(2)
    return read_flash_attn(query, key, value, *args, **kwargs)


def read_flash_attn_kvpacked(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> SeenAttention:
    """A call of ``flash_attn.flash_attn_kvpacked_func``; [batch, tokens, 2, heads, head_dim]."""
    key, value = kv.unbind(2)
    return read_flash_attn(q, key, value, *args, **kwargs)


def read_flash_attn_varlen(*_: Any, **__: Any) -> NoReturn:
    """A call of one of the functions for packed sequences of different lengths."""
    raise UnseenAttentionError(
        "the sequences are packed into one (flash_attn varlen), and their limits are known on the device only"
    )


def read_transformers_flash_attention(
    module: object,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> SeenAttention:
    """A call of transformers' ``flash_attention_forward``; tensors are [batch, heads, tokens, head_dim]."""
    if kwargs.get("cu_seq_lens_q") is not None:
        read_flash_attn_varlen()
    if s_aux is not None:
        raise UnseenAttentionError("it has attention sinks, which flash attention adds to the denominator")
    if kwargs.get("cache") is not None:
        raise UnseenAttentionError("its keys are in a paged cache")
    position_ids = kwargs.get("position_ids")
    if query.shape[0] > 1 or query.shape[2] != key.shape[2]:
        position_ids = None  # transformers takes single sequences only for packed ones
    left = -1 if sliding_window is None else sliding_window - 1
    return flash_attention(
        _call(query, key, scaling),
        causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        window_size=(left, left),
        softcap=softcap or 0.0,
        padding=attention_mask,
        position_ids=position_ids,
    )


def flash_attention(
    call: AttentionCall,
    *,
    causal: bool,
    window_size: tuple[int, int] = _UNLIMITED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    padding: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> SeenAttention:
    """FlashAttention's meanings: causal order and windows are aligned at the last query and key.

    Args:
        call: Query, key and scale.
        causal: Whether query i sees the keys j ≤ i + tokens_k − tokens_q only.
        window_size: Keys seen to the left and to the right of that diagonal; −1 means all.
        softcap: c of c · tanh(logit / c); 0 means none.
        alibi_slopes: [heads] or [batch, heads]; −slope · distance is added.
        padding: [batch, tokens_k], true for tokens that are none.
        position_ids: [1, tokens] of packed sequences: where they do not go on by one, a sequence begins.
    """
    tokens_q, tokens_k = call.query.shape[2], call.key.shape[2]
    left, right = window_size
    if causal:
        right = 0
    is_plain = (left, right) in (_UNLIMITED, (-1, 0)) and (right == -1 or tokens_q == tokens_k)
    if is_plain and not softcap and alibi_slopes is None and padding is None and position_ids is None:
        return SeenAttention(AttentionCall(**{**vars(call), "is_causal": causal}))

    @torch.no_grad()
    def row_logits(rows: Tensor) -> Tensor:
        logits = scaled_products(call, rows)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        # [batch, rows, tokens_k]: how far the key is to the right of the query's diagonal
        distance = torch.arange(tokens_k, device=rows.device) - rows[..., None] - (tokens_k - tokens_q)
        if alibi_slopes is not None:
            slopes = alibi_slopes.detach().reshape(-1, alibi_slopes.shape[-1], 1, 1)
            logits = logits - slopes * distance.abs()[:, None]
        allowed = torch.ones_like(distance, dtype=torch.bool)
        if left >= 0:
            allowed &= distance >= -left
        if right >= 0:
            allowed &= distance <= right
        if padding is not None:
            is_token = padding.bool()[:, -tokens_k:]
            allowed &= is_token[:, None]
            allowed &= is_token[:, -tokens_q:].gather(1, rows)[..., None]  # padding asks nothing
        if position_ids is not None:
            starts = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1
            sequence = starts.cumsum(-1).expand(rows.shape[0], -1)
            allowed &= sequence.gather(1, rows)[..., None] == sequence[:, None]
        return logits.masked_fill(~allowed[:, None], NEGATIVE_INFINITY)

    return SeenAttention(call, row_logits)


def _call(query: Tensor, key: Tensor, scale: float | None) -> AttentionCall:
    return AttentionCall("softmax", query, key, scale=scale, enable_gqa=query.shape[1] != key.shape[1])

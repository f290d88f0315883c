"""How a call of each known attention function is computed by another: its value, dropout and layout.

A function here takes ``attend(call, value, dropout_p)``, which computes, ``read()``, which gives the call in
our terms, and the original function's arguments; it returns what the original would, by other means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stability.attention.call import AttentionCall
from stability.attention.flex import allowed_keys
from stability.attention.seen import SeenAttention, UnseenAttentionError

Attend = Callable[[AttentionCall, Tensor, float], Tensor]
Read = Callable[[], SeenAttention]


def _reroute_torch(
    attend: Attend,
    read: Read,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *_: Any,
    **__: Any,
) -> Tensor:
    call = read().call  # of four dimensions, whatever the arguments have
    num_own = 3 if call.enable_gqa else 2
    batch = torch.broadcast_shapes(query.shape[:-num_own], key.shape[:-num_own])
    value = value.expand(*batch, *value.shape[-num_own:])
    output = attend(call, value.reshape(*call.key.shape[:2], *value.shape[-2:]), dropout_p)
    return output.reshape(*batch, *query.shape[-num_own:-2], *output.shape[-2:])


def _reroute_flex(
    attend: Attend,
    read: Read,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: object = None,
    return_aux: object = None,
) -> Tensor:
    if score_mod is not None:
        raise UnseenAttentionError("a score_mod may do anything to a logit, not only add to it")
    if return_lse or return_aux is not None:
        raise UnseenAttentionError("it asks for the log-sum-exp of its softmax")
    call = read().call
    if block_mask is not None:
        from torch.nn.attention.flex_attention import noop_mask

        if block_mask.mask_mod is noop_mask:
            raise UnseenAttentionError("its block mask has no mask_mod, only blocks")
        rows = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
        call = replace(call, attn_mask=allowed_keys(call, block_mask.mask_mod, rows))
    return attend(call, value.expand(query.shape[0], -1, -1, -1), 0.0)


def _reroute_flash(
    attend: Attend,
    read: Read,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    if return_attn_probs:
        raise UnseenAttentionError("it asks for the probabilities of its softmax")
    seen = read()
    if seen.row_logits is not None:
        raise UnseenAttentionError(
            "windows, soft-cap, ALiBi, and causal order with other numbers of queries than of keys are not "
            "rerouted for flash attention"
        )
    return attend(seen.call, v.transpose(1, 2), dropout_p).transpose(1, 2)


def _reroute_flash_qkvpacked(attend: Attend, read: Read, qkv: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    q, k, v = qkv.unbind(2)
    return _reroute_flash(attend, read, q, k, v, *args, **kwargs)


def _reroute_flash_kvpacked(
    attend: Attend, read: Read, q: Tensor, kv: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    k, v = kv.unbind(2)
    return _reroute_flash(attend, read, q, k, v, *args, **kwargs)


def _reroute_own(
    attend: Attend,
    read: Read,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout_p: float = 0.0,
    **_: Any,
) -> Tensor:
    return attend(read().call, value, dropout_p)


REROUTED: dict[str, Callable[..., Tensor]] = {
    "torch.nn.functional.scaled_dot_product_attention": _reroute_torch,
    "torch.nn.attention.flex_attention.flex_attention": _reroute_flex,
    "flash_attn.flash_attn_func": _reroute_flash,
    "flash_attn.flash_attn_qkvpacked_func": _reroute_flash_qkvpacked,
    "flash_attn.flash_attn_kvpacked_func": _reroute_flash_kvpacked,
    "stability.softmax_attention": _reroute_own,
    "stability.sigmoid_attention": _reroute_own,
}

"""Argument checks shared by every implementation, and the arguments' canonical forms.

Nothing here waits for a device: a value is read only if it is a Python number or lives on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import get_args

import torch
from torch import Tensor

from stability.attention.call import AttentionCall, Mechanism

_MECHANISMS = get_args(Mechanism)
_TRACING_MODES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class LogitTerms:
    """Everything beside q·k that enters the logits, checked and shaped to broadcast against them.

    Attributes:
        scale: Factor of q·k.
        is_causal: Whether query i sees the keys j ≤ i only.
        attn_mask: Four axes, each 1 or that of [batch, heads, tokens_q, tokens_k]; boolean or floating point.
        key_lengths: [batch] int64 on the query's device, within 0 … tokens_k.
        query_lengths: [batch] int64 on the query's device, within 0 … tokens_q; the same tensor as
            `key_lengths` where one was given for both and there are as many keys as queries.
        bias: Sigmoid's bias, a number or a tensor that broadcasts; 0 for softmax.
        score_bias: [batch or 1, 1, 1, tokens_k].
    """

    scale: float
    is_causal: bool
    attn_mask: Tensor | None
    key_lengths: Tensor | None
    query_lengths: Tensor | None
    bias: float | Tensor
    score_bias: Tensor | None


def logit_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and weights: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def padding_of(tokens: Tensor, lengths: Tensor | None) -> Tensor | None:
    """[batch, 1, tokens, 1] for [batch, heads, tokens, dim]: True from each sequence's length on."""
    if lengths is None:
        return None
    position = torch.arange(tokens.shape[2], device=tokens.device)
    return (position >= lengths[:, None])[:, None, :, None]


def can_be_read(tensor: Tensor) -> bool:
    """Whether its values are at hand: on the CPU, and not traced, faked or mapped over by torch.func."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) is Tensor
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and all(torch._C._get_dispatch_mode(mode) is None for mode in _TRACING_MODES)
    )


def logit_terms(call: AttentionCall) -> LogitTerms:
    """Checks a call and brings what enters its logits into canonical form.

    Lengths on the CPU are checked against their range; elsewhere they are clamped to it, because reading
    them would stop the device.

    Args:
        call: The arguments as the caller gave them.

    Returns:
        Terms that every implementation understands.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, value or device.
    """
    if call.mechanism not in _MECHANISMS:
        raise ValueError(f'`mechanism` must be "softmax" or "sigmoid"; got {call.mechanism!r}.')
    _check_query_and_key(call.query, call.key, call.enable_gqa)
    if call.mechanism == "softmax":
        for name, given in (("bias", call.bias), ("score_bias", call.score_bias)):
            if given is not None:
                raise ValueError(
                    f"`{name}` belongs to sigmoid attention; softmax attention takes a float `attn_mask`."
                )
    batch, heads, tokens_q, head_dim = call.query.shape
    tokens_k = call.key.shape[2]
    device = call.query.device
    key_lengths = _lengths("key_lengths", call.key_lengths, batch, tokens_k, device)
    if call.query_lengths is call.key_lengths and tokens_q == tokens_k:  # what follows from them, too, is one
        query_lengths = key_lengths
    else:
        query_lengths = _lengths("query_lengths", call.query_lengths, batch, tokens_q, device)
    return LogitTerms(
        scale=_scale(call.scale, head_dim),
        is_causal=bool(call.is_causal),
        attn_mask=_attn_mask(call.attn_mask, (batch, heads, tokens_q, tokens_k), device),
        key_lengths=key_lengths,
        query_lengths=query_lengths,
        bias=_bias(call, key_lengths) if call.mechanism == "sigmoid" else 0.0,
        score_bias=_score_bias(call.score_bias, batch, tokens_k, device),
    )


def check_value(key: Tensor, value: Tensor) -> None:
    """Checks that `value` goes with an already checked `key`; only their head_dim may differ."""
    _check_tensor("value", value)
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"`value` must have shape {_shape(*key.shape[:3], 'value_dim')} matching `key`; "
            f"got {tuple(value.shape)}."
        )
    _check_same(("key", key), ("value", value))


def check_dropout(dropout_p: float) -> None:
    """Checks that a dropout probability lies in [0, 1)."""
    if not isinstance(dropout_p, Real) or not 0 <= float(dropout_p) < 1:
        raise ValueError(f"`dropout_p` must be a probability in [0, 1); got {dropout_p!r}.")


def _check_query_and_key(query: Tensor, key: Tensor, enable_gqa: bool) -> None:
    _check_tensor("query", query)
    _check_tensor("key", key)
    _check_same(("query", query), ("key", key))
    batch, heads, _, head_dim = query.shape
    key_heads = key.shape[1]
    if key.shape[0] != batch or key.shape[3] != head_dim or (key_heads != heads and not enable_gqa):
        remedy = ""
        if key_heads != heads and heads % key_heads == 0:
            remedy = " Pass enable_gqa=True if groups of query heads share a key head."
        raise ValueError(
            f"`key` must have shape {_shape(batch, heads, 'tokens_k', head_dim)} matching `query`; "
            f"got {tuple(key.shape)}.{remedy}"
        )
    if heads % key_heads:
        raise ValueError(
            "With enable_gqa=True the query heads must be a multiple of the key heads; "
            f"got {heads} and {key_heads}."
        )


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` must be a tensor; got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` must be floating point; got {tensor.dtype}.")
    if tensor.ndim != 4:
        raise ValueError(
            f"`{name}` must have shape [batch, heads, tokens, head_dim]; got {tuple(tensor.shape)}. "
            "Add the missing axes with unsqueeze."
        )
    if tensor.numel() == 0:
        raise ValueError(f"`{name}` must not be empty; got shape {tuple(tensor.shape)}.")


def _check_same(first: tuple[str, Tensor], second: tuple[str, Tensor]) -> None:
    for aspect in ("dtype", "device"):
        expected, got = getattr(first[1], aspect), getattr(second[1], aspect)
        if expected != got:
            kind = TypeError if aspect == "dtype" else ValueError
            raise kind(
                f"`{second[0]}` must have the {aspect} of `{first[0]}`, {expected}; got {got}. "
                "Convert it with .to()."
            )


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"`{name}` must be on the device of `query`, {device}; got {tensor.device}.")


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(head_dim)
    return _finite("scale", scale)


def _finite(name: str, number: float) -> float:
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"`{name}` must be a number or None; got {type(number).__name__}.")
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be finite; got {number}.")
    return float(number)


def _attn_mask(mask: Tensor | None, shape: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"`attn_mask` must be a tensor; got {type(mask).__name__}.")
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise TypeError(
            "`attn_mask` must be boolean (True takes part) or floating point (added to the logits); "
            f"got {mask.dtype}. Convert it with .bool()."
        )
    broadcasts = mask.ndim <= 4 and all(
        axis in (1, full) for axis, full in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not broadcasts:
        raise ValueError(
            "`attn_mask` must broadcast to [batch, heads, tokens_q, tokens_k] = "
            f"{shape}; got {tuple(mask.shape)}."
        )
    _check_device("attn_mask", mask, device)
    return mask[(None,) * (4 - mask.ndim)]


def _lengths(
    name: str, lengths: Tensor | Sequence[int] | None, batch: int, tokens: int, device: torch.device
) -> Tensor | None:
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths, device="cpu")  # whatever device is the default
    if lengths.shape != (batch,):
        raise ValueError(
            f"`{name}` must hold one length per sequence, shape ({batch},); got {tuple(lengths.shape)}."
        )
    if lengths.dtype not in _INTEGERS:
        raise TypeError(f"`{name}` must be integers; got {lengths.dtype}.")
    if can_be_read(lengths):
        low, high = torch.aminmax(lengths)
        if low < 0 or high > tokens:
            raise ValueError(f"`{name}` must lie within 0 and {tokens} tokens; got {lengths.tolist()}.")
    return lengths.to(device=device, dtype=torch.int64, non_blocking=True).clamp(0, tokens)


def _bias(call: AttentionCall, key_lengths: Tensor | None) -> float | Tensor:
    bias = call.bias
    batch, heads = call.query.shape[:2]
    if bias is None:
        dtype = logit_dtype(call.query.dtype)
        if key_lengths is None:
            tokens_k = call.key.shape[2]
            if not torch.compiler.is_compiling():
                return -math.log(tokens_k)
            # The logarithm of a symbol would fix it: a graph for each number of keys, and none to export.
            return -torch.full((), tokens_k, dtype=dtype, device=call.query.device).log()
        lengths = key_lengths.clamp(min=1).to(dtype)
        return -lengths.log().view(batch, 1, 1, 1)
    if not isinstance(bias, Tensor):
        return _finite("bias", bias)
    if not bias.is_floating_point():
        raise TypeError(f"`bias` must be floating point; got {bias.dtype}.")
    if bias.ndim == 0 and bias.device.type == "cpu":
        return bias
    _check_device("bias", bias, call.query.device)
    if bias.ndim == 0:
        return bias
    if bias.shape not in ((heads,), (batch, heads)):
        raise ValueError(
            f"`bias` must be a number or have shape [heads] = ({heads},) or [batch, heads] = "
            f"({batch}, {heads}); got {tuple(bias.shape)}."
        )
    return bias[..., None, None]


def _score_bias(score_bias: Tensor | None, batch: int, tokens_k: int, device: torch.device) -> Tensor | None:
    if score_bias is None:
        return None
    if not isinstance(score_bias, Tensor):
        raise TypeError(f"`score_bias` must be a tensor; got {type(score_bias).__name__}.")
    if not score_bias.is_floating_point():
        raise TypeError(f"`score_bias` must be floating point; got {score_bias.dtype}.")
    if score_bias.shape not in ((tokens_k,), (1, tokens_k), (batch, tokens_k)):
        raise ValueError(
            f"`score_bias` must have one entry per key, shape ({tokens_k},) or ({batch}, {tokens_k}); "
            f"got {tuple(score_bias.shape)}."
        )
    _check_device("score_bias", score_bias, device)
    return score_bias.view(-1, 1, 1, tokens_k)


def _shape(*axes: int | str) -> str:
    return "(" + ", ".join(map(str, axes)) + ")"

"""Sees the attention calls a program makes, its own and this package's, without changing them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional

from stability.attention.api import Observer, observe
from stability.attention.call import AttentionCall


@contextmanager
def observe_attention(observer: Observer) -> Iterator[None]:
    """Calls ``observer`` before every attention call while the context is open.

    Seen are :func:`stability.softmax_attention`, :func:`stability.sigmoid_attention` and
    ``torch.nn.functional.scaled_dot_product_attention`` where it is looked up at the call, as PyTorch's own
    modules do (``nn.MultiheadAttention``, ``nn.TransformerEncoder``). Code that imported the function by name
    before is not seen. The calls themselves, their results and gradients are untouched.

    Args:
        observer: Takes an :class:`~stability.AttentionCall` whose tensors have four dimensions.

    Example:
        >>> import torch
        >>> calls = []
        >>> x = torch.zeros(1, 2, 3, 4)
        >>> with observe_attention(calls.append):
        ...     _ = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        >>> calls[0].mechanism, calls[0].is_causal
        ('softmax', True)
    """
    _torch.add(observer)
    try:
        with observe(observer):
            yield
    finally:
        _torch.remove(observer)


class _TorchInterception:
    """Stands in for torch's function while there is an observer."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []

    def add(self, observer: Observer) -> None:
        if not self._observers:
            # A list of its own: a stand-in that others kept from an earlier time must not report again.
            self._observers = []
            self._original = functional.scaled_dot_product_attention
            self._stand_in = _stand_in(self._original, self._observers)
            functional.scaled_dot_product_attention = self._stand_in
        self._observers.append(observer)

    def remove(self, observer: Observer) -> None:
        self._observers.remove(observer)
        # If somebody else has replaced the function since, theirs calls ours, which only passes on now.
        if not self._observers and functional.scaled_dot_product_attention is self._stand_in:
            functional.scaled_dot_product_attention = self._original


def _stand_in(original: Callable[..., Tensor], observers: list[Observer]) -> Any:
    @functools.wraps(original)
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
        if observers:
            call = _torch_call(*args, **kwargs)
            for observer in tuple(observers):
                observer(call)
        return original(*args, **kwargs)

    return scaled_dot_product_attention


_torch = _TorchInterception()


def _torch_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """A torch call in our terms; [..., tokens, head_dim] becomes [batch, heads, tokens, head_dim]."""
    query, key = _four_dimensional(query), _four_dimensional(key)
    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = _four_dimensional(attn_mask)
    return AttentionCall("softmax", query, key, attn_mask, is_causal, scale, enable_gqa)


def _four_dimensional(tensor: Tensor) -> Tensor:
    if tensor.dim() == 2:
        return tensor[None, None]
    if tensor.dim() == 3:
        return tensor.unsqueeze(1)
    return tensor.flatten(0, tensor.dim() - 4) if tensor.dim() > 4 else tensor

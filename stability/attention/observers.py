"""The one place from which calls of the attention functions can be observed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from stability.attention.call import AttentionCall

Observer = Callable[[AttentionCall], None]

_observers: list[tuple[Observer, Observer | None]] = []


@contextmanager
def observe(callback: Observer, trace: Observer | None = None) -> Iterator[None]:
    """Calls `callback` before every attention computation while the context is open.

    The callback sees valid calls of this process only, on the thread that makes them. It must not change the
    tensors; what it raises reaches the caller of the attention function.

    Args:
        callback: Receives the :class:`AttentionCall`.
        trace: Receives it in the callback's stead where ``torch.compile`` traces the call; traced itself.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> from stability import sigmoid_attention
        >>> x = torch.zeros(1, 2, 3, 4)
        >>> with observe(lambda call: print(call.mechanism, tuple(call.query.shape))):
        ...     _ = sigmoid_attention(x, x, x)
        sigmoid (1, 2, 3, 4)
    """
    _observers.append((callback, trace))
    try:
        yield
    finally:
        _observers.remove((callback, trace))


def is_observed() -> bool:
    """Whether anybody is observing; what is only made for observers need not be made otherwise."""
    return bool(_observers)


def notify(call: AttentionCall) -> None:
    """Shows a call to the observers."""
    for callback, trace in tuple(_observers):
        if not torch.compiler.is_compiling():
            callback(call)
        elif trace is not None:
            trace(call)

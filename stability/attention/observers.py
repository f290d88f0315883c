"""The one place from which calls of the attention functions can be observed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stability.attention.call import AttentionCall

Observer = Callable[[AttentionCall], None]

_observers: list[Observer] = []


@contextmanager
def observe(callback: Observer) -> Iterator[None]:
    """Calls `callback` before every attention computation while the context is open.

    The callback sees valid calls of this process only, on the thread that makes them. It must not change the
    tensors; what it raises reaches the caller of the attention function.

    Args:
        callback: Receives the :class:`AttentionCall`.

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
    _observers.append(callback)
    try:
        yield
    finally:
        _observers.remove(callback)


def is_observed() -> bool:
    """Whether anybody is observing; what is only made for observers need not be made otherwise."""
    return bool(_observers)


def notify(call: AttentionCall) -> None:
    """Shows a call to the observers."""
    for callback in tuple(_observers):
        callback(call)

"""What ``torch.amp.GradScaler`` does to a step: the factor on the loss, and updates that it leaves out.

A scaler that finds an infinite gradient does not call the optimizer, so no hook of the optimizer tells of it.
While somebody observes, the scaler's step reports before and after it does what it always did.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer


class _Observer(NamedTuple):
    before_step: Callable[[Optimizer, Tensor], None]
    after_step: Callable[[Optimizer], None]


_observers: list[_Observer] = []
_originals: list[Any] = []


@contextmanager
def observe_grad_scaler(
    before_step: Callable[[Optimizer, Tensor], None], after_step: Callable[[Optimizer], None]
) -> Iterator[None]:
    """Tells of every enabled scaler in the process while the context is open.

    Args:
        before_step: Called before a scaler decides whether an optimizer steps, with the optimizer and the
            factor that the scaler puts on losses: 0-d, on its device, changed in place later.
        after_step: Called when the optimizer has stepped, or has not.
    """
    observer = _Observer(before_step, after_step)
    if not _observers:
        _originals.append(GradScaler.step)
        GradScaler.step = _reporting(GradScaler.step)  # type: ignore[method-assign]
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
        if not _observers:
            GradScaler.step = _originals.pop()  # type: ignore[method-assign]


def _reporting(original: Any) -> Any:
    @functools.wraps(original)
    def step(self: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        # What the public get_scale() gives, without waiting for the device; a disabled scaler has none.
        factor = getattr(self, "_scale", None) if self.is_enabled() else None
        if factor is None:
            return original(self, optimizer, *args, **kwargs)
        for observer in tuple(_observers):
            observer.before_step(optimizer, factor)
        result = original(self, optimizer, *args, **kwargs)
        for observer in tuple(_observers):
            observer.after_step(optimizer)
        return result

    return step

"""What ``torch.amp.GradScaler`` does to a step: the factor on the loss, and updates that it leaves out.

A scaler that finds an infinite gradient does not call the optimizer, so no hook of the optimizer tells of it.
While somebody observes, two methods of the class report before they do what they always did.
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
    after_scaling: Callable[[Tensor], None]
    before_step: Callable[[Optimizer], None]
    after_step: Callable[[Optimizer], None]


_observers: list[_Observer] = []
_originals: dict[str, Any] = {}


@contextmanager
def observe_grad_scaler(
    after_scaling: Callable[[Tensor], None],
    before_step: Callable[[Optimizer], None],
    after_step: Callable[[Optimizer], None],
) -> Iterator[None]:
    """Tells of every scaler in the process while the context is open.

    Args:
        after_scaling: Called with the factor on a loss: 0-d, on its device, changed in place later.
        before_step: Called with the optimizer before a scaler decides whether it steps.
        after_step: Called when it has stepped, or has not.
    """
    observer = _Observer(after_scaling, before_step, after_step)
    if not _observers:
        _originals.update(scale=GradScaler.scale, step=GradScaler.step)
        GradScaler.scale, GradScaler.step = _reporting_scale(), _reporting_step()  # type: ignore[method-assign]
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
        if not _observers:
            GradScaler.scale, GradScaler.step = _originals["scale"], _originals["step"]  # type: ignore[method-assign]


def _reporting_scale() -> Any:
    original = GradScaler.scale

    @functools.wraps(original)
    def scale(self: GradScaler, outputs: Any) -> Any:
        scaled = original(self, outputs)
        factor = self._scale  # what the public get_scale() gives, without waiting for the device
        if self.is_enabled() and factor is not None:
            for observer in tuple(_observers):
                observer.after_scaling(factor)
        return scaled

    return scale


def _reporting_step() -> Any:
    original = GradScaler.step

    @functools.wraps(original)
    def step(self: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if not self.is_enabled():
            return original(self, optimizer, *args, **kwargs)
        for observer in tuple(_observers):
            observer.before_step(optimizer)
        result = original(self, optimizer, *args, **kwargs)
        for observer in tuple(_observers):
            observer.after_step(optimizer)
        return result

    return step

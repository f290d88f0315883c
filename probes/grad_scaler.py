"""What ``torch.amp.GradScaler`` does to a step: the factor on the loss, and updates that it leaves out.

A scaler that finds an infinite gradient does not call the optimizer, so no hook of the optimizer tells of it.
While somebody observes, two methods of the class report before they do what they always did.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer


class GradScalerObserver(Protocol):
    """Who wants to know."""

    def after_scaling(self, factor: Tensor) -> None:
        """A loss has been multiplied by the factor (0-d, on its device, changed in place later)."""
        ...

    def before_scaler_step(self, optimizer: Optimizer) -> None:
        """The scaler is about to decide whether the optimizer steps."""
        ...

    def after_scaler_step(self, optimizer: Optimizer) -> None:
        """The optimizer has stepped or not."""
        ...


_observers: list[GradScalerObserver] = []
_originals: dict[str, Any] = {}


@contextmanager
def observe_grad_scaler(observer: GradScalerObserver) -> Iterator[None]:
    """Tells ``observer`` of every scaler in the process while the context is open."""
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
            observer.before_scaler_step(optimizer)
        result = original(self, optimizer, *args, **kwargs)
        for observer in tuple(_observers):
            observer.after_scaler_step(optimizer)
        return result

    return step

"""What autocast does to the inputs of attention, and how the computation is kept from it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def cast_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The cast torch makes before its own attention: half and float32 tensors, not float64."""
    if not torch._C._is_any_autocast_enabled():  # a look at each tensor would take 2 µs of a call's 55
        return tensors
    return tuple(
        tensor.to(torch.get_autocast_dtype(tensor.device.type))
        if isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and tensor.dtype is not torch.float64
        and _is_autocast(tensor.device.type)
        else tensor
        for tensor in tensors
    )


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """The inputs already have autocast's dtype; the logits have to stay float32."""
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if _is_autocast(device_type) else nullcontext()


def _is_autocast(device_type: str) -> bool:
    # Asked by name: torch.compile cannot trace torch.amp.is_autocast_available in every version.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)

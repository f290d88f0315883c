"""What a CUDA device can, as often as one likes to ask."""

from __future__ import annotations

from functools import cache

import torch


@cache  # torch's look-up takes some 3 µs, and a training step asks four times for each layer
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Major and minor compute capability of a CUDA device: (9, 0) of a Hopper GPU."""
    return torch.cuda.get_device_capability(device)

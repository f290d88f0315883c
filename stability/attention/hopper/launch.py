"""What every launch needs: TMA descriptors of [batch, heads, tokens, head_dim] views, and the chip's size."""

from __future__ import annotations

from functools import lru_cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

Geometry = tuple[list[int], list[int], list[int], gl.NVMMASharedLayout]


def descriptor(tensor: torch.Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """A TMA descriptor of blocks [1, 1, rows, columns] of a tensor that `layout_problem` lets pass.

    Rows past the last token read as zeros and are not written.
    """
    geometry = _geometry(tensor.shape, tensor.stride(), tensor.element_size(), rows, columns)
    return TensorDescriptor(tensor, *geometry)


@lru_cache(maxsize=1024)  # a step makes eleven for each layer, and layers are alike
def _geometry(
    shape: tuple[int, ...], strides: tuple[int, ...], element_size: int, rows: int, columns: int | None
) -> Geometry:
    """Shape, strides, block shape and shared layout of a descriptor."""
    # The stride of an axis of size 1 may be anything, and TMA wants multiples of 16 bytes.
    read = [stride if size > 1 else shape[3] for size, stride in zip(shape, strides, strict=True)]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * element_size, rank=4)
    return list(shape), read, [1, 1, rows, columns or shape[3]], layout


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent grid run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count

"""What every launch needs: TMA descriptors of [batch, heads, tokens, head_dim] views, and the chip's size."""

from __future__ import annotations

from functools import lru_cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


@lru_cache
def _layout(bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=4)


def descriptor(tensor: torch.Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """A TMA descriptor of blocks [1, 1, rows, columns] of a tensor that `layout_problem` lets pass.

    Rows past the last token read as zeros and are not written.
    """
    block = [1, 1, rows, columns or tensor.shape[3]]
    layout = _layout(tensor.element_size() * 8)
    shape = list(tensor.shape)
    # The stride of an axis of size 1 may be anything, and TMA wants multiples of 16 bytes.
    strides = [stride if size > 1 else shape[3] for size, stride in zip(shape, tensor.stride(), strict=True)]
    return TensorDescriptor(tensor, shape, strides, block, layout)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent grid run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count

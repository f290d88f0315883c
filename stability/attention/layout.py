"""Memory layout of what an implementation allocates; the operator's fake kernels follow the same rule."""

from __future__ import annotations

from torch import Tensor


def empty_like_tokens(tensor: Tensor, dim: int, *, is_zeroed: bool = False) -> Tensor:
    """A dense tensor [batch, heads, tokens, dim] with the order of axes of `tensor`.

    A model that keeps [batch, tokens, heads, dim] gets its output so, and folds the heads without a copy.

    Args:
        tensor: [batch, heads, tokens, any], of which shape, dtype, device and order of axes are taken.
        dim: Size of the last axis.
        is_zeroed: Filled with zeros, not left empty.

    Returns:
        The tensor.
    """
    batch, heads, tokens, _ = tensor.shape
    is_tokens_first = tensor.stride(1) < tensor.stride(2)
    head_stride, token_stride = (dim, heads * dim) if is_tokens_first else (tokens * dim, dim)
    dense = tensor.new_empty_strided(
        (batch, heads, tokens, dim), (heads * tokens * dim, head_stride, token_stride, 1)
    )
    return dense.zero_() if is_zeroed else dense

"""What an implementation allocates lies in memory as the tensors it was given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stability.attention.layout import empty_like_tokens


@pytest.mark.parametrize(
    ("tensor", "strides"),
    [
        (torch.empty(2, 3, 10, 64), (480, 160, 16, 1)),
        (torch.empty(2, 10, 3, 64).transpose(1, 2), (480, 16, 48, 1)),
        (torch.empty(2, 10, 3 * 3 * 64)[..., :192].unflatten(2, (3, 64)).transpose(1, 2), (480, 16, 48, 1)),
        (torch.empty(2, 3, 1, 64), (48, 16, 16, 1)),
    ],
    ids=["heads first", "tokens first", "tokens first, of a wider projection", "one token"],
)
def test_it_is_dense_in_the_order_of_the_tensor(tensor: Tensor, strides: tuple[int, ...]) -> None:
    made = empty_like_tokens(tensor.bfloat16(), 16)
    assert made.shape == (*tensor.shape[:3], 16)
    assert made.stride() == strides
    assert made.dtype is torch.bfloat16


def test_zeros_are_zeros() -> None:
    assert not empty_like_tokens(torch.full((1, 2, 3, 4), torch.nan), 5, is_zeroed=True).any()

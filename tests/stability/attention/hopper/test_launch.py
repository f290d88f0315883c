"""The TMA descriptors of a launch."""

from __future__ import annotations

import pytest
import torch

from stability.attention.hopper.eligibility import COMPILED_WITH, installed_triton

pytest.importorskip("triton", reason="Triton is not installed")
if installed_triton() not in COMPILED_WITH:
    pytest.skip(f"no Gluon as in triton {', '.join(COMPILED_WITH)}", allow_module_level=True)
from stability.attention.hopper.launch import descriptor


def test_a_descriptor_tells_of_its_tensor() -> None:
    projection = torch.zeros(2, 10, 3 * 3 * 64, dtype=torch.bfloat16)
    query, key, _ = (part.unflatten(2, (3, 64)).transpose(1, 2) for part in projection.chunk(3, dim=2))
    for tensor in (query, key):
        made = descriptor(tensor, 128)
        assert made.base is tensor
        assert (made.shape, made.strides) == ([2, 3, 10, 64], [5760, 64, 576, 1])
        assert made.block_shape == [1, 1, 128, 64]
        assert made.layout.element_bitwidth == 16
    sums = descriptor(torch.zeros(2, 3, 10, 128), 64, 64)
    assert sums.block_shape == [1, 1, 64, 64]
    assert sums.layout.element_bitwidth == 32


def test_strides_of_axes_of_one_element_are_ones_that_tma_takes() -> None:
    tensor = torch.zeros(640, dtype=torch.bfloat16).as_strided((1, 1, 10, 64), (3, 5, 64, 1))
    assert descriptor(tensor, 64).strides == [64, 64, 64, 1]

from __future__ import annotations

import pytest
import torch

from stability.adversarial_rows import climb, extreme_rows
from stability.jacobian import softmax_spectral_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_keys", [1, 2, 5])
def test_extreme_rows_are_finite_and_reach_both_ends_of_the_range(num_keys: int, dtype: torch.dtype) -> None:
    rows = extreme_rows(num_keys, dtype, "cpu")
    info = torch.finfo(dtype)
    assert rows.shape[1] == num_keys
    assert rows.dtype == dtype
    assert rows.isfinite().all()
    assert rows.max() == info.max
    assert rows[rows > 0].min() == info.smallest_normal * info.eps
    assert num_keys == 1 or rows.min() == -info.max


def test_climbing_alone_finds_the_worst_row() -> None:
    start = torch.randn(64, 16, dtype=torch.float64)
    climbed = climb(start, 200, torch.Generator().manual_seed(0))
    assert softmax_spectral_norm(start).max() < 0.45
    assert softmax_spectral_norm(climbed).max() > 0.5 - 1e-6
    assert (softmax_spectral_norm(climbed) >= softmax_spectral_norm(start)).all()

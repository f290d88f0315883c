"""The error of the Hopper kernels' σ and its slope: the very PTX, run in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from tests.stability.attention.hopper import ptx

pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")
from stability.attention.hopper import sigmoid

ELEMENTS = 16
RANGES = [(-80, -20), (-20, -12), (-12, -9), (-9, -6), (-6, -3), (-3, 0), (0, 8), (8, 69)]


def folded(x: np.ndarray) -> np.ndarray:
    """As the kernel's one fused multiply-add rounds it."""
    w = x.astype(np.float64) * np.float32(sigmoid.LOG2_E) + np.float32(sigmoid.LOG2_CURVATURE)
    return w.astype(np.float32)


def weights(x: np.ndarray, bias: float, error: float) -> np.ndarray:
    hint = folded(np.full_like(x, bias))
    result = ptx.run(sigmoid._weights_asm(ELEMENTS), np.concatenate([folded(x), hint]), ELEMENTS, error)
    return result / np.float64(np.float32(sigmoid.CURVATURE))


def weights_and_slopes(x: np.ndarray, error: float) -> tuple[np.ndarray, np.ndarray]:
    result = ptx.run(sigmoid._weights_and_slopes_asm(ELEMENTS), folded(x), 2 * ELEMENTS, error)
    result = result / np.float64(np.float32(sigmoid.CURVATURE))
    return result[:ELEMENTS], result[ELEMENTS:]


def largest_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual / expected - 1).max())


def exact(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float64)
    return 1 / (1 + np.exp(-x)), 1 / (2 + np.exp(x) + np.exp(-x))


@pytest.mark.parametrize("error", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_relative_error(low: float, high: float, error: float) -> None:
    x = np.linspace(low, high, 12 * ELEMENTS * 32, dtype=np.float32).reshape(-1, ELEMENTS, 32)
    sorted_and_mixed = np.concatenate([x, np.random.default_rng(0).permutation(x.ravel()).reshape(x.shape)])
    bound = 2.5e-4 if low >= -20 else 1e-5  # further down the logit itself is rounded, to 2⁻¹⁸
    for warp in sorted_and_mixed:
        p, slope = exact(warp)
        for bias in (-9.0, 0.0):
            assert largest_error(weights(warp, bias, error), p) < bound
        actual = weights_and_slopes(warp, error)
        assert largest_error(actual[0], p) < bound
        assert largest_error(actual[1], slope) < bound


def test_the_error_vanishes_where_weights_are_small() -> None:
    for low, bound in ((-9.0, 5e-6), (-14.0, 2e-6)):
        x = np.linspace(low - 1, low, ELEMENTS * 32, dtype=np.float32).reshape(ELEMENTS, 32)
        assert largest_error(weights(x, -9.0, 0.0), exact(x)[0]) < bound


def test_one_large_logit_of_a_warp_changes_no_other_ones_accuracy() -> None:
    x = np.full((ELEMENTS, 32), -9.0, np.float32)
    x[3, 17] = 5.0
    p, slope = exact(x)
    assert largest_error(weights(x, -9.0, 0.0), p) < 3e-6
    assert largest_error(weights_and_slopes(x, 0.0)[1], slope) < 3e-6


def test_extreme_logits() -> None:
    values = np.array([-np.inf, -1e30, -200, 200, 1e30, np.inf, np.nan, -9], np.float32)
    x = np.resize(values, (ELEMENTS, 32))
    with np.errstate(over="ignore"):
        expected = 1 / (1 + np.exp(-x.astype(np.float64)))
    for actual in (weights(x, -9.0, 0.0), weights(x, 0.0, 0.0), weights_and_slopes(x, 0.0)[0]):
        np.testing.assert_allclose(actual, expected, rtol=3e-6, atol=1e-37)
    slopes = weights_and_slopes(x, 0.0)[1]
    np.testing.assert_allclose(slopes, expected * (1 - expected), rtol=3e-6, atol=1e-29)

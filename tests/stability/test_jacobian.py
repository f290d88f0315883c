from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stability.jacobian import (
    JacobianNorms,
    sigmoid_jacobian,
    sigmoid_jacobian_norms,
    softmax_jacobian,
    softmax_jacobian_norms,
    softmax_row_spectral_norm,
    softmax_spectral_norm,
)
from stability.row_moments import softmax_row_moments
from tests.stability import row_jacobian_oracle as oracle

LENGTHS = (1, 2, 5, 63, 111)
EPS = torch.finfo(torch.float64).eps


def rows(num_keys: int) -> dict[str, Tensor]:
    """The rows that closed forms get wrong: named, float64, [num_keys]."""
    generator = torch.Generator().manual_seed(num_keys)

    def normal(scale: float) -> Tensor:
        return torch.randn(num_keys, dtype=torch.float64, generator=generator) * scale

    def leaders(*values: float) -> Tensor:
        return torch.cat([torch.tensor(values, dtype=torch.float64), normal(1.0) - 2])[:num_keys]

    collapsed = torch.full(
        (num_keys,), math.log(1e-9 / (1 - 1e-9) / max(1, num_keys - 1)), dtype=torch.float64
    )
    collapsed[num_keys // 2] = 0
    one_hot = torch.full((num_keys,), -800.0, dtype=torch.float64)
    one_hot[0] = 0
    signs = torch.randint(2, (num_keys,), generator=generator).double() * 2 - 1
    return {
        "random": normal(1.0),
        "sharp": normal(10.0),
        "flat": normal(1e-3),
        "tie of two": leaders(0.5, 0.5),
        "tie of three": leaders(0.5, 0.5, 0.5),
        "near tie": leaders(0.5, 0.5 - 1e-12),
        "nearer tie": leaders(0.5, 0.5 - 2e-16),
        "uniform": torch.zeros(num_keys, dtype=torch.float64),
        "one-hot": one_hot,
        "p1 = 1 - 1e-9": collapsed,
        "logits of ±1e4": signs * 1e4,
        "logits up to ±1e4": (torch.rand(num_keys, dtype=torch.float64, generator=generator) * 2 - 1) * 1e4,
        "offset 1e4": normal(1.0) + 1e4,
    }


CASES = [pytest.param(z, id=f"{n}-{name}") for n in LENGTHS for name, z in rows(n).items()]


def assert_close(actual: Tensor | float, expected: mpmath.mpf, what: str) -> None:
    """1e-12 relative, with an absolute floor of 1e-15."""
    with mpmath.workdps(oracle.DIGITS):
        error = abs(mpmath.mpf(float(actual)) - expected)
    assert error <= max(1e-12 * abs(expected), 1e-15), f"{what}: {float(actual)!r} against {expected}"


@pytest.mark.parametrize("logits", CASES)
def test_softmax_norms_agree_with_mpmath(logits: Tensor) -> None:
    norms = softmax_jacobian_norms(logits)
    for name, expected in oracle.softmax_norms(logits.tolist()).items():
        assert_close(getattr(norms, name), expected, name)
    assert softmax_spectral_norm(logits) == norms.spectral


@pytest.mark.parametrize("logits", CASES)
def test_sigmoid_norms_agree_with_mpmath(logits: Tensor) -> None:
    with mpmath.workdps(oracle.DIGITS):
        powers = [mpmath.exp(-abs(mpmath.mpf(z))) for z in logits.tolist()]
        d = [e / (1 + e) ** 2 for e in powers]
        expected = {
            "frobenius": mpmath.sqrt(mpmath.fsum(x**2 for x in d)),
            "spectral": max(d),
            "infinity": max(d),
            "infinity_to_one": mpmath.fsum(d),
            "trace": mpmath.fsum(d),
            "off_diagonal_share": mpmath.mpf(0),
        }
    norms = sigmoid_jacobian_norms(logits)
    for name, value in expected.items():
        assert_close(getattr(norms, name), value, name)


def test_collapse_is_resolved_in_relative_terms() -> None:
    # The absolute floor of the comparison above would forgive zeros here.
    logits = torch.tensor([0.0, -600.0, -601.0], dtype=torch.float64)
    norms = softmax_jacobian_norms(logits)
    for name, expected in oracle.softmax_norms(logits.tolist()).items():
        assert expected > 0
        assert float(getattr(norms, name)) == pytest.approx(float(expected), rel=1e-12)
    tail = sigmoid_jacobian_norms(torch.full((4,), -600.0, dtype=torch.float64))
    assert float(tail.frobenius) == pytest.approx(2 * math.exp(-600), rel=1e-12)


@pytest.mark.parametrize("name", rows(5))
def test_secular_root_is_the_largest_eigenvalue(name: str) -> None:
    # Two independent solvers: the oracle's bisection and a dense one agree, so the oracle can be trusted.
    logits = rows(5)[name]
    assert_close(softmax_spectral_norm(logits), oracle.eigenvalue(logits.tolist()), name)


def test_spectral_norm_agrees_with_a_dense_eigensolver_on_many_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-6, 2, 500, dtype=torch.float64).unsqueeze(-1)
    for num_keys in (2, 3, 10, 40):
        logits = torch.randn(500, num_keys, dtype=torch.float64, generator=generator) * scales
        expected = torch.linalg.eigvalsh(softmax_jacobian(logits))[:, -1]
        torch.testing.assert_close(softmax_spectral_norm(logits), expected, rtol=1e-13, atol=1e-14)


def test_spectral_norm_of_the_slowest_row_found_is_converged() -> None:
    # Of all rows of up to 1,000 keys, hill climbing found none that a single secular step serves worse.
    logits = torch.tensor([0.0, -0.438065, *[-1.158] * 8], dtype=torch.float64)
    assert_close(softmax_spectral_norm(logits), oracle.softmax_norms(logits.tolist())["spectral"], "spectral")


@pytest.mark.parametrize("num_keys", [1, 2, 3, 5, 8])
def test_infinity_to_one_agrees_with_its_definition(num_keys: int) -> None:
    for name, logits in rows(num_keys).items():
        norms = softmax_jacobian_norms(logits)
        assert_close(norms.infinity_to_one, oracle.infinity_to_one(logits.tolist()), name)
        assert norms.infinity_to_one_is_exact


def test_infinity_to_one_of_long_rows_is_exact_only_with_a_majority_key() -> None:
    majority = torch.zeros(3, 40, dtype=torch.float64)
    majority[:, 7] = torch.tensor([3.67, 5.0, 20.0])  # log 39 = 3.66 would be p₁ = ½
    norms = softmax_jacobian_norms(majority)
    p1 = torch.softmax(majority, dim=-1)[:, 7]
    assert norms.infinity_to_one_is_exact.tolist() == [True, True, True]
    torch.testing.assert_close(norms.infinity_to_one, 4 * p1 * (1 - p1), rtol=1e-6, atol=0)

    uniform = softmax_jacobian_norms(torch.zeros(13, dtype=torch.float64))
    assert not uniform.infinity_to_one_is_exact
    assert uniform.infinity_to_one == 1
    assert softmax_jacobian_norms(torch.zeros(12)).infinity_to_one_is_exact


def test_infinity_to_one_of_many_short_rows_is_enumerated_in_chunks() -> None:
    logits = torch.randn(50, 100, 3, dtype=torch.float64)
    together = softmax_jacobian_norms(logits).infinity_to_one
    assert together.shape == (50, 100)
    assert torch.equal(together[41, 17], softmax_jacobian_norms(logits[41, 17]).infinity_to_one)


@pytest.mark.parametrize("num_keys", LENGTHS)
def test_dense_jacobians_agree_with_autograd(num_keys: int) -> None:
    logits = torch.randn(num_keys, dtype=torch.float64) * 2
    for jacobian, function in (
        (softmax_jacobian, lambda z: torch.softmax(z, dim=-1)),
        (sigmoid_jacobian, torch.sigmoid),
    ):
        expected = torch.func.jacrev(function)(logits)
        torch.testing.assert_close(jacobian(logits), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("jacobian", "norms"),
    [(softmax_jacobian, softmax_jacobian_norms), (sigmoid_jacobian, sigmoid_jacobian_norms)],
)
def test_norms_are_those_of_the_dense_jacobian_with_leading_axes(jacobian, norms) -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64) * 3
    dense, actual = jacobian(logits), norms(logits)
    assert all(field.shape == (2, 3) for field in actual)
    torch.testing.assert_close(actual.frobenius, torch.linalg.matrix_norm(dense))
    torch.testing.assert_close(actual.spectral, torch.linalg.matrix_norm(dense, 2))
    torch.testing.assert_close(actual.infinity, torch.linalg.matrix_norm(dense, math.inf))
    torch.testing.assert_close(actual.trace, torch.linalg.matrix_norm(dense, "nuc"))
    energy = dense.square().sum((-2, -1))
    off_diagonal = energy - dense.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    torch.testing.assert_close(actual.off_diagonal_share, off_diagonal / energy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norms", [softmax_jacobian_norms, sigmoid_jacobian_norms])
def test_half_precision_is_computed_in_float32(norms, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 9).to(dtype)
    actual: JacobianNorms = norms(logits)
    assert all(field.dtype == torch.float32 for field in actual[:-1])
    assert all(torch.equal(a, b) for a, b in zip(actual, norms(logits.float()), strict=True))


@pytest.mark.parametrize("norms", [softmax_jacobian_norms, sigmoid_jacobian_norms])
def test_float32_agrees_with_float64(norms) -> None:
    for num_keys in LENGTHS:
        logits = torch.stack(list(rows(num_keys).values())).float()
        for actual, expected in zip(norms(logits)[:-1], norms(logits.double())[:-1], strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-37)


def test_excluded_keys_are_as_good_as_absent_to_the_unchecked_spectral_norm() -> None:
    inf = math.inf
    logits = torch.tensor(
        [[0.3, -inf, -1.0, 0.7], [-inf, 2.0, -inf, -inf], [-inf] * 4, [1.0, 1.0, -inf, -inf]],
        dtype=torch.float64,
    )
    actual = softmax_row_spectral_norm(logits, softmax_row_moments(logits))
    kept = softmax_spectral_norm(torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64))
    torch.testing.assert_close(
        actual, torch.stack([kept, *torch.tensor([0.0, 0.0, 0.5], dtype=torch.float64)])
    )


finite_rows = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20)
moderate_rows = st.lists(st.floats(-30, 30), min_size=1, max_size=20)


@settings(deadline=None)
@given(values=finite_rows)
def test_bounds_hold_at_every_finite_row(values: list[float]) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    softmax, sigmoid = softmax_jacobian_norms(logits), sigmoid_jacobian_norms(logits)
    assert softmax_jacobian(logits).abs().max() <= 0.25 * (1 + 4 * EPS)
    assert softmax.spectral <= 0.5 * (1 + 4 * EPS)
    assert softmax.infinity <= 0.5 * (1 + 4 * EPS)
    assert softmax.frobenius <= 0.5 * (1 + 8 * EPS)
    assert softmax.infinity_to_one <= 1 + 4 * EPS
    assert sigmoid.spectral <= 0.25 * (1 + 4 * EPS)
    for norms in (softmax, sigmoid):
        assert torch.isfinite(torch.stack(norms[:-1])).all()
        assert norms.spectral <= norms.frobenius * (1 + 8 * EPS)
        assert norms.spectral <= norms.infinity * (1 + 8 * EPS)
        assert norms.frobenius <= norms.trace * (1 + 8 * EPS)
        assert 0 <= norms.off_diagonal_share <= 0.5 * (1 + 8 * EPS)


@settings(deadline=None)
@given(values=finite_rows)
def test_rows_of_the_softmax_jacobian_sum_to_zero(values: list[float]) -> None:
    jacobian = softmax_jacobian(torch.tensor(values, dtype=torch.float64))
    assert torch.equal(jacobian, jacobian.mT)
    assert (jacobian.sum(dim=-1).abs() <= len(values) * EPS * jacobian.diagonal()).all()


@settings(deadline=None)
@given(values=moderate_rows, shift=st.integers(-1000, 1000))
def test_softmax_norms_are_shift_invariant(values: list[float], shift: int) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    norms, shifted = softmax_jacobian_norms(logits), softmax_jacobian_norms(logits + shift)
    for a, b in zip(norms[:-1], shifted[:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=0)


@settings(deadline=None)
@given(values=moderate_rows, seed=st.integers(0, 2**31))
def test_norms_are_permutation_invariant(values: list[float], seed: int) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    for norms in (softmax_jacobian_norms, sigmoid_jacobian_norms):
        for a, b in zip(norms(logits), norms(logits[order]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        softmax_jacobian,
        sigmoid_jacobian,
        softmax_jacobian_norms,
        sigmoid_jacobian_norms,
        softmax_spectral_norm,
    ],
)
class TestBadInput:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_non_finite_logits(self, function, value: float) -> None:
        with pytest.raises(ValueError, match="must be finite"):
            function(torch.tensor([0.0, value]))

    @pytest.mark.parametrize("logits", [torch.zeros(3, 0), torch.tensor(1.0)])
    def test_no_keys(self, function, logits: Tensor) -> None:
        with pytest.raises(ValueError, match=r"shape \[\.\.\., n\] with n ≥ 1"):
            function(logits)

    @pytest.mark.parametrize("logits", [torch.zeros(3, dtype=torch.int64), [0.0, 1.0]])
    def test_no_floating_point_tensor(self, function, logits) -> None:
        with pytest.raises(TypeError, match="must be a floating-point tensor"):
            function(logits)

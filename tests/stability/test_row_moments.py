from __future__ import annotations

import math

import mpmath
import pytest
import torch

from stability.row_moments import sigmoid_derivative, softmax_row_moments
from tests.stability import row_jacobian_oracle as oracle

INF = math.inf


@pytest.mark.parametrize("num_keys", [1, 2, 5, 63])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 300.0])
def test_moments_agree_with_mpmath(num_keys: int, scale: float) -> None:
    logits = torch.randn(num_keys, dtype=torch.float64) * scale
    moments = softmax_row_moments(logits)
    with mpmath.workdps(oracle.DIGITS):
        p = sorted(oracle.softmax(logits.tolist()), reverse=True)
        rest = p[1:]
        expected = {
            "p1": p[0],
            "p2": rest[0] if rest else mpmath.mpf(0),
            "complement": mpmath.fsum(rest),
            "derivative_max": p[0] * mpmath.fsum(rest),
            # ln p₁ = ln(1 − δ) keeps the digits of a δ far below 10⁻⁶⁰
            "entropy": -p[0] * mpmath.log1p(-mpmath.fsum(rest))
            - mpmath.fsum(q * mpmath.log(q) for q in rest),
            "log_sum_exp": mpmath.log(mpmath.fsum(mpmath.exp(z) for z in logits.tolist())),
            **{f"t{k}": mpmath.fsum((q / rest[0]) ** k for q in rest) for k in (1, 2, 3, 4)},
        }
    for name, value in expected.items():
        assert float(getattr(moments, name)) == pytest.approx(float(value), rel=1e-12, abs=1e-300), name
    assert moments.max_logit == logits.max()


def test_collapsed_rows_keep_their_digits() -> None:
    # S₂ − 2S₃ + S₂² is 0 here in float64.
    moments = softmax_row_moments(torch.tensor([0.0, math.log(1e-9), -INF], dtype=torch.float64))
    p2 = 1e-9 / (1 + 1e-9)
    assert float(moments.complement) == pytest.approx(p2, rel=1e-12)
    assert float(moments.frobenius) == pytest.approx(2 * p2 * (1 - p2), rel=1e-12)
    assert float(moments.trace) == pytest.approx(2 * p2 * (1 - p2), rel=1e-12)
    assert float(moments.off_diagonal_share) == pytest.approx(0.5, rel=1e-12)


def test_shares_survive_underflow_of_the_second_probability() -> None:
    moments = softmax_row_moments(torch.tensor([1e4, -1e4, -1e4], dtype=torch.float64))
    assert moments.p2 == 0
    # J = p₂ [[2, −1, −1], [−1, 1, 0], [−1, 0, 1]] to first order.
    assert float(moments.off_diagonal_share) == pytest.approx(4 / 10, rel=1e-12)


def test_excluded_keys_are_as_good_as_absent() -> None:
    kept = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64)
    masked = torch.tensor([-INF, 0.3, -INF, -1.0, 0.7], dtype=torch.float64)
    expected = vars(softmax_row_moments(kept))
    for name, actual in vars(softmax_row_moments(masked)).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-15, atol=0)


@pytest.mark.parametrize("row", [[-INF, 2.0, -INF], [5.0]])
def test_a_single_key_couples_with_nothing(row: list[float]) -> None:
    moments = softmax_row_moments(torch.tensor(row))
    assert (moments.p1, moments.p2, moments.entropy) == (1, 0, 0)
    for name in (
        "complement",
        "trace",
        "frobenius",
        "off_diagonal_share",
        "infinity",
        "spectral_upper_bound",
    ):
        assert getattr(moments, name) == 0, name


def test_a_row_without_keys_is_zero_and_never_nan() -> None:
    moments = softmax_row_moments(torch.full((2, 3), -INF))
    assert moments.max_logit.tolist() == [-INF, -INF]
    assert moments.log_sum_exp.tolist() == [-INF, -INF]
    for name in ("entropy", "p1", "p2", "trace", "frobenius", "off_diagonal_share", "derivative_max"):
        assert getattr(moments, name).tolist() == [0, 0], name


def test_spectral_upper_bound_is_above_the_spectral_norm() -> None:
    logits = torch.randn(300, 12, dtype=torch.float64) * torch.logspace(-3, 1.5, 300).double().unsqueeze(-1)
    for row, bound in zip(logits, softmax_row_moments(logits).spectral_upper_bound, strict=True):
        spectral = torch.linalg.eigvalsh(
            torch.diag(row.softmax(-1)) - torch.outer(row.softmax(-1), row.softmax(-1))
        )
        assert spectral[-1] <= bound * (1 + 1e-12) + 1e-15


@pytest.mark.parametrize("z", [0.0, 1e-9, -0.5, 3.0, -40.0, 40.0, 700.0, -700.0])
def test_sigmoid_derivative_agrees_with_mpmath(z: float) -> None:
    with mpmath.workdps(oracle.DIGITS):
        e = mpmath.exp(-abs(mpmath.mpf(z)))
        expected = float(e / (1 + e) ** 2)
    actual = sigmoid_derivative(torch.tensor(z, dtype=torch.float64)).item()
    assert actual == pytest.approx(expected, rel=1e-15 * 8)


def test_sigmoid_derivative_at_the_ends_of_the_range() -> None:
    ends = torch.tensor([1e308, -1e308, INF, -INF], dtype=torch.float64)
    assert sigmoid_derivative(ends).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_masked_by_the_most_negative_number_leave_the_entropy_finite(dtype):
    logits = torch.full((2, 5), torch.finfo(dtype).min, dtype=dtype)
    logits[0, 0] = 1.0
    logits[1, :2] = 0.0
    entropy = softmax_row_moments(logits).entropy
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(2)], dtype=dtype))


def test_a_nan_logit_comes_out_as_nan():
    moments = softmax_row_moments(torch.tensor([[1.0, math.nan, 0.0]]))
    for value in (moments.entropy, moments.frobenius, moments.trace, moments.derivative_max, moments.p1):
        assert value.isnan().all()

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stability import bounds
from stability.row_moments import sigmoid_derivative

FINITE_VALUES = {torch.float16: 63_488, torch.bfloat16: 65_280, torch.float32: 4_278_190_080}
ARITHMETICS = ("mathematics", "native")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_sigmoid_derivative_bound_holds_at_every_finite_value(dtype, arithmetic, device) -> None:
    check = bounds.verify_sigmoid_derivative_bound(dtype, device, arithmetic=arithmetic)
    assert check.checked == FINITE_VALUES[dtype] == bounds.num_finite_values(dtype)
    assert check.violations == 0
    assert check.holds
    assert 0 <= check.excess <= 4 * 2**-54
    assert abs(check.argmax) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_finite_value_is_evaluated_once(monkeypatch, dtype: torch.dtype) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(
        bounds, "sigmoid_derivative", lambda x: seen.append(x.clone()) or sigmoid_derivative(x)
    )
    monkeypatch.setattr(bounds, "_CPU_CHUNK", 1000)  # does not divide the count: the last chunk is shorter
    check = bounds.verify_sigmoid_derivative_bound(dtype)
    values = torch.cat(seen)
    assert values.isfinite().all()
    assert torch.equal(values.to(dtype).double(), values)
    num_distinct = FINITE_VALUES[dtype] - 1  # +0 and −0 are one number of two patterns
    assert check.checked == len(values) == num_distinct + 1
    assert len(values.unique()) == num_distinct


def test_a_broken_bound_is_returned_with_its_place(monkeypatch) -> None:
    monkeypatch.setattr(bounds, "sigmoid_derivative", lambda x: 1.001 * sigmoid_derivative(x))
    check = bounds.verify_sigmoid_derivative_bound(torch.float16)
    assert not check.holds
    assert check.maximum == 1.001 / 4
    assert check.excess == pytest.approx(0.001 / 4)
    assert check.argmax == 0
    # 1.001 σ′ > ¼ where |x| < 0.0632
    values = torch.arange(0x7C00, dtype=torch.int16).view(torch.float16).double()
    assert check.violations == 2 * int((1.001 * sigmoid_derivative(values) > 0.25).sum())


@pytest.mark.parametrize("bad", [0.3, -0.3, math.nan, math.inf])
def test_one_bad_value_among_all_is_found(monkeypatch, bad: float) -> None:
    monkeypatch.setattr(
        bounds, "sigmoid_derivative", lambda x: torch.where(x == -12.5, bad, sigmoid_derivative(x))
    )
    check = bounds.verify_sigmoid_derivative_bound(torch.bfloat16)
    assert (check.violations, check.argmax, check.holds) == (1, -12.5, False)
    assert check.maximum == pytest.approx(abs(bad), nan_ok=True)


def test_a_fault_of_native_precision_is_found_apart_from_the_mathematics(monkeypatch) -> None:
    monkeypatch.setattr(torch, "sigmoid", lambda x: torch.full_like(x, 1.125))  # s(1 − s) = −0.14
    assert bounds.verify_sigmoid_derivative_bound(torch.bfloat16, arithmetic="native").maximum == 0.140625
    monkeypatch.setattr(torch, "sigmoid", lambda x: torch.full_like(x, 1.5))  # −0.75
    assert not bounds.verify_sigmoid_derivative_bound(torch.bfloat16, arithmetic="native").holds
    assert bounds.verify_sigmoid_derivative_bound(torch.bfloat16, arithmetic="mathematics").holds


def test_the_tolerance_is_the_callers() -> None:
    strict = bounds.verify_sigmoid_derivative_bound(torch.float16, tolerance=-1e-3)
    assert not strict.holds
    assert strict.tolerance == -1e-3


def test_progress_adds_up_to_the_number_of_finite_values() -> None:
    steps: list[int] = []
    bounds.verify_sigmoid_derivative_bound(torch.float16, progress=steps.append)
    assert sum(steps) == bounds.num_finite_values(torch.float16)


def test_the_interval_argument_covers_the_reals(monkeypatch) -> None:
    check = bounds.verify_sigmoid_derivative_bound_on_reals()
    assert check.holds
    assert (check.maximum, check.excess, check.tolerance) == (0.25, 0, 0)
    monkeypatch.setattr(bounds, "_product_form", lambda s: 1001 * s * (1 - s) / 1000)
    assert not bounds.verify_sigmoid_derivative_bound_on_reals().holds


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_bounds_are_attained_and_never_passed_by_more_than_4_ulp(dtype, device) -> None:
    checks = bounds.verify_softmax_jacobian_bounds(dtype=dtype, device=device)
    for check, bound in zip(checks, (0.25, 0.5, 0.5), strict=True):
        assert check.holds
        assert check.bound == bound
        assert bound - 1e-6 <= check.maximum <= bound * (1 + 4 * torch.finfo(dtype).eps)
        assert check.checked > 1000
        top = torch.tensor(check.argmax, dtype=torch.float64).softmax(-1).sort(descending=True).values
        assert top[:2].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)  # p = (½, ½, 0, …)


def test_a_broken_softmax_bound_is_returned(monkeypatch) -> None:
    dense = bounds.softmax_jacobian
    monkeypatch.setattr(bounds, "softmax_jacobian", lambda z: dense(z) * (1 + 1e-14))
    checks = bounds.verify_softmax_jacobian_bounds(num_keys=(2,), num_rows=4, num_climbing_steps=0)
    assert not checks.entry.holds
    assert checks.spectral.holds
    assert checks.infinity.holds


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_dtype_that_cannot_be_enumerated(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="`dtype` must be float16, bfloat16 or float32"):
        bounds.verify_sigmoid_derivative_bound(dtype)


def test_unknown_arithmetic() -> None:
    with pytest.raises(ValueError, match='`arithmetic` must be "mathematics" or "native"'):
        bounds.verify_sigmoid_derivative_bound(arithmetic="exact")  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"num_keys": ()}, {"num_keys": (0, 2)}, {"num_rows": 0}])
def test_counts_below_one(arguments) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        bounds.verify_softmax_jacobian_bounds(**arguments)


def test_softmax_search_in_half_precision() -> None:
    with pytest.raises(ValueError, match="`dtype` must be float32 or float64"):
        bounds.verify_softmax_jacobian_bounds(dtype=torch.float16)

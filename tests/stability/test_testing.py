"""The error-budget assertion accepts what it should and fails where it should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stability.testing import assert_within_error_budget


def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def matrices() -> list[Tensor]:
    return [torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()]


def test_the_plain_result_itself_passes_at_factor_one() -> None:
    inputs = matrices()
    assert_within_error_budget(product(*inputs), product, inputs, factor=1.0)


def test_a_rounding_of_the_exact_result_passes_where_the_plain_one_is_exact() -> None:
    x = torch.ones(4, dtype=torch.bfloat16)
    assert_within_error_budget(torch.full((4,), 1 + 2**-8), lambda x: x + 0, [x.float()], factor=2.0**17)
    assert_within_error_budget(x, lambda x: x + 2**-9, [x], factor=1.0)


def test_one_wrong_entry_fails() -> None:
    inputs = matrices()
    wrong = product(*inputs)
    wrong[3, 4] += 0.5
    with pytest.raises(AssertionError, match=r"Result 0: error \(largest entry\)"):
        assert_within_error_budget(wrong, product, inputs)


def test_a_systematic_error_fails() -> None:
    inputs = matrices()
    with pytest.raises(AssertionError, match=r"Result 0: error \(norm\)"):
        assert_within_error_budget(1.02 * product(*inputs), product, inputs)


def test_nan_fails() -> None:
    inputs = matrices()
    with pytest.raises(AssertionError, match="error .* nan exceeds"):
        assert_within_error_budget(torch.full((32, 32), torch.nan), product, inputs)


def test_the_failing_result_is_named() -> None:
    inputs = matrices()

    def both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a @ b, a + b

    good = both(*inputs)
    assert_within_error_budget(good, both, inputs)
    with pytest.raises(AssertionError, match="Result 1"):
        assert_within_error_budget((good[0], good[1] * 2), both, inputs)
    with pytest.raises(AssertionError, match="Expected 2 results; got 1"):
        assert_within_error_budget(good[0], both, inputs)


def test_wrong_shape_fails() -> None:
    inputs = matrices()
    with pytest.raises(AssertionError, match=r"expected shape \(32, 32\); got \(32,\)"):
        assert_within_error_budget(product(*inputs)[0], product, inputs)


def test_arguments_that_are_not_floating_point_pass_unchanged() -> None:
    x, index = torch.randn(5).half(), torch.tensor([3, 1])
    assert_within_error_budget(x[index] * 2, lambda x, index, factor: x[index] * factor, [x, index, 2])


def test_an_overflow_of_the_plain_definition_is_no_budget_for_anything() -> None:
    x = torch.tensor([300.0, 2.0], dtype=torch.float16)
    for wrong in ([torch.inf, 4.0], [0.0, 4.0], [90_000.0, 5.0]):
        with pytest.raises(AssertionError, match="exceeds its budget"):
            assert_within_error_budget(torch.tensor(wrong), torch.square, [x])
    assert_within_error_budget(torch.tensor([90_000.0, 4.0]), torch.square, [x])


def test_what_is_not_finite_in_float64_either_has_to_be_the_same() -> None:
    x = torch.tensor([0.0, 2.0, -1.0])
    assert_within_error_budget(x.log(), torch.log, [x])
    for place, wrong in ((0, torch.inf), (0, -1e30), (2, 0.0), (1, torch.nan)):
        result = x.log()
        result[place] = wrong
        with pytest.raises(AssertionError, match="exceeds its budget"):
            assert_within_error_budget(result, torch.log, [x])


def test_results_without_entries_pass() -> None:
    x = torch.empty(0, 3)
    assert_within_error_budget(x, torch.exp, [x])

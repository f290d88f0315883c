"""Assertions for numerical tests whose tolerance is measured, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_within_error_budget(
    actual: Tensor | Sequence[Tensor], function: Function, inputs: Sequence[object], *, factor: float = 2.0
) -> None:
    """Asserts that a result is about as accurate as plain arithmetic in the inputs' precision can be.

    The error of `actual` against `function` in float64 must not exceed `factor` times the error that
    `function` itself makes on the same inputs in their own precision. One rounding of the result is always
    allowed. Both the Euclidean norm of the error and its largest entry are held to this. Entries that are not
    finite in float64 have to be the same in `actual`; where only plain arithmetic overflows it says nothing.

    Args:
        actual: What is under test, one tensor or several.
        function: The plain definition; called with the inputs as they are and with them in float64. Returns
            as many tensors as `actual` holds.
        inputs: Positional arguments; floating-point tensors are converted, everything else is passed as is.
        factor: Budget in units of the plain low-precision error.

    Raises:
        AssertionError: A budget is exceeded, a result is not finite where float64's is, or is another than it
            where it is not, or shapes differ.

    Example:
        >>> x = torch.linspace(-4, 4, 9, dtype=torch.bfloat16)
        >>> assert_within_error_budget(x.float().exp().bfloat16(), torch.exp, [x])
        >>> assert_within_error_budget(1 + x, torch.exp, [x])
        Traceback (most recent call last):
        AssertionError: Result 0: error (norm) 52.5 exceeds its budget 0.459 = ...
    """
    exact = _tensors(function(*map(_to_float64, inputs)))
    plain = _tensors(function(*inputs))
    results = _tensors(actual)
    if not len(results) == len(exact) == len(plain):
        raise AssertionError(f"Expected {len(exact)} results; got {len(results)}.")
    for i, (result, truth, low) in enumerate(zip(results, exact, plain, strict=True)):
        if result.shape != truth.shape:
            raise AssertionError(
                f"Result {i}: expected shape {tuple(truth.shape)}; got {tuple(result.shape)}."
            )
        if truth.numel() == 0:  # which has no largest entry
            continue
        rounding = torch.finfo(result.dtype).eps / 2
        wide, errors, low_errors = result.double(), result.double() - truth, low.double() - truth
        is_same = (wide == truth) | (wide.isnan() & truth.isnan())  # the difference of infinities is NaN
        errors = errors.masked_fill(is_same, 0.0)
        # An infinite error of the plain definition would be a budget for anything.
        sizes, low_errors = (x.masked_fill(~x.isfinite(), 0.0) for x in (truth, low_errors))
        for name, order in (("norm", 2), ("largest entry", float("inf"))):
            size, error, low_error = (
                torch.linalg.vector_norm(x.double(), order).item() for x in (sizes, errors, low_errors)
            )
            budget = factor * max(low_error, rounding * size)
            if not error <= budget:  # NaN fails too
                raise AssertionError(
                    f"Result {i}: error ({name}) {error:.3g} exceeds its budget {budget:.3g} = {factor:g} × "
                    f"max(plain low-precision error {low_error:.3g}, one rounding {rounding * size:.3g})."
                )


def _tensors(result: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _to_float64(argument: object) -> object:
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.detach().double().requires_grad_(argument.requires_grad)
    return argument

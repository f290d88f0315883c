"""A step's numbers on the host: parts joined, ratios formed, what serves only those left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from probes.pending import LOSS_FACTOR, Ratio
from probes.quantities import reduction_of, root_sum_of_squares
from probes.record import ALL_LAYERS, Series, StepRecords

GLOBAL_GRAD_NORM = Series(ALL_LAYERS, "grad_norm")
_OF_THE_SCALED_LOSS = ("activation_grad_norm", "_input_grad_norm", "_output_grad_norm")

# Names, their numbers, what those are to be multiplied by, and whether they are standard errors.
Parts = tuple[Sequence[Series], Sequence[float], float, bool]


def join(
    step: int, parts: Iterable[Parts], numbers: Iterable[tuple[Series, float]], ratios: Iterable[Ratio]
) -> StepRecords:
    """The records of a step.

    Args:
        step: The step.
        parts: What was measured, in that order; several parts of one series are joined by its quantity.
        numbers: What was on the host already.
        ratios: What is formed of these.
    """
    # Most series have one part. Lists for them would be thousands of objects a step, which Python's
    # garbage collector goes through: they are made for the others only.
    joined: dict[Series, float] = {}
    several: dict[Series, list[float]] = {}
    errors: dict[Series, list[float]] = {}
    labelled: dict[Series, Series] = {}
    for names, values, factor, is_standard_error in parts:
        for series, number in zip(names, values, strict=True):
            name = series
            if series.kind != "exact":
                # Parts of different kinds (all rows of a short batch, a sample of a long one) are joined.
                name = exact(series)
                labelled[name] = series
            if is_standard_error:
                errors.setdefault(name, []).append(number * factor)
            elif name not in joined:
                joined[name] = number * factor
            else:
                several.setdefault(name, [joined[name]]).append(number * factor)
    for series, number in numbers:
        if series in joined:
            several.setdefault(series, [joined[series]]).append(number)
        else:
            joined[series] = number
    for series, of_series in several.items():
        joined[series] = reduction_of(series.quantity)(of_series)
    if loss_factor := joined.get(LOSS_FACTOR):
        for series in joined:
            if series.quantity in _OF_THE_SCALED_LOSS:
                joined[series] /= loss_factor
    for result, numerator, denominator in ratios:
        # A gradient of zero on both sides has no ratio.
        if joined.get(denominator) and numerator in joined:
            joined[result] = joined[numerator] / joined[denominator]
    grad_norms = [value for s, value in joined.items() if s.quantity in ("grad_norm", "_other_grad_norm")]
    if grad_norms:
        joined[GLOBAL_GRAD_NORM] = root_sum_of_squares(grad_norms)
    recorded = {s: value for s, value in joined.items() if s.quantity[0] != "_"}
    # A mean of k parts has the standard error sqrt(Σ e²)/k; those that are exact have e = 0.
    error_of = {
        s: root_sum_of_squares(of_series) / (len(several[s]) if s in several else 1)
        for s, of_series in errors.items()
    }
    return StepRecords(
        step,
        tuple(labelled.get(series, series) for series in recorded),
        np.array(list(recorded.values()), dtype=np.float64),
        np.array([error_of.get(series, math.nan) for series in recorded], dtype=np.float64),
    )


@lru_cache(maxsize=2**16)
def exact(series: Series) -> Series:
    """The name that a series has where its value is exact."""
    return series._replace(kind="exact")

"""A step's numbers on the host: parts joined, ratios formed, what serves only those left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any

import numpy as np

from probes.pending import LOSS_FACTOR, Ratio
from probes.quantities import reduction_of, root_sum_of_squares
from probes.record import ALL_LAYERS, Series, StepRecords

GLOBAL_GRAD_NORM = Series(ALL_LAYERS, "grad_norm")
_OF_THE_SCALED_LOSS = ("activation_grad_norm", "_input_grad_norm", "_output_grad_norm")
_MAX_KNOWN = 16

# Names, their numbers, what those are to be multiplied by, and whether they are standard errors.
Parts = tuple[Sequence[Series], Sequence[float], float, bool]
_Pick = Callable[[Sequence[float]], Sequence[float]]


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
    ratios = tuple(ratios)
    values: list[float] = []
    names: list[tuple[Sequence[Series], bool]] = []
    key: list[Any] = [ratios]
    for of_part, numbers_of_part, factor, is_standard_error in parts:
        values += numbers_of_part if factor == 1 else [number * factor for number in numbers_of_part]
        names.append((of_part, is_standard_error))
        # Long sequences of names are the same object at every step, and slow to compare.
        key.append((of_part[0] if len(of_part) == 1 else id(of_part), is_standard_error))
    for series, number in numbers:
        values.append(number)
        names.append(((series,), False))
        key.append((series, False))
    known = tuple(key)
    joining = _known.get(known)
    if joining is None:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        joining = _known[known] = _Joining(names, ratios)
    return joining(step, values)


class _Joining:
    """How the numbers of a step become its records: the same way in all steps that measure the same.

    Args:
        names: Of the numbers, in their order, and whether they are standard errors.
        ratios: What is formed of them.
    """

    def __init__(self, names: Sequence[tuple[Sequence[Series], bool]], ratios: Sequence[Ratio]) -> None:
        self._names = names  # kept alive, since the key that this is found by holds their ids
        parts: dict[Series, list[int]] = {}
        errors: dict[Series, list[int]] = {}
        labelled: dict[Series, Series] = {}
        each = [(series, is_error) for of_part, is_error in names for series in of_part]
        for index, (series, is_error) in enumerate(each):
            name = series
            if series.kind != "exact":
                # Parts of different kinds (all rows of a short batch, a sample of a long one) are joined.
                name = exact(series)
                labelled[name] = series
            (errors if is_error else parts).setdefault(name, []).append(index)
        self._firsts = _picker([indices[0] for indices in parts.values()])
        place = {name: index for index, name in enumerate(parts)}
        self._several = [
            (place[name], reduction_of(name.quantity), _picker(indices))
            for name, indices in parts.items()
            if len(indices) > 1
        ]
        self._loss_factor = place.get(LOSS_FACTOR)
        self._of_the_scaled_loss = [i for name, i in place.items() if name.quantity in _OF_THE_SCALED_LOSS]
        self._ratios = [
            (result, place.setdefault(result, len(place)), place[numerator], place[denominator])
            for result, numerator, denominator in ratios
            if numerator in place and denominator in place
        ]
        grad_norms = [i for name, i in place.items() if name.quantity in ("grad_norm", "_other_grad_norm")]
        self._grad_norms = _picker(grad_norms) if grad_norms else None
        self._whole = place.setdefault(GLOBAL_GRAD_NORM, len(place)) if grad_norms else -1
        self._num_formed = len(place) - len(parts)
        recorded = [name for name in place if name.quantity[0] != "_"]
        self._series = tuple(labelled.get(name, name) for name in recorded)
        self._recorded = _picker([place[name] for name in recorded])
        self._errors = [
            (index, _picker(errors[name]), len(parts[name]))
            for index, name in enumerate(recorded)
            if name in errors
        ]

    def __call__(self, step: int, numbers: Sequence[float]) -> StepRecords:
        """The records of a step with these numbers."""
        values = [*self._firsts(numbers), *[math.nan] * self._num_formed]
        for place, reduction, parts in self._several:
            values[place] = reduction(parts(numbers))
        if self._loss_factor is not None and (factor := values[self._loss_factor]):
            for place in self._of_the_scaled_loss:
                values[place] /= factor
        absent = set()
        for result, place, numerator, denominator in self._ratios:
            if values[denominator]:
                values[place] = values[numerator] / values[denominator]
            else:  # a gradient of zero on both sides has no ratio
                absent.add(result)
        if self._grad_norms is not None:
            values[self._whole] = root_sum_of_squares(self._grad_norms(values))
        standard_errors = np.full(len(self._series), math.nan)
        for index, errors, num_parts in self._errors:
            # A mean of k parts has the standard error sqrt(Σ e²)/k; those that are exact have e = 0.
            standard_errors[index] = root_sum_of_squares(errors(numbers)) / num_parts
        recorded = np.array(self._recorded(values), dtype=np.float64)
        records = StepRecords(step, self._series, recorded, standard_errors)
        return records.without(absent) if absent else records


_known: dict[tuple[Any, ...], _Joining] = {}


def _picker(indices: Sequence[int]) -> _Pick:
    """What takes the entries at these indices out of a sequence, as a sequence."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda values: [values[index] for index in indices]


@lru_cache(maxsize=2**16)
def exact(series: Series) -> Series:
    """The name that a series has where its value is exact."""
    return series._replace(kind="exact")

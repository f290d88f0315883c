"""Which layers left their past and their peers, how far and since when: what is plain in the numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from probes.grids import ByQuantity, choose_rows, column_starts, grid
from probes.reading import RecordedSeries
from probes.record import ALL_LAYERS

# Quantities whose size at one layer means something beside the others'. Counts and largest entries scatter.
_COMPARED = (
    "weight_norm",
    "attention/max_logit",
    "attention/entropy",
    "attention/jacobian_frobenius",
    "activation_rms",
    "activation_grad_norm",
    "grad_norm",
)
# A layer that is less than float32's rounding of the largest one is as good as nothing, and numbers below
# float32's normal ones have hardly a digit: from 1e-43 to 1e-38 nothing has happened.
_ROUNDING, _TINY = float(np.finfo(np.float32).eps), float(np.finfo(np.float32).tiny)
_MAX_COLUMNS = 240
_MIN_PEERS = 3  # fewer have no middle
_OUT_OF_RANGE = math.log10(2.0)


class Departure(NamedTuple):
    """How far one layer went.

    Attributes:
        layer: Its name.
        quantity: The one in which it went farthest.
        step: First step from which it stayed a factor of two away (or not finite), up to the farthest
            point; to within one of 240 columns of steps.
        usual: Median of the first quarter of the run.
        farthest: The value farthest away after that; NaN or infinite, at any time, before any other.
        farthest_step: Its step.
        decades: Factor between the two as a power of ten, less what the median of all layers did meanwhile,
            and of what is not next to nothing; infinite where the value is not finite.
    """

    layer: str
    quantity: str
    step: int
    usual: float
    farthest: float
    farthest_step: int
    decades: float


def departures(groups: ByQuantity, order: Sequence[str]) -> list[Departure]:
    """The farthest departure of every layer, the farthest layer first; of equals the earlier one.

    Formula: max over steps of |d|, d = log₁₀(value / usual) − median over layers of the same. What is less,
    before or after, than float32's rounding of the largest layer's usual value counts as that much.

    Args:
        groups: Quantity → layer → series.
        order: Layers in the order of the forward pass.
    """
    best: dict[str, Departure] = {}
    for quantity in _COMPARED:
        for departure in _of_quantity(quantity, groups, order):
            known = best.get(departure.layer)
            if known is None or _rank(departure) < _rank(known):
                best[departure.layer] = departure
    return sorted(best.values(), key=_rank)


def until(groups: ByQuantity, step: int) -> ByQuantity:
    """The series before a step."""
    return {
        quantity: {
            layer: RecordedSeries(one.steps[one.steps < step], one.values[one.steps < step])
            for layer, one in by_layer.items()
        }
        for quantity, by_layer in groups.items()
    }


def _rank(departure: Departure) -> tuple[float, int]:
    return -departure.decades, departure.step


def _of_quantity(quantity: str, groups: ByQuantity, order: Sequence[str]) -> Iterable[Departure]:
    by_layer = {layer: one for layer, one in groups.get(quantity, {}).items() if layer != ALL_LAYERS}
    layers = choose_rows(by_layer, order, max_rows=len(by_layer))
    columns = column_starts((by_layer[layer] for layer in layers), _MAX_COLUMNS)
    if len(columns) < 2:
        return
    cells = grid(by_layer, layers, columns)
    is_recorded = ~np.ma.getmaskarray(cells.values)
    is_finite = is_recorded & np.isfinite(cells.values.data)
    # Zero has no logarithm, and a largest logit may be negative at first: neither is compared.
    values = np.where(is_finite & (cells.values.data > 0), cells.values.data, np.nan)
    num_early = max(1, len(columns) // 4)
    first_late = columns[num_early]
    early = [by_layer[layer].values[by_layer[layer].steps < first_late] for layer in layers]
    usual = _medians([np.where(np.isfinite(one) & (one > 0), one, np.nan) for one in early])
    level = np.log10(usual)[:, None]
    least = math.log10(max(_ROUNDING * np.nanmax(usual, initial=0.0), _TINY))
    decades = np.log10(values) - level
    if len(layers) >= _MIN_PEERS:
        decades -= np.nan_to_num(_medians(decades[level[:, 0] > least].T))
    decades = np.maximum(level + decades, least) - np.maximum(level, least)
    decades[:, :num_early] = np.nan  # how training sets in is no departure
    decades = np.where(is_recorded & ~is_finite, np.inf, np.abs(decades))
    for row, layer in enumerate(layers):
        known = np.flatnonzero(~np.isnan(decades[row]))
        if not known.size:
            continue
        distance = decades[row, known]
        farthest = int(distance.argmax())
        limit = _OUT_OF_RANGE if np.isfinite(distance[farthest]) else np.inf
        inside = np.flatnonzero(distance[: farthest + 1] < limit)
        first = min(int(inside[-1]) + 1 if inside.size else 0, farthest)
        yield Departure(
            layer,
            quantity,
            int(cells.steps[row, known[first]]),
            float(usual[row]),
            float(cells.values.data[row, known[farthest]]),
            int(cells.steps[row, known[farthest]]),
            float(distance[farthest]),
        )


def _medians(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Median of each row's numbers; NaN, without numpy's warning, where it has none."""
    known = [row[~np.isnan(row)] for row in rows]
    return np.array([np.median(row) if row.size else np.nan for row in known])

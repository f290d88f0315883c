"""A quantity of many layers over many steps as a picture's few rows and columns, no spike and no NaN lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

from probes.reading import RecordedSeries
from probes.record import ALL_LAYERS, Series, StepRecords

ByLayer = Mapping[str, RecordedSeries]
ByQuantity = dict[str, dict[str, RecordedSeries]]


class Grid(NamedTuple):
    """Values layer × column of steps.

    Attributes:
        columns: First step of each column, int64 [columns], ascending.
        values: float64 [layers, columns], masked where nothing was recorded. Of several values in a column
            the one that is not finite, or else the one farthest from the layer's median, on a logarithmic
            scale unless a value is negative.
        steps: Step of each value, int64 [layers, columns]; 0 where masked.
    """

    columns: np.ndarray
    values: np.ma.MaskedArray
    steps: np.ndarray


def group_steps(steps: Iterable[StepRecords]) -> ByQuantity:
    """Quantity → layer → series of a flight recorder's steps, whole layers only."""
    points: dict[Series, tuple[list[int], list[float]]] = {}
    for records in steps:
        for series, value in zip(records.series, records.values.tolist(), strict=True):
            if series.head is None:
                at, values = points.setdefault(series, ([], []))
                at.append(records.step)
                values.append(value)
    return _grouped(
        (series, RecordedSeries(np.array(at, np.int64), np.array(values, np.float64)))
        for series, (at, values) in points.items()
    )


def group_tags(run: Mapping[str, RecordedSeries]) -> ByQuantity:
    """The same of a recorded run; markers of alerts and single heads are left out."""
    named = ((Series.from_tag(tag), series) for tag, series in run.items() if not tag.startswith("alert/"))
    return _grouped((name, series) for name, series in named if name.head is None and len(series.steps))


def _grouped(named: Iterable[tuple[Series, RecordedSeries]]) -> ByQuantity:
    groups: ByQuantity = {}
    for name, series in named:
        layer = f"{name.layer}/call_{name.call}" if name.call else name.layer
        groups.setdefault(name.quantity, {})[layer] = series
    return groups


def forward_order(groups: ByQuantity) -> list[str]:
    """Layers as the forward pass came by; without recorded outputs, as the optimizer holds them."""
    for quantity in ("activation_rms", "weight_norm", "grad_norm"):
        if quantity in groups:
            return [layer for layer in groups[quantity] if layer != ALL_LAYERS]
    return []


def choose_rows(
    by_layer: ByLayer,
    order: Sequence[str],
    *,
    pointed: Set[str] = frozenset(),
    preferred: Set[str] = frozenset(),
    max_rows: int,
) -> list[str]:
    """Layers in the order of the forward pass; of too many, those that are named and an even choice.

    Layers that are recorded much more rarely than others are left out: every tenth step measures blocks,
    every two hundredth all layers, and rows that are nearly empty say little.

    Args:
        by_layer: The series of the layers there are.
        order: Layers in the order of the forward pass.
        pointed: Always shown.
        preferred: Shown before others where there is not room for all.
        max_rows: How many there is room for.
    """
    position = {layer: index for index, layer in enumerate(order)}

    def place(layer: str) -> int:
        while layer not in position and "." in layer:  # a module that is never called stands with its parent
            layer = layer.rpartition(".")[0]
        return position.get(layer, len(order))

    fullest = max((len(series.steps) for series in by_layer.values()), default=0)
    layers = [layer for layer, one in by_layer.items() if len(one.steps) > fullest // 2 or layer in pointed]
    layers.sort(key=lambda layer: place(layer.split("/call_")[0]))
    if len(layers) <= max_rows:
        return layers
    kept = {layer for layer in layers if layer in pointed}
    kept |= set([layer for layer in layers if layer in preferred][: max_rows // 2])
    others = [layer for layer in layers if layer not in kept]
    room = max(max_rows - len(kept), 0)
    kept |= {others[i * len(others) // room] for i in range(room)}
    return [layer for layer in layers if layer in kept]


def column_starts(series: Iterable[RecordedSeries], max_columns: int) -> np.ndarray:
    """First steps of equally wide columns over all that was recorded; one a step while there is room."""
    at = [one.steps for one in series if len(one.steps)]
    if not at:
        return np.zeros(0, np.int64)
    recorded = np.unique(np.concatenate(at))
    num_columns = min(max_columns, len(recorded))
    first, last = int(recorded[0]), int(recorded[-1])
    # Rounded up, in integers: column c begins at the first step whose share of the range is c / num_columns.
    return first - (-np.arange(num_columns, dtype=np.int64) * (last + 1 - first)) // num_columns


def thinned(series: RecordedSeries, columns: np.ndarray) -> RecordedSeries:
    """What a picture can show: of each column the smallest, the largest and the first that is not finite."""
    column = np.searchsorted(columns, series.steps, side="right") - 1
    finite = np.flatnonzero(np.isfinite(series.values))
    broken = np.flatnonzero(~np.isfinite(series.values))
    ordered = finite[np.lexsort((series.values[finite], column[finite]))]
    first_broken = broken[_first_of_each(column[broken])]
    by_column = column[ordered]
    kept = np.unique(
        np.concatenate([ordered[_first_of_each(by_column)], ordered[_last_of_each(by_column)], first_broken])
    )
    return RecordedSeries(series.steps[kept], series.values[kept])


def grid(by_layer: ByLayer, layers: Sequence[str], columns: np.ndarray) -> Grid:
    """Fills a grid.

    Args:
        by_layer: The series; a layer without one has an empty row.
        layers: The rows.
        columns: As of :func:`column_starts`.
    """
    rows = [(row, thinned(by_layer[layer], columns)) for row, layer in enumerate(layers) if layer in by_layer]
    is_log = is_logarithmic(series.values for _, series in rows)
    values = np.ma.masked_all((len(layers), len(columns)))
    steps = np.zeros(values.shape, np.int64)
    for row, series in rows:
        finite = np.isfinite(series.values)
        shown = series.values[finite]
        scaled = np.full(series.values.shape, np.inf)  # what is not finite is farthest of all
        scaled[finite] = np.log10(np.maximum(shown, np.finfo(np.float64).tiny)) if is_log else shown
        if shown.size:
            scaled[finite] = np.abs(scaled[finite] - np.median(scaled[finite]))
        column = np.searchsorted(columns, series.steps, side="right") - 1
        ordered = np.lexsort((scaled, column))
        chosen = ordered[_last_of_each(column[ordered])]
        values[row, column[chosen]] = series.values[chosen]
        steps[row, column[chosen]] = series.steps[chosen]
    return Grid(columns, values, steps)


def is_logarithmic(values: Iterable[np.ndarray]) -> bool:
    """Whether a logarithmic scale shows them: nothing finite is negative, something is positive."""
    finite = [one[np.isfinite(one)] for one in values]
    return all((one >= 0).all() for one in finite) and any((one > 0).any() for one in finite)


def _first_of_each(sorted_groups: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(sorted_groups, prepend=-1) != 0)


def _last_of_each(sorted_groups: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.diff(sorted_groups, append=np.iinfo(np.int64).max) != 0)

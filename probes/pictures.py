"""Which pictures tell of runs: heat maps layer × step and curves, of one run or of several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from probes.grids import ByQuantity, Grid, choose_rows, column_starts, grid, is_logarithmic, thinned
from probes.quantities import QUANTITIES
from probes.reading import RecordedSeries
from probes.record import ALL_LAYERS
from probes.story import unit

MAX_ROWS = 40
MAX_COLUMNS = 240

_USUAL = (
    "grad_norm",
    "weight_norm",
    "activation_rms",
    "activation_grad_norm",
    "attention/entropy",
    "attention/max_logit",
    "attention/jacobian_frobenius",
    "update_ratio",
)


class RunView(NamedTuple):
    """A run as pictures need it.

    Attributes:
        name: Stands over its pictures where there are several runs.
        groups: Quantity → layer → series.
        order: Layers in the order of the forward pass.
        layer: Where something began; pointed at.
        step: When.
        spread: Layers that followed; shown before others where there is not room for all.
    """

    name: str
    groups: ByQuantity
    order: Sequence[str]
    layer: str | None = None
    step: int | None = None
    spread: Sequence[str] = ()


class Panel(NamedTuple):
    """One run's part of a heat map."""

    name: str
    grid: Grid
    layer: str | None
    step: int | None


class HeatMap(NamedTuple):
    """Layer × step of one quantity; the panels share rows, columns and colours.

    Attributes:
        quantity: What is shown.
        unit: Its unit.
        layers: Names of the rows, the first on top.
        num_layers: How many there are, shown or not.
        panels: One a run.
    """

    quantity: str
    unit: str
    layers: Sequence[str]
    num_layers: int
    panels: Sequence[Panel]


class Curve(NamedTuple):
    """One run's line; of the points no more than a picture can show."""

    name: str
    series: RecordedSeries
    step: int | None


class Curves(NamedTuple):
    """One number of the whole model over steps, a line a run."""

    quantity: str
    unit: str
    columns: np.ndarray
    curves: Sequence[Curve]

    @property
    def is_log(self) -> bool:
        """Whether all values are positive."""
        values = [curve.series.values for curve in self.curves]
        return is_logarithmic(values) and all((one[np.isfinite(one)] > 0).all() for one in values)


def quantities(runs: Sequence[RunView], first: Sequence[str] = ()) -> list[str]:
    """What is worth a picture: the first, what the script logs (the loss), then the usual ones."""
    present = dict.fromkeys(quantity for run in runs for quantity in run.groups)
    logged = [quantity for quantity in present if quantity not in QUANTITIES]
    return [quantity for quantity in dict.fromkeys([*first, *logged, *_USUAL]) if quantity in present]


def pictures(
    runs: Sequence[RunView], first: Sequence[str] = (), *, max_maps: int
) -> Iterator[HeatMap | Curves]:
    """The pictures of one or several runs.

    Args:
        runs: The runs; their heat maps stand side by side.
        first: Quantities that come first.
        max_maps: Heat maps at most; curves are small and never left out.
    """
    num_maps = 0
    for quantity in quantities(runs, first):
        has_layers = any(layer != ALL_LAYERS for run in runs for layer in run.groups.get(quantity, ()))
        if any(ALL_LAYERS in run.groups.get(quantity, ()) for run in runs):
            yield curves(quantity, runs)
        if has_layers and num_maps < max_maps:
            num_maps += 1
            yield heat_map(quantity, runs)


def heat_map(quantity: str, runs: Sequence[RunView], max_rows: int = MAX_ROWS) -> HeatMap:
    """Layer × step of a quantity that at least one run has of layers."""
    per_run = [_of_layers(run, quantity) for run in runs]
    # The layers of all runs; of one that several have, the longest series says how often it is recorded.
    joined: dict[str, RecordedSeries] = {}
    for by_layer in per_run:
        for layer, series in by_layer.items():
            if layer not in joined or len(joined[layer].steps) < len(series.steps):
                joined[layer] = series
    order = max((run.order for run in runs), key=len)
    pointed = {run.layer for run in runs if run.layer is not None}
    spread = {layer for run in runs for layer in run.spread}
    layers = choose_rows(joined, order, pointed=pointed, preferred=spread, max_rows=max_rows)
    shown = [by_layer[layer] for by_layer in per_run for layer in layers if layer in by_layer]
    columns = column_starts(shown, MAX_COLUMNS // len(runs))
    panels = [
        Panel(run.name, grid(by_layer, layers, columns), run.layer, run.step)
        for run, by_layer in zip(runs, per_run, strict=True)
    ]
    return HeatMap(quantity, unit(quantity), layers, len(joined), panels)


def curves(quantity: str, runs: Sequence[RunView]) -> Curves:
    """A quantity of the whole model, which at least one run has."""
    found = [
        (run, run.groups[quantity][ALL_LAYERS]) for run in runs if ALL_LAYERS in run.groups.get(quantity, ())
    ]
    columns = column_starts((series for _, series in found), MAX_COLUMNS)
    lines = [Curve(run.name, thinned(series, columns), run.step) for run, series in found]
    return Curves(quantity, unit(quantity), columns, lines)


def _of_layers(run: RunView, quantity: str) -> Mapping[str, RecordedSeries]:
    return {layer: one for layer, one in run.groups.get(quantity, {}).items() if layer != ALL_LAYERS}

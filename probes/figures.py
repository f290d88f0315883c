"""The pictures of a report as PNG files, by matplotlib and without a screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probes import charts
from probes.colour_scale import NOT_RECORDED, NUM_COLOURS, palette
from probes.pictures import Curves, HeatMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120
_LARGEST = 1e100
_NAME_BYTES = 150  # a file's name may have 255
_DASHES = ("-", "--", ":", "-.")
_COLOURS = ("#222222", "#2f86d6", "#c9700a", "#c2559b")


def write_figures(shown: Sequence[HeatMap | Curves], folder: Path, stem: str) -> list[Path]:
    """Writes ``stem-quantity.png`` for every picture, ``stem-quantity-model.png`` for one of the whole model.

    Args:
        shown: The pictures.
        folder: Where the files go.
        stem: What their names begin with.

    Raises:
        OSError: If they cannot be written.
    """
    paths: list[Path] = []
    for picture in shown:
        is_map = isinstance(picture, HeatMap)
        figure = _heat_map(picture) if isinstance(picture, HeatMap) else _curves(picture)
        name = "".join(c if c.isalnum() or c in "_-" else "-" for c in picture.quantity)
        name = name.encode()[:_NAME_BYTES].decode(errors="ignore")
        name = f"{stem}-{name}{'' if is_map else '-model'}"
        path, number = folder / f"{name}.png", 1
        while path in paths:  # what the script logs may differ in one of the other characters alone
            number += 1
            path = folder / f"{name}-{number}.png"
        figure.savefig(path, dpi=_DPI)
        paths.append(path)
    return paths


def _heat_map(chart: HeatMap) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm, Normalize
    from matplotlib.figure import Figure

    scale = charts.scale_of(chart)
    figure = Figure(figsize=(10, 1.6 + 0.2 * len(chart.layers)), layout="constrained")
    all_axes = figure.subplots(1, len(chart.panels), sharey=True, squeeze=False)[0]
    opaque = np.full((256, 1), 255, np.uint8)
    colours = np.concatenate([palette(), opaque], axis=1)
    colours[NOT_RECORDED, 3] = 0
    for axes, panel in zip(all_axes, chart.panels, strict=True):
        columns = panel.grid.columns
        image = charts.pixels(panel.grid, scale, max(2, 720 // max(len(columns), 1)), 18)
        axes.imshow(
            colours[image],
            aspect="auto",
            interpolation="nearest",
            extent=(-0.5, len(columns) - 0.5, len(chart.layers) - 0.5, -0.5),
        )
        _name_steps(axes, columns, panel.step, max(2, 6 // len(chart.panels)))
        if len(chart.panels) > 1:
            axes.set_title(
                charts.shortened(panel.name, 90 // len(chart.panels)), fontsize=9, pad=16, parse_math=False
            )
    pointed = {panel.layer for panel in chart.panels}
    labels = zip(chart.layers, charts.row_labels(chart.layers), strict=True)
    names = [f"{label} ▶" if layer in pointed else label for layer, label in labels]
    all_axes[0].set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    for label, layer in zip(all_axes[0].get_yticklabels(), chart.layers, strict=True):
        label.set_fontweight("bold" if layer in pointed else "normal")
    figure.suptitle(charts.title(chart, scale.is_log), fontsize=10, parse_math=False)
    if scale.has_values:
        low, high = _drawable(np.array([scale.value(0.0), scale.value(1.0)]), is_log=scale.is_log)
        norm = LogNorm if scale.is_log and high > low else Normalize
        shades = ScalarMappable(norm(low, high), ListedColormap(palette()[1 : NUM_COLOURS + 1] / 255))
        bar = figure.colorbar(shades, ax=list(all_axes), pad=0.01)
        bar.set_label(f"{chart.quantity} ({chart.unit})", parse_math=False)
    return figure


def _curves(chart: Curves) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots()
    for index, curve in enumerate(chart.curves):
        column = np.searchsorted(chart.columns, curve.series.steps, side="right") - 1
        finite = np.isfinite(curve.series.values)
        axes.plot(
            column,
            np.where(finite, _drawable(curve.series.values, is_log=chart.is_log), np.nan),
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_DASHES[index % len(_DASHES)],
            label=f" {curve.name}",  # matplotlib leaves out names that begin with an underscore
        )
        for x in column[~finite]:
            axes.text(x, 0.98, "×", transform=axes.get_xaxis_transform(), ha="center", va="top")
    if chart.is_log:
        axes.set_yscale("log")
    axes.set_ylabel(f"{chart.quantity} ({chart.unit})", parse_math=False)
    onset = next((curve.step for curve in chart.curves if curve.step is not None), None)
    _name_steps(axes, chart.columns, onset, 6)
    if len(chart.curves) > 1:  # beside the plot, where it covers nothing
        for text in figure.legend(loc="outside right upper", fontsize=8).get_texts():
            text.set(parse_math=False)
    figure.suptitle(charts.title(chart, chart.is_log), fontsize=10, parse_math=False)
    return figure


def _drawable(values: np.ndarray, *, is_log: bool) -> np.ndarray:
    """Values within what matplotlib's axes and their numbers can hold."""
    return np.clip(values, 1 / _LARGEST if is_log else -_LARGEST, _LARGEST)


def _name_steps(axes: Axes, columns: np.ndarray, onset: int | None, num_labels: int) -> None:
    """Steps under the plot, and an arrow above the one where it began."""
    axes.set_xlabel("step")
    at = np.unique(np.linspace(0, len(columns) - 1, min(len(columns), num_labels)).round().astype(int))
    axes.set_xticks(at, [str(step) for step in columns[at]], fontsize=8)
    if len(at) > 1:  # within the plot, beside which another may stand
        labels = axes.get_xticklabels()
        labels[0].set_horizontalalignment("left")
        labels[-1].set_horizontalalignment("right")
    if onset is not None and len(columns) and columns[0] <= onset:
        column = int(np.searchsorted(columns, onset, side="right")) - 1
        side = "left" if column < len(columns) / 2 else "right"
        text = f"▼ step {onset}" if side == "left" else f"step {onset} ▼"
        axes.text(column, 1.01, text, transform=axes.get_xaxis_transform(), ha=side, fontsize=8)

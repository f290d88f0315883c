"""Heat maps and curves as SVG within an HTML page: in light and dark, in colour and in black and white."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from probes.colour_scale import BLACK, NOT_RECORDED, NUM_COLOURS, WHITE, colour, palette
from probes.grids import Grid, is_logarithmic
from probes.pictures import Curves, HeatMap
from probes.quantities import QUANTITIES

_LABEL_WIDTH, _PLOT_WIDTH, _BAR_WIDTH = 250, 720, 130
_MIN_PANEL_WIDTH, _GAP = 160, 16
_ROW_HEIGHT, _TOP, _BOTTOM = 18, 48, 26
_LINE_HEIGHT = 150
_MAX_LABEL = 32  # characters
# Beside the text's own colour: blue, orange, magenta of like lightness on white and on black; then again.
_LINE_COLOURS = ("currentColor", "#2f86d6", "#c9700a", "#c2559b")
_DASHES = ("none", "7 3", "2 3", "9 3 2 3", "12 4 4 4")


class Scale(NamedTuple):
    """From values to shares of a colour scale or an axis.

    Attributes:
        low: Smallest shown, as a logarithm if ``is_log``.
        high: Largest.
        is_log: Whether the scale is logarithmic.
        has_values: Whether anything is finite.
    """

    low: float
    high: float
    is_log: bool
    has_values: bool

    @classmethod
    def of(cls, values: np.ndarray, *, is_log: bool) -> Scale:
        """The scale that holds all finite values; a logarithmic one begins at the smallest positive."""
        shown = values[np.isfinite(values)]
        if is_log:
            shown = np.log10(np.maximum(shown, shown[shown > 0].min()))
        return (
            cls(float(shown.min()), float(shown.max()), is_log, True)
            if shown.size
            else cls(0, 0, False, False)
        )

    def share(self, values: np.ndarray) -> np.ndarray:
        """0 at the low end, 1 at the high one, ½ where they are the same; of finite values."""
        half = self.high / 2 - self.low / 2  # the whole may be more than float64 holds
        if half == 0:
            return np.full(values.shape, 0.5)
        scaled = np.log10(np.maximum(values, 10**self.low)) if self.is_log else values
        return np.clip((scaled / 2 - self.low / 2) / half, 0, 1)

    def value(self, share: float) -> float:
        """What stands at a share."""
        scaled = (1 - share) * self.low + share * self.high
        with np.errstate(over="ignore"):
            return float(min(np.float64(10) ** scaled, np.finfo(np.float64).max)) if self.is_log else scaled


def heat_map(chart: HeatMap) -> str:
    """An SVG of layer × step, the first layer on top, a panel a run.

    The scale is logarithmic unless a value is negative. What is not finite is a checkerboard; what was not
    recorded stays empty.
    """
    scale = scale_of(chart)
    num_panels = len(chart.panels)
    width = max(_MIN_PANEL_WIDTH, (_PLOT_WIDTH - (num_panels - 1) * _GAP) // num_panels)
    height = len(chart.layers) * _ROW_HEIGHT
    pointed = {panel.layer for panel in chart.panels}
    parts = [_heading(title(chart, scale.is_log))]
    for row, (layer, label) in enumerate(zip(chart.layers, row_labels(chart.layers), strict=True)):
        is_onset = layer in pointed
        onset = ' class="onset"' if is_onset else ""
        parts.append(
            f'<text x="{_LABEL_WIDTH - 6}" y="{_TOP + row * _ROW_HEIGHT + 13}" text-anchor="end"{onset}>'
            f"<title>{escape(layer)}</title>{escape(label)}{' ▶' if is_onset else ''}</text>"
        )
    parts.append(f'<text x="{_LABEL_WIDTH - 24}" y="{_TOP + height + 15}" text-anchor="end">step</text>')
    for index, panel in enumerate(chart.panels):
        x = _LABEL_WIDTH + index * (width + _GAP)
        cell_width = max(2, width // len(panel.grid.columns))
        image = _png(pixels(panel.grid, scale, cell_width, _ROW_HEIGHT))
        if num_panels > 1:
            name = escape(shortened(panel.name, width // 8))
            parts.append(f'<text x="{x}" y="30" class="title">{name}</text>')
        parts.append(
            f'<image x="{x}" y="{_TOP}" width="{width}" height="{height}" preserveAspectRatio="none" '
            f'style="image-rendering:pixelated" href="data:image/png;base64,{image}"/>'
        )
        parts.append(f'<rect x="{x}" y="{_TOP}" width="{width}" height="{height}" class="frame"/>')
        parts += _step_axis(panel.grid.columns, x, width, _TOP + height, panel.step)
    right = _LABEL_WIDTH + num_panels * (width + _GAP)
    parts += _colour_bar(scale, right)
    return _svg(parts, right - _GAP + _BAR_WIDTH, _TOP + height + _BOTTOM, chart.quantity)


def curves(chart: Curves) -> str:
    """An SVG of one number over steps, a line a run; × on top marks what is not finite."""
    values = np.concatenate([curve.series.values for curve in chart.curves])
    scale = Scale.of(values, is_log=chart.is_log)
    parts = [
        _heading(title(chart, scale.is_log)),
        f'<rect x="{_LABEL_WIDTH}" y="{_TOP}" width="{_PLOT_WIDTH}" height="{_LINE_HEIGHT}" class="frame"/>',
        f'<text x="{_LABEL_WIDTH - 24}" y="{_TOP + _LINE_HEIGHT + 15}" text-anchor="end">step</text>',
    ]
    legend = _LABEL_WIDTH  # where the next name goes
    for index, curve in enumerate(chart.curves):
        style = line_style(index)
        column = np.searchsorted(chart.columns, curve.series.steps, side="right") - 0.5
        x = _LABEL_WIDTH + column / len(chart.columns) * _PLOT_WIDTH
        finite = np.isfinite(curve.series.values)
        y = np.full(x.shape, np.nan)
        y[finite] = _TOP + 8 + (1 - scale.share(curve.series.values[finite])) * (_LINE_HEIGHT - 16)
        parts += [f'<polyline points="{points}" fill="none" {style}/>' for points in _pieces(x, y)]
        parts += [
            f'<text x="{left:.1f}" y="{_TOP + 10}" text-anchor="middle">×</text>' for left in x[~finite]
        ]
        if len(chart.curves) > 1:
            name = shortened(curve.name)
            parts.append(f'<polyline points="{legend},26 {legend + 30},26" fill="none" {style}/>')
            parts.append(f'<text x="{legend + 36}" y="30">{escape(name)}</text>')
            legend += 56 + 8 * len(name)
    for share, bottom in ((1.0, _TOP + 12), (0.0, _TOP + _LINE_HEIGHT - 4)):
        label = short_number(scale.value(share)) if scale.has_values else "none is finite"
        parts.append(f'<text x="{_LABEL_WIDTH - 6}" y="{bottom}" text-anchor="end">{label}</text>')
    onset = next((curve.step for curve in chart.curves if curve.step is not None), None)
    parts += _step_axis(chart.columns, _LABEL_WIDTH, _PLOT_WIDTH, _TOP + _LINE_HEIGHT, onset)
    return _svg(parts, _LABEL_WIDTH + _PLOT_WIDTH + _BAR_WIDTH, _TOP + _LINE_HEIGHT + _BOTTOM, chart.quantity)


def title(chart: HeatMap | Curves, is_log: bool) -> str:
    """Quantity, unit, scale, and whether layers were left out."""
    what = f"{chart.quantity} ({chart.unit}), {'log' if is_log else 'linear'} scale"
    if isinstance(chart, HeatMap) and len(chart.layers) < chart.num_layers:
        return f"{what}, {len(chart.layers)} of {chart.num_layers} layers"
    if not isinstance(chart, HeatMap) and chart.quantity in QUANTITIES:
        return f"{what}, whole model"
    return what


def scale_of(chart: HeatMap) -> Scale:
    """One scale for all panels."""
    values = np.concatenate([panel.grid.values.compressed() for panel in chart.panels])
    return Scale.of(values, is_log=is_logarithmic([values]))


def pixels(cells: Grid, scale: Scale, cell_width: int, row_height: int) -> np.ndarray:
    """Indices uint8 [height, width] into the palette; what is not finite is a checkerboard."""
    recorded = ~np.ma.getmaskarray(cells.values)
    finite = recorded & np.isfinite(cells.values.data)
    colours = np.full(finite.shape, NOT_RECORDED, np.uint8)
    colours[finite] = 1 + np.rint(scale.share(cells.values.data[finite]) * (NUM_COLOURS - 1))
    image = colours.repeat(row_height, axis=0).repeat(cell_width, axis=1)
    rows, columns = np.indices(image.shape)
    board = np.where((rows // 3 + columns // 3) % 2, BLACK, WHITE).astype(np.uint8)
    is_broken = (recorded & ~finite).repeat(row_height, axis=0).repeat(cell_width, axis=1)
    return np.where(is_broken, board, image)


def line_style(index: int) -> str:
    """SVG attributes of the n-th run's line: dashes, so that it is told apart without colour too."""
    stroke, dash = _LINE_COLOURS[index % len(_LINE_COLOURS)], _DASHES[index % len(_DASHES)]
    return f'stroke="{stroke}" stroke-dasharray="{dash}" stroke-width="1.5" stroke-linecap="round"'


def _pieces(x: np.ndarray, y: np.ndarray) -> list[str]:
    """Points of lines that break where y is NaN."""
    breaks = np.flatnonzero(np.isnan(y))
    ends = zip([-1, *breaks.tolist()], [*breaks.tolist(), len(y)], strict=True)
    return [
        " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x[start + 1 : end], y[start + 1 : end], strict=True))
        for start, end in ends
    ]


def _heading(text: str) -> str:
    return f'<text x="{_LABEL_WIDTH}" y="14" class="title">{escape(text)}</text>'


def _step_axis(columns: np.ndarray, x: int, width: int, bottom: int, onset_step: int | None) -> list[str]:
    """Numbers under a plot whose columns begin at these steps, and an arrow above it."""
    num_columns = len(columns)
    num_labels = min(num_columns, max(2, width // 90))
    labelled = sorted({round(i * (num_columns - 1) / max(num_labels - 1, 1)) for i in range(num_labels)})
    parts = []
    for index in labelled:
        share = (index + 0.5) / num_columns
        # Within the plot, beside which another may stand.
        anchor, at = "middle", x + share * width
        if num_columns > 1 and index in (0, num_columns - 1):
            anchor, at = ("start", x) if index == 0 else ("end", x + width)
        parts.append(
            f'<text x="{at:.1f}" y="{bottom + 15}" text-anchor="{anchor}">{int(columns[index])}</text>'
        )
    if onset_step is not None and num_columns and columns[0] <= onset_step:
        index = int(np.searchsorted(columns, onset_step, side="right")) - 1
        side = "start" if index < num_columns // 2 else "end"
        text = f"▼ step {onset_step}" if side == "start" else f"step {onset_step} ▼"
        at = x + (index + 0.5) / num_columns * width
        at += -5 if side == "start" else 5  # the arrow's tip stands on the column
        parts.append(f'<text x="{at:.1f}" y="{_TOP - 5}" text-anchor="{side}" class="onset">{text}</text>')
    return parts


def _colour_bar(scale: Scale, x: int) -> list[str]:
    if not scale.has_values:
        return []
    parts = []
    for position, share in enumerate((1.0, 0.5, 0.0) if scale.high > scale.low else (0.5,)):
        red, green, blue = colour(share)
        y = 6 + position * 15
        parts.append(
            f'<rect x="{x}" y="{y}" width="12" height="12" fill="rgb({red},{green},{blue})" class="key"/>'
        )
        parts.append(f'<text x="{x + 18}" y="{y + 11}">{short_number(scale.value(share))}</text>')
    return parts


def _svg(parts: Sequence[str], width: int, height: int, title: str) -> str:
    # At least as high as the key beside the title.
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(title)}" font-size="12" '
        f'font-family="system-ui, sans-serif" fill="currentColor">{"".join(parts)}</svg>'
    )


def _png(indices: np.ndarray) -> str:
    """A palette PNG, base64-encoded; indices uint8 [height, width]."""
    height, width = indices.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), indices], axis=1).tobytes()  # 0: no filter
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette().tobytes()),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return base64.b64encode(png).decode()


def short_number(value: float) -> str:
    """Three digits: what fits beside an axis."""
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def row_labels(layers: Sequence[str]) -> list[str]:
    """Names that fit beside a plot; of long ones, what all begin with is left out first."""
    length = 0
    if any(len(layer) > _MAX_LABEL for layer in layers) and len(layers) > 1:
        parents = [layer.split(".")[:-1] for layer in layers]
        shared = takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
        length = sum(len(names[0]) + 1 for names in shared)
    return [shortened(f"…{layer[length:]}" if length else layer) for layer in layers]


def shortened(name: str, length: int = _MAX_LABEL) -> str:
    """A name without its middle, if it is long."""
    return name if len(name) <= length else f"{name[: length // 3]}…{name[1 - length + length // 3 :]}"

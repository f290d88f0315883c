"""Heat maps and lines as SVG within an HTML page: in light and dark, in colour and in black and white."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

# Cividis: its lightness rises evenly, for every kind of colour vision and on a grey printer.
_SCALE = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838"]
_NUM_COLOURS = 253
_NOT_RECORDED, _BLACK, _WHITE = 0, 254, 255  # beside the colours 1 to 253

_LABEL_WIDTH, _PLOT_WIDTH, _BAR_WIDTH = 250, 720, 130
_ROW_HEIGHT, _TOP, _BOTTOM = 18, 46, 26
_LINE_HEIGHT = 150


def heat_map(
    title: str,
    steps: Sequence[int],
    layers: Sequence[str],
    values: np.ndarray,
    *,
    onset_layer: str | None = None,
    onset_step: int | None = None,
) -> str:
    """An SVG of layer × step, the first layer on top.

    The scale is logarithmic unless a value is negative. What is not finite is a checkerboard; what was not
    recorded stays empty.

    Args:
        title: Quantity and unit.
        steps: Steps of the columns, ascending.
        layers: Names of the rows.
        values: float64 [len(layers), len(steps)]; a masked array where there is nothing recorded.
        onset_layer: Row that is pointed at.
        onset_step: Step that is pointed at.
    """
    values = np.ma.asarray(values, dtype=np.float64)
    recorded = ~np.ma.getmaskarray(values)
    finite = recorded & np.isfinite(values.data)
    shown = values.data[finite]
    is_log = bool((shown >= 0).all() and (shown > 0).any())
    smallest = shown[shown > 0].min() if is_log else 0.0
    scaled = np.zeros(values.shape)
    scaled[finite] = np.log10(np.maximum(shown, smallest)) if is_log else shown
    low, high = (scaled[finite].min(), scaled[finite].max()) if shown.size else (0.0, 0.0)
    share = (scaled - low) / (high - low) if high > low else np.full(values.shape, 0.5)
    colours = np.where(finite, 1 + np.rint(share * (_NUM_COLOURS - 1)), _NOT_RECORDED).astype(np.uint8)

    cell_width = max(2, _PLOT_WIDTH // len(steps))
    pixels = colours.repeat(_ROW_HEIGHT, axis=0).repeat(cell_width, axis=1)
    rows, columns = np.indices(pixels.shape)
    board = np.where((rows // 3 + columns // 3) % 2, _BLACK, _WHITE)
    is_broken = (recorded & ~finite).repeat(_ROW_HEIGHT, axis=0).repeat(cell_width, axis=1)
    pixels = np.where(is_broken, board, pixels).astype(np.uint8)
    width, height = _PLOT_WIDTH, pixels.shape[0]

    parts = [
        _heading(title, is_log),
        f'<image x="{_LABEL_WIDTH}" y="{_TOP}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{_png(pixels)}"/>',
        f'<rect x="{_LABEL_WIDTH}" y="{_TOP}" width="{width}" height="{height}" class="frame"/>',
    ]
    for row, layer in enumerate(layers):
        y = _TOP + row * _ROW_HEIGHT + 13
        is_onset = layer == onset_layer
        onset = ' class="onset"' if is_onset else ""
        parts.append(
            f'<text x="{_LABEL_WIDTH - 6}" y="{y}" text-anchor="end"{onset}>'
            f"<title>{escape(layer)}</title>{escape(_shortened(layer))}{' ▶' if is_onset else ''}</text>"
        )
    parts += _step_axis(steps, width, _TOP + height, onset_step)
    parts += _colour_bar(low, high, is_log, _LABEL_WIDTH + width + 16)
    return _svg(parts, _LABEL_WIDTH + width + _BAR_WIDTH, _TOP + height + _BOTTOM, title)


def line(title: str, steps: Sequence[int], values: np.ndarray, *, onset_step: int | None = None) -> str:
    """An SVG of one series over steps; × on top marks what is not finite. The scale is as in a heat map."""
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    shown = values[finite]
    is_log = bool(shown.size and (shown > 0).all())
    scaled = np.where(finite, np.log10(np.where(finite, values, 1.0)) if is_log else values, 0.0)
    low, high = (scaled[finite].min(), scaled[finite].max()) if shown.size else (0.0, 0.0)
    span = high - low if high > low else 1.0
    pieces: list[list[str]] = [[]]  # a line breaks where it is not finite
    broken = []
    for index, (value, is_finite) in enumerate(zip(scaled.tolist(), finite.tolist(), strict=True)):
        x = _LABEL_WIDTH + (index + 0.5) / len(steps) * _PLOT_WIDTH
        if is_finite:
            pieces[-1].append(f"{x:.1f},{_TOP + 8 + (1 - (value - low) / span) * (_LINE_HEIGHT - 16):.1f}")
        else:
            pieces.append([])
            broken.append(f'<text x="{x:.1f}" y="{_TOP + 10}" text-anchor="middle">×</text>')
    parts = [
        _heading(title, is_log),
        f'<rect x="{_LABEL_WIDTH}" y="{_TOP}" width="{_PLOT_WIDTH}" height="{_LINE_HEIGHT}" class="frame"/>',
        *(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="currentColor" stroke-width="1.5" '
            'stroke-linecap="round"/>'
            for points in pieces
        ),
        *broken,
    ]
    for number, y in ((high, _TOP + 12), (low, _TOP + _LINE_HEIGHT - 4)):
        label = _number(10**number if is_log else number) if shown.size else "none is finite"
        parts.append(f'<text x="{_LABEL_WIDTH - 6}" y="{y}" text-anchor="end">{label}</text>')
    parts += _step_axis(steps, _PLOT_WIDTH, _TOP + _LINE_HEIGHT, onset_step)
    return _svg(parts, _LABEL_WIDTH + _PLOT_WIDTH + _BAR_WIDTH, _TOP + _LINE_HEIGHT + _BOTTOM, title)


def _heading(title: str, is_log: bool) -> str:
    scale = "log" if is_log else "linear"
    return f'<text x="{_LABEL_WIDTH}" y="14" class="title">{escape(title)}, {scale} scale</text>'


def _step_axis(steps: Sequence[int], width: int, bottom: int, onset_step: int | None) -> list[str]:
    def x_of(index: int) -> float:
        return _LABEL_WIDTH + (index + 0.5) / len(steps) * width

    num_labels = max(1, min(len(steps), width // 90))
    labelled = sorted({round(i * (len(steps) - 1) / max(num_labels - 1, 1)) for i in range(num_labels)})
    parts = [
        f'<text x="{x_of(index):.1f}" y="{bottom + 15}" text-anchor="middle">{steps[index]}</text>'
        for index in labelled
    ]
    parts.append(f'<text x="{_LABEL_WIDTH - 24}" y="{bottom + 15}" text-anchor="end">step</text>')
    if onset_step is not None and steps[0] <= onset_step <= steps[-1]:
        index = next(index for index, step in enumerate(steps) if step >= onset_step)
        side = "start" if index < len(steps) // 2 else "end"
        text = f"▼ step {onset_step}" if side == "start" else f"step {onset_step} ▼"
        x = x_of(index) + (-5 if side == "start" else 5)  # the arrow's tip stands on the column
        parts.append(f'<text x="{x:.1f}" y="{_TOP - 5}" text-anchor="{side}" class="onset">{text}</text>')
    return parts


def _colour_bar(low: float, high: float, is_log: bool, x: int) -> list[str]:
    numbers = [high, (low + high) / 2, low] if high > low else [low]
    parts = []
    for position, number in enumerate(numbers):
        share = (number - low) / (high - low) if high > low else 0.5
        red, green, blue = colour(share)
        y = 6 + position * 15
        label = _number(10**number if is_log else number)
        parts.append(
            f'<rect x="{x}" y="{y}" width="12" height="12" fill="rgb({red},{green},{blue})" class="key"/>'
        )
        parts.append(f'<text x="{x + 18}" y="{y + 11}">{label}</text>')
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
    palette = bytes(3)
    palette += b"".join(bytes(colour(i / (_NUM_COLOURS - 1))) for i in range(_NUM_COLOURS))
    palette += bytes(3) + b"\xff" * 3
    height, width = indices.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), indices], axis=1).tobytes()  # 0: no filter
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette),
        (b"tRNS", b"\0"),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return base64.b64encode(png).decode()


def colour(share: float) -> tuple[int, int, int]:
    """Red, green and blue of a value that lies at ``share``, from 0 to 1, of the scale."""
    position = share * (len(_SCALE) - 1)
    index = min(int(position), len(_SCALE) - 2)
    left, right = (bytes.fromhex(colour) for colour in _SCALE[index : index + 2])
    red, green, blue = (round(a + (b - a) * (position - index)) for a, b in zip(left, right, strict=True))
    return red, green, blue


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else str(value)


def _shortened(name: str, length: int = 36) -> str:
    return name if len(name) <= length else f"{name[: length // 3]}…{name[1 - length + length // 3 :]}"

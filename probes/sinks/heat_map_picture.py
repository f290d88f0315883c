"""A heat map as the PNG that TensorBoard's Images page shows.

The colours mean the same in each picture of a quantity, so that pictures of different times and runs can be
held side by side. The background is white, on a dark page too.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from probes.colour_scale import colour

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

_FONT_SIZE = 15
_LINE = 19  # pixels from one line of text to the next
_LEFT, _TOP, _PLOT_WIDTH, _MAX_PLOT_HEIGHT = 222, 66, 400, 800
_KEY_LEFT, _KEY_WIDTH = 20, 16
_RIGHT, _BOTTOM = 78, 54
_NAME_LENGTH = 24  # characters that fit beside the plot
_BLACK, _WHITE, _EMPTY, _RED = (20, 20, 20), (255, 255, 255), (226, 226, 226), (190, 0, 0)
_PALETTE = np.array([colour(index / 255) for index in range(256)], np.uint8)


def heat_map_png(
    title: str,
    subtitle: str,
    steps: Sequence[int],
    layers: Sequence[str],
    values: np.ma.MaskedArray,
    scale: tuple[float, float],
    *,
    is_low_worse: bool = False,
    onsets: Sequence[tuple[str, int]] = (),
) -> bytes:
    """Draws layer × step, the first layer on top.

    Black and white squares are NaN or infinite, grey was not recorded. Where there are more layers than rows
    of pixels, neighbours share one, which shows their worst value.

    Args:
        title: What is shown.
        subtitle: More about it, in smaller words.
        steps: Steps of the columns, ascending.
        layers: Names of the rows.
        values: float64 [len(layers), len(steps)].
        scale: Values at the ends of the logarithmic colour scale; others get the colour of the nearer end.
        is_low_worse: Which of several values is the worst.
        onsets: Layers and steps at which something began; pointed at.
    """
    from PIL import Image, ImageDraw, ImageFont

    names, values = _joined_rows(list(layers), values, is_low_worse=is_low_worse)
    row_height = max(2, min(_LINE + 3, _MAX_PLOT_HEIGHT // len(names)))
    height = row_height * len(names)
    size = (_LEFT + _PLOT_WIDTH + _RIGHT, _TOP + max(height, 6 * _LINE) + _BOTTOM)
    picture = Image.new("RGB", size, _WHITE)
    cells = Image.fromarray(_pixels(values, scale, _PLOT_WIDTH, row_height))
    picture.paste(cells, (_LEFT, _TOP))
    draw = ImageDraw.Draw(picture)
    draw.fontmode = "L"
    draw.font = ImageFont.load_default(_FONT_SIZE)
    draw.text((_LEFT, 6), title, _BLACK, font=ImageFont.load_default(_FONT_SIZE + 3))
    draw.text((_LEFT, 6 + _LINE + 3), subtitle, _BLACK)
    _draw_names(draw, names, row_height, {layer for layer, _ in onsets})
    _draw_steps(draw, steps, _TOP + height, [step for _, step in onsets])
    _draw_key(draw, scale)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=2)
    return buffer.getvalue()


def _joined_rows(
    names: list[str], values: np.ma.MaskedArray, *, is_low_worse: bool
) -> tuple[list[str], np.ma.MaskedArray]:
    per_row = math.ceil(len(names) / (_MAX_PLOT_HEIGHT // 2))
    if per_row == 1:
        return names, values
    nothing, worse = (np.inf, np.minimum) if is_low_worse else (-np.inf, np.maximum)
    joined = worse.reduceat(values.filled(nothing), np.arange(0, len(names), per_row), axis=0)
    return names[::per_row], np.ma.masked_array(joined, joined == nothing)


def _pixels(values: np.ma.MaskedArray, scale: tuple[float, float], width: int, row_height: int) -> np.ndarray:
    """Colours, uint8 [rows × row_height, width, 3]."""
    low, high = np.log10(scale)
    is_recorded, data = ~np.ma.getmaskarray(values), values.data
    is_finite = is_recorded & np.isfinite(data)
    positive = np.where(is_finite, np.maximum(data, scale[0]), scale[0])
    share = np.clip((np.log10(positive) - low) / (high - low), 0.0, 1.0)
    colours = _PALETTE[np.rint(share * 255).astype(np.intp)]
    colours[~is_recorded] = _EMPTY
    columns = np.arange(width) * values.shape[1] // width
    pixels = colours[:, columns].repeat(row_height, axis=0)
    is_broken = is_recorded & ~is_finite
    if is_broken.any():
        y, x = np.nonzero(is_broken[:, columns].repeat(row_height, axis=0))
        is_black = (x // 4 + y // 4) % 2 > 0
        pixels[y, x] = np.where(is_black[:, None], _BLACK, _WHITE)
    return pixels


def _draw_names(draw: ImageDraw, names: Sequence[str], row_height: int, onsets: set[str]) -> None:
    """Every name, or as many as there is room for; those of onsets first."""
    prefix = _common_prefix(names)
    if prefix:
        draw.text((_LEFT - 22, _TOP - _LINE), _shortened(f"in {prefix[:-1]}"), _BLACK, anchor="rm")
    taken: list[float] = []
    for row in sorted(range(len(names)), key=lambda row: names[row] not in onsets):
        y = _TOP + (row + 0.5) * row_height
        if any(abs(y - other) < _LINE for other in taken):
            continue
        taken.append(y)
        is_onset = names[row] in onsets
        draw.text(
            (_LEFT - 22, y),
            _shortened(names[row].removeprefix(prefix)),
            _RED if is_onset else _BLACK,
            anchor="rm",
        )
        if is_onset:
            draw.polygon([(_LEFT - 16, y - 5), (_LEFT - 16, y + 5), (_LEFT - 4, y)], _RED)


def _draw_steps(draw: ImageDraw, steps: Sequence[int], bottom: int, onsets: Sequence[int]) -> None:
    width = _PLOT_WIDTH / len(steps)
    num_labels = min(len(steps), 5)
    for label in range(num_labels):
        column = round(label * (len(steps) - 1) / max(num_labels - 1, 1))
        x = _LEFT + (column + 0.5) * width
        draw.line([(x, bottom), (x, bottom + 5)], _BLACK)
        draw.text((x, bottom + 8), f"{steps[column]:,}", _BLACK, anchor="ma")
    draw.text((_LEFT + _PLOT_WIDTH / 2, bottom + 8 + _LINE), "optimizer step", _BLACK, anchor="ma")
    for onset in onsets:
        column = int(np.searchsorted(steps, onset, side="right")) - 1
        if column >= 0:
            x = _LEFT + (column + 0.5) * width
            draw.polygon([(x - 5, _TOP - 11), (x + 5, _TOP - 11), (x, _TOP - 2)], _RED)


def _draw_key(draw: ImageDraw, scale: tuple[float, float]) -> None:
    x = _LEFT + _PLOT_WIDTH + _KEY_LEFT
    height = 5 * _LINE
    for y in range(height):
        draw.line([(x, _TOP + y), (x + _KEY_WIDTH, _TOP + y)], colour(1 - y / (height - 1)))
    low, high = np.log10(scale)
    for share in (1.0, 0.5, 0.0):
        middle = _TOP + (1 - share) * (height - 1)
        draw.text((x + _KEY_WIDTH + 6, middle), f"1e{low + share * (high - low):g}", _BLACK, anchor="lm")


def _shortened(name: str) -> str:
    """A name that fits; the number of a block, in front, and what is special, at the end, stay."""
    return name if len(name) <= _NAME_LENGTH else f"{name[:9]}…{name[10 - _NAME_LENGTH :]}"


def _common_prefix(names: Sequence[str]) -> str:
    """The modules that all layers lie in."""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)]
    return "".join(f"{module}." for module in shared) if len(names) > 1 else ""

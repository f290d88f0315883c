"""Heat maps: what a cell's colour says, read back from the picture itself."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest

from probes import charts
from probes.colour_scale import palette
from probes.grids import column_starts
from probes.pictures import Curve, Curves, RunView, pictures
from probes.pictures import heat_map as heat_map_of
from probes.reading import RecordedSeries
from probes.record import ALL_LAYERS

NAN, INF = float("nan"), float("inf")
MAX = np.finfo(np.float64).max


def run(
    values: object,
    steps: list[int],
    layers: list[str],
    *,
    name: str = "run",
    onset: tuple[str, int] | None = None,
) -> RunView:
    rows = np.ma.asarray(values, dtype=np.float64)
    kept = ~np.ma.getmaskarray(rows)
    series = {
        layer: RecordedSeries(np.array(steps)[kept[row]], rows.data[row][kept[row]])
        for row, layer in enumerate(layers)
    }
    return RunView(name, {"q": series}, layers, *(onset or (None, None)))


def heat_map(
    values: object, steps: list[int], layers: list[str], onset: tuple[str, int] | None = None
) -> str:
    return charts.heat_map(heat_map_of("q", [run(values, steps, layers, onset=onset)]))


def line(values: list[float], onset: int | None = None) -> str:
    series = RecordedSeries(np.arange(len(values)), np.array(values))
    return charts.curves(Curves("q", "1", column_starts([series], 240), [Curve("run", series, onset)]))


def pixels(svg: str) -> np.ndarray:
    """Palette indices [height, width] of the embedded PNG."""
    png = base64.b64decode(re.search(r'base64,([^"]+)"', svg)[1])
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, start = {}, 8
    while start < len(png):
        (length,) = struct.unpack_from(">I", png, start)
        kind, data = png[start + 4 : start + 8], png[start + 8 : start + 8 + length]
        assert struct.unpack_from(">I", png, start + 8 + length) == (zlib.crc32(kind + data),)
        chunks[kind], start = data, start + 12 + length
    assert len(chunks[b"PLTE"]) == 3 * 256
    assert chunks[b"tRNS"] == b"\0"
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def cells(svg: str, rows: int, columns: int) -> np.ndarray:
    image = pixels(svg)
    return image[:: image.shape[0] // rows, :: image.shape[1] // columns][:rows, :columns]


def test_colours_rise_with_the_logarithm() -> None:
    svg = heat_map([[1e-3, 1.0, 1e3]], [0, 1, 2], ["a"])
    assert cells(svg, 1, 3).tolist() == [[1, 127, 253]]
    assert "log scale" in svg
    for label in ("0.001", ">1<", "1e+03"):
        assert label in svg


def test_negative_values_are_on_a_linear_scale() -> None:
    svg = heat_map([[-1.0, 0.0, 1.0]], [0, 1, 2], ["a"])
    assert cells(svg, 1, 3).tolist() == [[1, 127, 253]]
    assert "linear scale" in svg


def test_what_is_not_finite_is_a_checkerboard_and_what_is_missing_is_empty() -> None:
    values = np.ma.masked_array([[1.0, NAN, INF, 5.0], [1.0] * 4], mask=[[0, 0, 0, 1], [0] * 4])
    image = pixels(heat_map(values, [0, 1, 2, 3], ["a", "b"]))[:18]
    quarter = image.shape[1] // 4
    assert set(np.unique(image[:, quarter : 3 * quarter])) == {254, 255}
    assert set(np.unique(image[:, 3 * quarter :])) == {0}


@pytest.mark.parametrize("values", [[[NAN, NAN]], [[0.0, 0.0]], [[7.0, 7.0]], [[5e-324, MAX]], [[-MAX, MAX]]])
def test_extremes_are_drawn(values: list[list[float]]) -> None:
    for svg in (heat_map(values, [0, 1], ["a"]), line(values[0])):
        ElementTree.fromstring(svg)
        assert "nan" not in re.sub(r"base64,[^\"]+", "", svg)


def test_lightness_rises_evenly_so_that_it_reads_without_colour() -> None:
    luminance = palette()[1:254] @ np.array((0.2126, 0.7152, 0.0722))
    steps = np.diff(luminance[::5])
    assert (steps > 0).all()
    assert steps.max() < 3.5 * steps.min()


def test_the_onset_is_pointed_at() -> None:
    svg = heat_map(np.ones((2, 3)), [0, 10, 20], ["a", "b"], ("b", 11))
    texts = [element.text or "".join(element.itertext()) for element in ElementTree.fromstring(svg)]
    assert any(text and text.startswith("step 11") for text in texts)
    assert svg.count("▶") == 1


def test_names_are_escaped_and_long_ones_shortened_with_their_whole_name_kept() -> None:
    name = "model.<lambda>." + "x" * 60
    svg = heat_map(np.ones((1, 1)), [0], [name])
    root = ElementTree.fromstring(svg)
    (title,) = (e.text for e in root.iter("{http://www.w3.org/2000/svg}title"))
    assert title == name


def test_a_line_breaks_where_it_is_not_finite() -> None:
    svg = line([1.0, 2.0, NAN, 3.0], onset=2)
    assert svg.count("×") == 1
    assert [len(points.split()) for points in re.findall(r'points="([^"]*)"', svg)] == [2, 1]


def test_several_runs_share_rows_steps_and_colours() -> None:
    runs = [
        run([[1.0, 10.0]], [0, 1], ["a"], name="softmax"),
        run([[100.0, 10.0]], [0, 1], ["b"], name="sigmoid <1>", onset=("b", 1)),
    ]
    svg = charts.heat_map(heat_map_of("q", runs))
    first, second = (pixels(part) for part in svg.split("<image")[1:])
    assert first[0, 0] == 1
    assert first[0, -1] == second[-1, -1] == 127  # 10, halfway from 1 to 100
    assert second[-1, 0] == 253
    assert not first[-1].any()  # the first run has no layer b
    assert not second[0].any()
    for words in (">softmax<", ">sigmoid &lt;1&gt;<", "▼"):
        assert words in svg


def test_lines_of_several_runs_differ_without_colour_and_are_named_beside_the_plot() -> None:
    series = RecordedSeries(np.arange(3), np.array([1.0, 2.0, 3.0]))
    several = [Curve(name, series, None) for name in ("softmax", "sigmoid", "third")]
    svg = charts.curves(Curves("loss", "as logged", column_starts([series], 240), several))
    assert len(set(re.findall(r'stroke-dasharray="([^"]*)"', svg))) == 3
    assert all(f">{curve.name}<" in svg for curve in several)
    assert "loss (as logged), log scale" in svg


def test_numbers_under_the_steps_stay_within_their_panel() -> None:
    runs = [run([[1.0, 2.0]], [0, 10**6], ["a"], name=str(index)) for index in range(4)]
    svg = charts.heat_map(heat_map_of("q", runs))
    assert svg.count('text-anchor="start">0<') == 4
    assert svg.count('text-anchor="end">500001<') == 4


def test_the_whole_model_is_drawn_as_one_line() -> None:
    view = RunView("run", {"loss": {ALL_LAYERS: RecordedSeries(np.arange(2), np.array([2.0, 1.0]))}}, [])
    (curves,) = pictures([view], max_maps=8)
    assert isinstance(curves, Curves)
    assert curves.is_log


def test_long_names_keep_what_tells_them_apart() -> None:
    layers = [f"transformer.encoder.layers.{index}.self_attention.output_projection" for index in range(12)]
    labels = charts.row_labels(layers)
    assert len(set(labels)) == 12
    assert all(len(label) <= 32 for label in labels)
    assert charts.row_labels(["a.b", "a.c"]) == ["a.b", "a.c"]

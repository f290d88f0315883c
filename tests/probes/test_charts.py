"""Heat maps: what a cell's colour says, read back from the picture itself."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest

from probes.charts import heat_map, line

NAN, INF = float("nan"), float("inf")


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
    svg = heat_map("grad_norm", [0, 1, 2], ["a"], np.array([[1e-3, 1.0, 1e3]]))
    assert cells(svg, 1, 3).tolist() == [[1, 127, 253]]
    assert "log scale" in svg
    for label in ("0.001", ">1<", "1e+03"):
        assert label in svg


def test_negative_values_are_on_a_linear_scale() -> None:
    svg = heat_map("attention/max_logit", [0, 1, 2], ["a"], np.array([[-1.0, 0.0, 1.0]]))
    assert cells(svg, 1, 3).tolist() == [[1, 127, 253]]
    assert "linear scale" in svg


def test_what_is_not_finite_is_a_checkerboard_and_what_is_missing_is_empty() -> None:
    values = np.ma.masked_array([[1.0, NAN, INF, 5.0]], mask=[[False, False, False, True]])
    image = pixels(heat_map("loss", [0, 1, 2, 3], ["a"], values))
    quarter = image.shape[1] // 4
    assert set(np.unique(image[:, quarter : 3 * quarter])) == {254, 255}
    assert set(np.unique(image[:, 3 * quarter :])) == {0}


@pytest.mark.parametrize("values", [[[NAN, NAN]], [[0.0, 0.0]], [[7.0, 7.0]], [[5e-324, 1e308]]])
def test_extremes_are_drawn(values: list[list[float]]) -> None:
    for svg in (heat_map("q", [0, 1], ["a"], np.array(values)), line("q", [0, 1], np.array(values[0]))):
        ElementTree.fromstring(svg)
        assert "nan" not in re.sub(r"base64,[^\"]+", "", svg)


def test_lightness_rises_evenly_so_that_it_reads_without_colour() -> None:
    from probes.charts import colour

    luminance = [np.dot(colour(share), (0.2126, 0.7152, 0.0722)) for share in np.linspace(0, 1, 50)]
    steps = np.diff(luminance)
    assert (steps > 0).all()
    assert steps.max() < 3.5 * steps.min()


def test_the_onset_is_pointed_at() -> None:
    svg = heat_map("q", [0, 10, 20], ["a", "b"], np.ones((2, 3)), onset_layer="b", onset_step=11)
    texts = [element.text or "".join(element.itertext()) for element in ElementTree.fromstring(svg)]
    assert any(text and text.startswith("step 11") for text in texts)
    assert svg.count("▶") == 1


def test_names_are_escaped_and_long_ones_shortened_with_their_whole_name_kept() -> None:
    name = "model.<lambda>." + "x" * 60
    svg = heat_map("q & r", [0], [name], np.ones((1, 1)))
    root = ElementTree.fromstring(svg)
    (title,) = (e.text for e in root.iter("{http://www.w3.org/2000/svg}title"))
    assert title == name


def test_a_line_breaks_where_it_is_not_finite() -> None:
    svg = line("loss", [0, 1, 2, 3], np.array([1.0, 2.0, NAN, 3.0]), onset_step=2)
    assert svg.count("×") == 1
    assert [len(points.split()) for points in re.findall(r'points="([^"]*)"', svg)] == [2, 1]

"""Heat maps: what is kept of a run, and what its picture shows."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest

from probes.colour_scale import colour
from probes.sinks.heat_map import MAX_COLUMNS, HeatMap
from probes.sinks.heat_map_picture import heat_map_png


def test_all_steps_share_the_columns_and_the_worst_of_each_stays() -> None:
    largest, smallest = HeatMap(), HeatMap(is_low_worse=True)
    values = 1.0 + np.random.default_rng(0).random((10_000, 2))
    values[7777] = 1e9
    values[1234] = 1e-9
    for step in range(10_000):
        for heat_map in (largest, smallest):
            heat_map.add(step, heat_map.rows(["a", "b"]), values[step])
    assert len(largest.steps) <= MAX_COLUMNS
    period = largest.steps[1]
    assert largest.steps == list(range(0, 10_000, period))
    layers, shown = largest.shown(["b", "a"])
    assert layers == ["b", "a"]
    np.testing.assert_array_equal(shown[1, 5], values[5 * period : 6 * period, 0].max())
    assert (shown[:, 7777 // period] == 1e9).all()
    assert (smallest.shown([])[1][:, 1234 // period] == 1e-9).all()


@pytest.mark.parametrize("is_low_worse", [False, True])
def test_not_a_number_is_worst_of_all(is_low_worse: bool) -> None:
    heat_map = HeatMap(is_low_worse=is_low_worse)
    for step in range(2 * MAX_COLUMNS):
        heat_map.add(step, heat_map.rows(["a"]), np.array([math.nan if step == 101 else 1.0]))
    (row,) = heat_map.shown(["a"])[1].tolist()
    assert [index for index, value in enumerate(row) if math.isnan(value)] == [50]


def test_rows_that_are_nearly_empty_are_left_out_and_gaps_are_masked() -> None:
    heat_map = HeatMap()
    for step in range(30):
        names = ["a", "b", "c"] if step == 0 else ["a", "b"] if step % 3 else ["a"]
        heat_map.add(step, heat_map.rows(names), np.ones(len(names)))
    layers, values = heat_map.shown(["b", "a"])
    assert layers == ["b", "a"]
    assert np.ma.getmaskarray(values)[:, :4].tolist() == [[False, False, False, True], [False] * 4]


def test_a_training_that_was_taken_back_shows_its_last_attempt() -> None:
    heat_map = HeatMap()
    rows = heat_map.rows(["a"])
    for steps, value in ((range(0, 100, 10), 1.0), (range(45, 65, 10), 2.0)):
        for step in steps:
            heat_map.add(step, rows, np.array([value]))
    assert heat_map.steps == [0, 10, 20, 30, 40, 45, 55]
    _, values = heat_map.shown([])
    assert values.tolist() == [[1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0]]


def pixels(values: np.ndarray, **arguments: object) -> np.ndarray:
    from PIL import Image

    layers = [f"blocks.{i}" for i in range(len(values))]
    steps = list(range(values.shape[1]))
    png = heat_map_png("q (1)", "words", steps, layers, np.ma.masked_array(values), (1e-2, 1e2), **arguments)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def is_colour(picture: np.ndarray, share: float) -> np.ndarray:
    return (picture == colour(share)).all(-1)


def test_the_scale_is_logarithmic_and_fixed() -> None:
    one = pixels(np.array([[1.0, 1.0]]))
    # The key beside the plot has the same colours, on less than 2 000 pixels.
    assert is_colour(one, round(0.5 * 255) / 255).sum() > 5000
    for value, share in ((1e-9, 0.0), (1e-2, 0.0), (1e2, 1.0), (1e9, 1.0)):
        assert is_colour(pixels(np.array([[1.0, value]])), share).sum() > 3000


def test_what_is_not_finite_is_a_board_on_the_plot_alone() -> None:
    plain, broken = (pixels(np.array([[1.0, value]])) for value in (1.0, math.nan))
    differs = (plain != broken).any(-1)
    columns = np.flatnonzero(differs.any(0))
    assert columns[-1] - columns[0] == 199  # the second of two columns
    assert set(map(tuple, broken[differs])) == {(20, 20, 20), (255, 255, 255)}


def test_the_background_is_opaque_so_that_it_reads_on_a_dark_page() -> None:
    from PIL import Image

    png = heat_map_png("q", "w", [0], ["a"], np.ma.masked_array([[1.0]]), (1e-2, 1e2))
    assert Image.open(io.BytesIO(png)).mode == "RGB"
    assert (pixels(np.ones((1, 1)))[0] == 255).all()


def test_onsets_are_pointed_at_in_red() -> None:
    def num_red(picture: np.ndarray) -> int:
        return int((picture == (190, 0, 0)).all(-1).sum())

    values = np.ones((3, 10))
    assert num_red(pixels(values)) == 0
    assert num_red(pixels(values, onsets=[("blocks.1", 4)])) > 50


@pytest.mark.parametrize("num_layers", [1, 2, 50, 399, 400, 401, 5000])
def test_any_number_of_layers_fits(num_layers: int) -> None:
    values = np.ones((num_layers, 3))
    values[-1] = 1e9
    picture = pixels(values)
    assert picture.shape[0] <= 66 + 800 + 54
    assert is_colour(picture, 1.0).sum() >= 600  # the worst layer is seen, whoever shares its row

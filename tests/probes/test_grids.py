"""Many steps and layers as few rows and columns: nothing that matters is lost on the way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probes.grids import (
    choose_rows,
    column_starts,
    forward_order,
    grid,
    group_steps,
    group_tags,
    thinned,
)
from probes.reading import RecordedSeries
from probes.record import Series, StepRecords

LAYERS = ["embedding", *(f"blocks.{index}.fc1" for index in range(4)), "head"]


def recorded(*points: tuple[int, float]) -> RecordedSeries:
    steps, values = zip(*points, strict=True)
    return RecordedSeries(np.array(steps, np.int64), np.array(values, np.float64))


def with_points(number: int) -> RecordedSeries:
    return recorded(*((step, 1.0) for step in range(number)))


@pytest.mark.parametrize("stride", [1, 2, 7, 200])
def test_while_there_is_room_every_step_has_a_column(stride: int) -> None:
    steps = np.arange(0, 80 * stride, stride)
    series = RecordedSeries(steps, np.ones(80))
    columns = column_starts([series], 240)
    cells = grid({"a": series}, ["a"], columns)
    assert len(columns) == 80
    assert cells.steps[0].tolist() == steps.tolist()


def test_columns_begin_at_the_first_step_and_are_equally_wide() -> None:
    assert column_starts([recorded((100, 1.0), (199, 1.0), (150, 1.0), (120, 1.0))], 2).tolist() == [100, 150]
    assert column_starts([], 5).tolist() == []
    assert column_starts([recorded((7, 1.0))], 5).tolist() == [7]


@given(
    values=st.lists(st.floats(width=32) | st.just(1e30), min_size=1, max_size=60),
    num_columns=st.integers(1, 12),
    gap=st.integers(1, 3),
)
def test_thinning_keeps_the_extremes_and_what_is_not_finite_of_every_column(
    values: list[float], num_columns: int, gap: int
) -> None:
    series = RecordedSeries(np.arange(len(values)) * gap, np.array(values))
    columns = column_starts([series], num_columns)
    kept = thinned(series, columns)
    assert np.isin(kept.steps, series.steps).all()
    assert (np.diff(kept.steps) > 0).all()
    ends = [*columns[1:].tolist(), series.steps[-1] + 1]
    for start, end in zip(columns.tolist(), ends, strict=True):
        before = series.values[(series.steps >= start) & (series.steps < end)]
        after = kept.values[(kept.steps >= start) & (kept.steps < end)]
        assert len(after) <= 3
        assert np.isfinite(before).all() == np.isfinite(after).all()
        if np.isfinite(before).any():
            finite = before[np.isfinite(before)], after[np.isfinite(after)]
            assert finite[0].min() == finite[1].min()
            assert finite[0].max() == finite[1].max()


def test_a_cell_shows_the_spike_the_dip_or_the_nan_of_its_column() -> None:
    values = np.ones((3, 10_000))
    values[0, 4321], values[1, 5432], values[2, 6543] = 1e9, 1e-9, np.nan
    by_layer = {name: RecordedSeries(np.arange(10_000), row) for name, row in zip("abc", values, strict=True)}
    cells = grid(by_layer, ["a", "b", "c"], column_starts(by_layer.values(), 100))
    assert cells.values[0, 43] == 1e9
    assert cells.values[1, 54] == 1e-9
    assert np.isnan(cells.values[2, 65])
    assert cells.steps[[0, 1, 2], [43, 54, 65]].tolist() == [4321, 5432, 6543]
    assert (cells.values[0, :43] == 1.0).all()


def test_what_was_not_recorded_is_masked() -> None:
    cells = grid({"a": recorded((0, 1.0), (2, 2.0))}, ["a", "b"], np.arange(3))
    assert np.ma.getmaskarray(cells.values).tolist() == [[False, True, False], [True, True, True]]


def test_tags_and_steps_are_grouped_alike() -> None:
    names = (
        Series("(all)", "loss/validation"),
        Series("blocks.0", "attention/entropy", call=1),
        Series("blocks.0", "attention/entropy", head=3),
        Series("blocks.0", "grad_norm"),
    )
    steps = [StepRecords(step, names, np.full(4, step + 0.5), np.full(4, np.nan)) for step in range(2)]
    tags = {name.tag: RecordedSeries(np.arange(2), np.array([0.5, 1.5])) for name in names}
    tags["alert/non-finite/blocks.0"] = recorded((1, 2.0))
    for groups in (group_steps(steps), group_tags(tags)):
        assert {quantity: list(by_layer) for quantity, by_layer in groups.items()} == {
            "loss/validation": ["(all)"],
            "attention/entropy": ["blocks.0/call_1"],
            "grad_norm": ["blocks.0"],
        }
        assert groups["grad_norm"]["blocks.0"].values.tolist() == [0.5, 1.5]


def test_layers_stand_in_the_order_of_the_forward_pass() -> None:
    rows = choose_rows({name: with_points(1) for name in reversed(LAYERS)}, LAYERS, max_rows=40)
    assert rows == LAYERS
    outputs = {
        "activation_rms": {name: with_points(1) for name in LAYERS},
        "grad_norm": {"head": with_points(1)},
    }
    assert forward_order(outputs) == LAYERS
    assert forward_order({"loss": {"(all)": with_points(1)}}) == []


def test_a_module_that_is_never_called_stands_with_its_parent() -> None:
    by_layer = {name: with_points(1) for name in ("b", "a.attention.out_proj", "a")}
    rows = choose_rows(by_layer, ["a", "a.attention", "b"], max_rows=40)
    assert rows == ["a", "a.attention.out_proj", "b"]


def test_of_many_layers_those_that_are_named_are_shown() -> None:
    layers = [f"blocks.{index}" for index in range(300)]
    rows = choose_rows(
        {layer: with_points(1) for layer in layers},
        layers,
        pointed={"blocks.123"},
        preferred={"blocks.122", "blocks.299"},
        max_rows=40,
    )
    assert len(rows) == 40
    assert {"blocks.122", "blocks.123", "blocks.299"} < set(rows)
    assert rows == sorted(rows, key=layers.index)


def test_rows_that_are_nearly_empty_are_left_out_but_for_the_one_pointed_at() -> None:
    by_layer = {"block": with_points(10), "a": with_points(1), "b": with_points(1)}
    rows = choose_rows(by_layer, ["block", "a", "b"], pointed={"b"}, preferred={"a"}, max_rows=40)
    assert rows == ["block", "b"]

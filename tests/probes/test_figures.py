"""PNG pictures of what matplotlib would not take as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from probes import figures
from probes.figures import write_figures
from probes.pictures import RunView, curves, heat_map
from probes.reading import RecordedSeries
from probes.record import ALL_LAYERS

MAX = np.finfo(np.float64).max


@pytest.mark.parametrize("values", [(-MAX, MAX), (5e-324, MAX), (0.0, 0.0), (np.nan, np.inf)])
def test_extremes_and_names_with_dollar_signs_are_drawn(tmp_path: Path, values: tuple[float, float]) -> None:
    layer, quantity = "blocks.$x^{$.0", "my$\\frac{$"
    series = RecordedSeries(np.arange(2), np.array(values))
    view = RunView("a$b_$", {quantity: {layer: series, ALL_LAYERS: series}}, [layer], layer, 1)
    shown = [heat_map(quantity, [view, view]), curves(quantity, [view, view])]
    assert all(path.stat().st_size for path in write_figures(shown, tmp_path, "report"))


def test_names_alike_but_for_odd_characters_are_pictures_of_their_own(tmp_path: Path) -> None:
    series = RecordedSeries(np.arange(2), np.ones(2))
    names = ["train/loss", "train-loss", "train loss", "é" * 200]
    view = RunView("a", {name: {ALL_LAYERS: series} for name in names}, [])
    paths = write_figures([curves(name, [view]) for name in names], tmp_path, "report")
    assert len(set(paths)) == len(list(tmp_path.iterdir())) == 4


def test_runs_whose_names_begin_with_an_underscore_are_in_the_legend() -> None:
    series = RecordedSeries(np.arange(2), np.ones(2))
    views = [RunView(name, {"loss": {ALL_LAYERS: series}}, []) for name in ("_base", "_new")]
    (legend,) = figures._curves(curves("loss", views)).legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_base", "_new"]

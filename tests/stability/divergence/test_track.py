from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stability.divergence import Alert, default_detectors
from stability.divergence.running_range import RunningRange
from stability.divergence.track import Tracks, innermost, origin
from tests.stability.divergence.series import num_calls

SOME = st.lists(st.dictionaries(st.sampled_from("abc"), st.floats(-1e6, 1e6), min_size=1), max_size=40)


@given(SOME, st.integers(1, 20))
def test_ranges_side_by_side_are_those_of_each_series_alone(
    steps: list[dict[str, float]], window: int
) -> None:
    tracks, alone = Tracks(window), {}
    for values in steps:
        tracks.append(tracks.rows(list(values)), np.array(list(values.values())))
        for layer, value in values.items():
            alone.setdefault(layer, RunningRange(window)).append(value)
        rows = tracks.rows(list(alone))
        assert tracks.lengths(rows).tolist() == [len(series) for series in alone.values()]
        assert tracks.medians(rows).tolist() == [series.median() for series in alone.values()]
        assert tracks.spreads(rows).tolist() == [series.spread() for series in alone.values()]
    for layer, state in tracks.state_dict().items():
        assert state["range"] == list(alone[layer].values)


def test_half_widths_hold_nine_tenths_of_normal_values() -> None:
    tracks = Tracks(4_000)
    rows = tracks.rows(["narrow", "wide"])
    for value in np.random.default_rng(0).normal(5.0, 1.0, 4_000):
        tracks.append(rows, np.array([value, 10 * value]))
    assert tracks.half_widths(rows).tolist() == pytest.approx([1.645, 16.45], rel=0.03)


@given(SOME)
def test_a_restored_state_is_the_same_from_then_on(steps: list[dict[str, float]]) -> None:
    tracks = Tracks(3)
    for step, values in enumerate(steps):
        rows, columns = tracks.rows(list(values)), np.array(list(values.values()))
        tracks.append(rows, columns)
        tracks.add(step, rows, columns, columns)
        restored = Tracks(3, tracks.state_dict())
        assert restored.state_dict() == tracks.state_dict()
        tracks = restored


def tracks_of(**scores: tuple[float, ...]) -> Tracks:
    tracks = Tracks(10)
    for step, of_step in enumerate(zip(*scores.values(), strict=True)):
        tracks.add(step, tracks.rows(list(scores)), np.full(len(scores), float(step)), np.array(of_step))
    return tracks


def test_onset_is_where_the_unbroken_run_begins() -> None:
    assert tracks_of(a=(0.6, 0.1, 0.6, 0.9, 1.2))["a"].onset == 2
    assert tracks_of(a=(0.6, 0.9, 0.2))["a"].onset is None


def test_the_last_values_are_kept_with_their_steps() -> None:
    assert tracks_of(a=(0.0,) * 20)["a"].recent == tuple((step, float(step)) for step in range(4, 20))


def test_the_origin_is_the_earliest_and_ties_go_as_asked() -> None:
    tracks = tracks_of(a=(0, 1, 1), b=(0, 1, 2), c=(0, 0, 9), d=(0, 0, 0))
    assert origin(tracks, "abcd", ties="first") == ("a", ("b", "c"))
    assert origin(tracks, "abcd", ties="last") == ("b", ("a", "c"))
    assert origin(tracks, "abcd", ties="worst") == ("b", ("a", "c"))


def test_a_container_is_named_only_where_nothing_in_it_is() -> None:
    assert innermost(["(root)", "a", "a.b", "ab"]) == ["a.b", "ab"]
    assert innermost(["(root)"]) == ["(root)"]


def test_containers_among_ten_times_the_layers_are_ten_times_the_work() -> None:
    def calls(number: int) -> int:
        return num_calls(lambda: innermost([f"layer.{i}" for i in range(number)]))

    assert calls(300) < 11 * calls(30)


def test_a_model_with_more_layers_runs_no_more_python() -> None:
    assert python_calls_of_a_step(100) == python_calls_of_a_step(10)


def python_calls_of_a_step(num_layers: int) -> int:
    """Function calls of the default detectors in a step that is like those before it."""
    (detector,) = default_detectors()
    generator = np.random.default_rng(0)
    calls = 0
    alerts: list[Alert] = []
    for step in range(60):
        quantities = ("grad_norm", "weight_norm", "activation_grad_norm", "update_ratio")
        values = 1 + 1e-3 * generator.random((len(quantities), num_layers))
        layers = [f"blocks.{index}" for index in range(num_layers)]
        readings = {
            quantity: dict(zip(layers, of_quantity.tolist(), strict=True))
            for quantity, of_quantity in zip(quantities, values, strict=True)
        }
        calls = num_calls(lambda step=step, readings=readings: alerts.extend(detector.update(step, readings)))
        assert not alerts
    return calls

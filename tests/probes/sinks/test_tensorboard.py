"""What TensorBoard's own reader finds of a run; what a person sees of it: tests/test_tensorboard_page.py."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import probes
from probes.record import ALL_LAYERS, Series, StepRecords
from probes.sinks import TensorBoardSink
from probes.sinks.heat_map_picture import heat_map_png
from stability.divergence import Alert

LAYERS = ["embed", "blocks.0", "blocks.1", "head"]
SERIES = (
    *(Series(layer, "grad_norm") for layer in [*LAYERS, ALL_LAYERS]),
    *(Series(layer, "attention/entropy", head=head) for layer in LAYERS[1:3] for head in (None, 0, 1)),
)


def step_records(step: int, value: float = 1.0) -> StepRecords:
    return StepRecords(step, SERIES, np.full(len(SERIES), value), np.full(len(SERIES), math.nan))


def alert(step: int) -> Alert:
    return Alert(step, "blocks.1", "grad_norm", "divergence", 1.0, None, "it rose.", kind="explosion")


def accumulated(directory: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory), size_guidance={"images": 0, "tensors": 0}).Reload()


def test_tags_are_quantity_and_layer_and_come_back_alone(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, layers=LAYERS)
    for step in range(3):
        sink.write(step_records(step))
    sink.close()
    layers = {f"grad_norm/{layer}" for layer in [*LAYERS, ALL_LAYERS]}
    layers |= {f"attention/entropy/{layer}" for layer in LAYERS[1:3]}
    assert set(probes.read(tmp_path)) == layers
    tags = accumulated(tmp_path).Tags()
    assert {tag for tag in tags["scalars"] if not tag.startswith("overview/")} == layers
    assert tags["images"] == ["heat_map/grad_norm", "heat_map/attention/entropy"]
    assert tags["histograms"] == ["attention/entropy/heads"]


def test_everything_is_written_when_write_returns(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in range(3):
        sink.write(step_records(step))
        assert probes.read(tmp_path)["grad_norm/head"].steps.tolist() == list(range(step + 1))
    sink.close()


def test_the_layout_is_written_and_grows_with_what_is_seen(tmp_path: Path) -> None:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    sink = TensorBoardSink(tmp_path)
    sink.write(StepRecords(0, SERIES[:5], np.ones(5), np.ones(5)))
    sink.write(step_records(1))
    sink.close()
    layouts = [
        Layout.FromString(event.tensor_proto.string_val[0])
        for event in accumulated(tmp_path).Tensors("custom_scalars__config__")
    ]
    assert [len(layout.category[0].chart) for layout in layouts] == [3, 4]


def test_heads_are_one_distribution(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    records = step_records(0)
    records.values[-6:] = [9.0, 1.0, 2.0, 9.0, 3.0, math.nan]
    sink.write(records)
    sink.close()
    (event,) = accumulated(tmp_path).Histograms("attention/entropy/heads")
    histogram = event.histogram_value
    assert (histogram.min, histogram.max, histogram.num) == (1.0, 3.0, 3)


def test_pictures_come_at_doubling_strides_at_alerts_and_at_the_end(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, layers=LAYERS)
    for step in range(100):
        sink.write(step_records(step))
        if step == 40:
            sink.write_alert(alert(40))
    sink.close()
    steps = [event.step for event in accumulated(tmp_path).Images("heat_map/grad_norm")]
    assert steps == [15, 31, 40, 63, 99]


def test_the_text_page_tells_configuration_and_alerts(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    probes.attach(model, optimizer, log_dir=tmp_path, details_every=7).close()
    (event,) = accumulated(tmp_path).Tensors("run/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    for words in ("| model | `Linear` |", "| parameters | `3` |", "lr=0.25", "details 7", torch.__version__):
        assert words in text


def test_markers_of_alerts_have_no_parentheses(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for layer in ("blocks.1", ALL_LAYERS):
        sink.write_alert(replace(alert(3), layer=layer))
    sink.close()
    scalars = accumulated(tmp_path).Tags()["scalars"]
    assert scalars == ["alert/explosion/blocks.1", "alert/explosion/[all]"]
    assert [a.layer for a in probes.read(tmp_path).alerts] == ["blocks.1", ALL_LAYERS]


def test_texts_that_utf_8_cannot_hold(tmp_path: Path) -> None:
    """As the command line of a script that was given a file of another encoding."""
    name = "caf\udce9"
    sink = TensorBoardSink(tmp_path, configuration={"command": name}, hparams={name: name})
    sink.write(step_records(0))
    sink.write_alert(replace(alert(0), layer=name))
    sink.close()
    assert probes.read(tmp_path).alerts == [replace(alert(0), layer=name)]


def test_hparams_sort_by_the_peak_gradient_norm(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams.metadata import parse_experiment_plugin_data
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data as parse_start

    sink = TensorBoardSink(tmp_path, hparams={"mechanism": "softmax", "learning_rate": 0.1})
    for step, value in enumerate((1.0, 50.0, 2.0)):
        sink.write(step_records(step, value))
    sink.close()
    events = accumulated(tmp_path)

    def content(tag: str) -> bytes:
        return events.SummaryMetadata(tag).plugin_data.content

    start = parse_start(content("_hparams_/session_start_info"))
    assert start.hparams["mechanism"].string_value == "softmax"
    assert start.hparams["learning_rate"].number_value == 0.1
    (metric,) = parse_experiment_plugin_data(content("_hparams_/experiment")).metric_infos
    assert [event.value for event in events.Scalars(metric.name.tag)] == [1.0, 50.0, 50.0]


def test_a_peak_that_is_not_finite_is_infinite(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step, value in enumerate((1.0, math.nan, 2.0)):
        sink.write(step_records(step, value))
    sink.close()
    peaks = [event.value for event in accumulated(tmp_path).Scalars("overview/peak_grad_norm")]
    assert peaks == [1.0, math.inf, math.inf]


def test_a_long_run_keeps_its_alerts_its_layout_and_one_picture(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, layers=LAYERS, max_megabytes=1)
    for step in range(4000):
        sink.write(step_records(step))
        if step % 500 == 100:
            sink.write_alert(alert(step))
        if step % 100 == 0:
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1e6
    sink.close()
    run = probes.read(tmp_path)
    assert [found.step for found in run.alerts] == list(range(100, 4000, 500))
    assert run["alert/explosion/blocks.1"].steps.tolist() == list(range(100, 4000, 500))
    steps = run["grad_norm/head"].steps
    assert (np.diff(steps) == steps[1]).all()
    assert steps[1] in (2, 4, 8)
    events = accumulated(tmp_path)
    assert events.Images("heat_map/grad_norm")[-1].step == 3999
    assert events.Tensors("custom_scalars__config__")


def test_pictures_do_not_point_at_what_the_training_went_back_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pointed: list[object] = []

    def draw(*arguments: object, onsets: list[tuple[str, int]], **options: object) -> bytes:
        pointed[:] = onsets
        return heat_map_png(*arguments, onsets=onsets, **options)

    monkeypatch.setattr("probes.sinks.tensorboard.heat_map_png", draw)
    sink = TensorBoardSink(tmp_path)
    for steps in (range(9), range(5, 7)):
        for step in steps:
            sink.write(step_records(step))
            if step in (3, 8):
                sink.write_alert(alert(step))
    sink.close()
    assert [step for _, step in pointed] == [3]


def test_a_step_of_two_parts_is_in_one_file(tmp_path: Path) -> None:
    """A file is read as a session: it would make void what the one before holds of its first step."""
    sink = TensorBoardSink(tmp_path, max_megabytes=1)
    for step in range(230):
        for quantity, count in (("grad_norm", 1300), ("weight_norm", 200)):
            series = tuple(Series(f"m.{layer}", quantity) for layer in range(count))
            sink.write(StepRecords(step, series, np.ones(count), np.full(count, math.nan)))
    sink.close()
    run = probes.read(tmp_path)
    assert len(list(tmp_path.iterdir())) > 1
    assert run["grad_norm/m.0"].steps.tolist() == run["weight_norm/m.0"].steps.tolist()


@pytest.mark.parametrize(("max_megabytes", "most"), [(10, 1000), (1, 400)])
def test_a_detector_that_speaks_at_every_step_does_not_fill_the_disk(
    tmp_path: Path, max_megabytes: int, most: int
) -> None:
    sink = TensorBoardSink(tmp_path, max_megabytes=max_megabytes)
    for step in range(1200):
        sink.write_alert(alert(step))
    sink.write(step_records(1200))
    sink.close()
    run = probes.read(tmp_path)
    assert most // 2 < len(run.alerts) <= most
    assert accumulated(tmp_path).Scalars("overview/alerts")[-1].value == 1200


def test_long_alerts_leave_room_for_the_steps(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, max_megabytes=1)
    spread = tuple(f"blocks.{index}.attention.query" for index in range(500))
    for step in range(2000):
        sink.write(step_records(step))
        sink.write_alert(replace(alert(step), spread=spread))
    sink.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1e6
    assert len(probes.read(tmp_path)["grad_norm/head"].steps) > 400


@pytest.mark.parametrize(
    "values", [[1.0, np.nextafter(1.0, 2.0)], [1e17], [1e30, 1e30], [-1.7e308, 1.0, 1.7e308], [3.0, 3.0]]
)
def test_heads_that_hardly_differ_are_a_distribution(tmp_path: Path, values: list[float]) -> None:
    series = tuple(Series("a", "attention/max_logit", head=head) for head in range(len(values)))
    sink = TensorBoardSink(tmp_path)
    sink.write(StepRecords(0, series, np.array(values), np.full(len(values), math.nan)))
    sink.close()
    (event,) = accumulated(tmp_path).Histograms("attention/max_logit/heads")
    assert event.histogram_value.num == sum(abs(value) < 1e38 for value in values)


def test_a_quantity_that_was_never_more_than_minus_infinity_has_no_picture(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(StepRecords(0, (Series("a", "attention/max_logit"),), np.array([-math.inf]), np.ones(1)))
    sink.close()
    assert accumulated(tmp_path).Tags()["images"] == []


def test_an_update_that_was_left_out_is_no_peak(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    series = (*SERIES, Series(ALL_LAYERS, "skipped_step"))
    for step, (value, skipped) in enumerate([(1.0, 0.0), (math.inf, 1.0), (2.0, 0.0)]):
        values = np.append(np.full(len(SERIES), value), skipped)
        sink.write(StepRecords(step, series, values, np.full(len(series), math.nan)))
    sink.close()
    peaks = [event.value for event in accumulated(tmp_path).Scalars("overview/peak_grad_norm")]
    assert peaks == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("hparams", [{"lr": torch.ones(1)}, {1: 2}, {"betas": (0.9, 0.99)}])
def test_hparams_of_other_types_are_refused(tmp_path: Path, hparams: Any) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match="names to numbers, texts or truth values"):
        probes.attach(model, log_dir=tmp_path / "run", hparams=hparams)
    assert not (tmp_path / "run").exists()


def test_hparams_that_are_no_mapping() -> None:
    with pytest.raises(TypeError, match="`hparams` must be a dict, .*; got list"):
        probes.attach(nn.Linear(2, 1), hparams=["lr"])  # type: ignore[arg-type]


def test_a_budget_below_a_megabyte_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`max_megabytes` must be at least 1; got 0"):
        TensorBoardSink(tmp_path, max_megabytes=0)


@pytest.mark.slow
def test_a_million_steps_of_200_layers(tmp_path: Path) -> None:
    series = tuple(
        Series(f"model.decoder.blocks.{i // 8}.attention.projection_{i % 8}", quantity)
        for quantity in ("grad_norm", "weight_norm")
        for i in range(200)
    )
    series = (*series, Series(ALL_LAYERS, "grad_norm"))
    values = np.exp(np.random.default_rng(0).normal(size=(64, len(series))))
    no_errors = np.full(len(series), math.nan)
    sink = TensorBoardSink(tmp_path)
    sizes = []
    for step in range(1_000_000):
        sink.write(StepRecords(step, series, values[step % 64], no_errors))
        if step % 1000 == 0:
            sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
    sink.close()
    assert max(sizes) < 50e6
    start = time.perf_counter()
    events = accumulated(tmp_path)
    assert time.perf_counter() - start < 30
    steps = [event.step for event in events.Scalars("grad_norm/(all)")]
    assert len(steps) > 700
    assert steps[-1] > 998_000

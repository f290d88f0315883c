"""Several sessions in one place: what a later one makes void, and what is said of it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import probes
from probes.flight_recorder_file import read_steps
from probes.record import Series, StepRecords
from probes.report import write_report
from probes.sessions import Recorded
from probes.sinks import JsonLinesSink, TensorBoardSink
from probes.sinks.sink import Sink
from stability.divergence import Alert

ALERT = Alert(0, "a", "grad_norm", "divergence", math.inf, None, "it broke.", kind="non-finite")


def sink_in(directory: Path, sink_type: type) -> Sink:
    return sink_type(directory / "run.jsonl" if sink_type is JsonLinesSink else directory)


def record(sink: Sink, steps: range, value: float, *, alerts: tuple[int, ...] = ()) -> None:
    for step in steps:
        sink.write(StepRecords(step, (Series("a", "grad_norm"),), np.array([value]), np.array([math.nan])))
        if step in alerts:
            sink.write_alert(dataclasses.replace(ALERT, step=step))
    sink.close()


@pytest.mark.parametrize("sink_type", [JsonLinesSink, TensorBoardSink])
@pytest.mark.parametrize("first", [0, 6])
def test_a_later_session_takes_the_place_of_an_earlier_one_from_its_first_step_on(
    tmp_path: Path, sink_type: type, first: int
) -> None:
    record(sink_in(tmp_path, sink_type), range(20), 1.0, alerts=(3, 15))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    record(sink_in(tmp_path, sink_type), range(first, 10), 2.0, alerts=(8,))
    run = probes.read(tmp_path)
    assert run["grad_norm/a"].steps.tolist() == list(range(10))
    assert run["grad_norm/a"].values.tolist() == [1.0] * first + [2.0] * (10 - first)
    assert [alert.step for alert in run.alerts] == ([3, 8] if first else [8])
    if sink_type is TensorBoardSink:
        assert run["alert/non-finite/a"].steps.tolist() == ([3, 8] if first else [8])
    assert all(path.read_bytes().startswith(content) for path, content in before.items())


@pytest.mark.parametrize("sink_type", [JsonLinesSink, TensorBoardSink])
def test_steps_and_alerts_that_a_session_went_back_behind_are_void(tmp_path: Path, sink_type: type) -> None:
    sink = sink_in(tmp_path, sink_type)
    for steps, value, broken in ((range(20), 1.0, 15), (range(6, 12), 2.0, 9), (range(10, 11), 3.0, None)):
        for step in steps:
            sink.write(
                StepRecords(step, (Series("a", "grad_norm"),), np.array([value]), np.full(1, math.nan))
            )
            if step == broken:  # a detector may speak of an earlier step
                sink.write_alert(dataclasses.replace(ALERT, step=step))
                sink.write_alert(dataclasses.replace(ALERT, step=step - 1))
    sink.close()
    run = probes.read(tmp_path)
    assert run["grad_norm/a"].steps.tolist() == list(range(11))
    assert run["grad_norm/a"].values.tolist() == [1.0] * 6 + [2.0] * 4 + [3.0]
    assert [alert.step for alert in run.alerts] == [9, 8]


def test_what_a_later_session_leaves_is_not_gone_through_again(tmp_path: Path) -> None:
    run = Recorded()
    lengths = []

    class Counting(dict):
        def items(self) -> object:
            lengths.append(len(self))
            return super().items()

    for first in range(0, 200, 2):
        session = Recorded([("grad_norm/a", step, 1.0) for step in range(first, first + 3)])
        run.go_on_with(session)
        run.values["grad_norm/a"] = Counting(run.values["grad_norm/a"])
    assert list(run.values["grad_norm/a"]) == list(range(201))
    assert lengths == []  # else a run of many sessions would take the square of their number


@pytest.mark.parametrize("sink_type", [JsonLinesSink, TensorBoardSink])
def test_a_session_that_recorded_nothing_makes_nothing_void(tmp_path: Path, sink_type: type) -> None:
    record(sink_in(tmp_path, sink_type), range(3), 1.0, alerts=(1,))
    record(sink_in(tmp_path, sink_type), range(0), 2.0)
    run = probes.read(tmp_path)
    assert run["grad_norm/a"].steps.tolist() == [0, 1, 2]
    assert [alert.step for alert in run.alerts] == [1]


def test_an_alert_in_a_new_file_does_not_make_its_step_void(tmp_path: Path) -> None:
    """As where a sink thins, and so begins a file, between a step and its alert."""
    record(TensorBoardSink(tmp_path), range(3), 1.0)
    sink = TensorBoardSink(tmp_path)
    sink.write_alert(dataclasses.replace(ALERT, step=2))
    sink.close()
    run = probes.read(tmp_path)
    assert run["grad_norm/a"].steps.tolist() == [0, 1, 2]
    assert [alert.step for alert in run.alerts] == [2]


def test_json_lines_of_two_sinks_stand_beside_each_other(tmp_path: Path) -> None:
    for name, quantity in (("one", "grad_norm"), ("two", "weight_norm")):
        for _ in range(2):
            sink = JsonLinesSink(tmp_path / f"{name}.jsonl")
            sink.write(StepRecords(0, (Series("a", quantity),), np.ones(1), np.ones(1)))
            sink.close()
    assert set(probes.read(tmp_path)) == {"grad_norm/a", "weight_norm/a"}


def train(
    log_dir: Path, steps: range, *, state: dict | None = None, fault: int | None = None, **options: object
) -> dict:
    """Trains a little, and returns the state at the end. Logs the number of steps; NaN at the fault."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    options = {"on_divergence": "ignore", **options}
    with probes.attach(model, optimizer, log_dir=log_dir, **options) as probe:
        if state is not None:
            probe.load_state_dict(state)
        for step in steps:
            probe.log(loss=math.nan if step == fault else steps.stop)
            model(torch.ones(1, 2)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return probe.state_dict()


RERUN = r"holds steps up to 11 of an earlier run.* step 0.*new `log_dir`.*load_state_dict"


@pytest.mark.parametrize("flight_recorder", [512, 0])
def test_a_rerun_into_the_same_directory_is_warned_of_and_read_alone(
    tmp_path: Path, flight_recorder: int
) -> None:
    train(tmp_path, range(12), fault=9)
    assert [alert.step for alert in probes.read(tmp_path).alerts] == [9]
    with pytest.warns(probes.ProbeWarning, match=RERUN) as caught:
        train(tmp_path, range(5), flight_recorder=flight_recorder)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert str(tmp_path) in str(caught[0].message)
    run = probes.read(tmp_path)
    assert run["loss/(all)"].values.tolist() == [5.0] * 5
    assert all(series.steps.max() < 5 for series in run.values())
    assert run.alerts == []
    page = write_report(tmp_path).read_text()
    assert "0 to 4" in page
    assert "not finite" not in page


def test_the_recorder_of_a_session_that_is_not_continued_stays_on_disk(tmp_path: Path) -> None:
    train(tmp_path, range(3))
    with pytest.warns(probes.ProbeWarning, match="earlier run"):
        train(tmp_path, range(2), flight_recorder=0)
    assert not (tmp_path / "flight_recorder.bin").exists()
    assert [records.step for records in read_steps(tmp_path / "flight_recorder.bin.old")] == [0, 1, 2]


def test_a_run_that_is_taken_up_again_is_not_warned_of(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", probes.ProbeWarning)
        state = train(tmp_path, range(8))
        train(tmp_path, range(8, 20), state=state, fault=15)
        train(tmp_path, range(8, 10), state=state)
    run = probes.read(tmp_path)
    assert run["loss/(all)"].values.tolist() == [8.0] * 8 + [10.0] * 2
    assert run.alerts == []


def test_a_rerun_of_one_step_is_not_merged(tmp_path: Path) -> None:
    train(tmp_path, range(1), fault=0)
    with pytest.warns(probes.ProbeWarning, match="steps up to 0"):
        train(tmp_path, range(1))
    run = probes.read(tmp_path)
    assert run.alerts == []
    assert run["loss/(all)"].values.tolist() == [1.0]

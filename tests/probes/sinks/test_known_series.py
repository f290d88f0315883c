"""Steps whose sets of series take turns, as with experts: names are worked out once for each set."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import probes
from probes.flight_recorder import FlightRecorder
from probes.flight_recorder_file import FILE_NAME
from probes.record import Series, StepRecords
from probes.sinks import TensorBoardSink, tensorboard
from probes.sinks.known_series import MAX_SETS, KnownSeries
from probes.sinks.sink import Sink


def names(expert: int) -> tuple[Series, ...]:
    return tuple(Series(f"experts.{expert}.{layer}", "grad_norm") for layer in range(3))


def write_in_turns(sink: Sink, num_experts: int, steps: int) -> None:
    for step in range(steps):
        expert = step % num_experts
        values = 100.0 * expert + np.arange(3) + step / 1000
        sink.write(StepRecords(step, names(expert), values, np.full(3, math.nan)))


def test_sets_that_take_turns_are_worked_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    of = tensorboard.Overview.of
    monkeypatch.setattr(tensorboard.Overview, "of", lambda series: [seen.append(series), of(series)][1])
    sink = TensorBoardSink(tmp_path)
    write_in_turns(sink, 3, 30)
    sink.close()
    assert seen == [names(0), names(1), names(2)]


@pytest.mark.parametrize(
    "make", [TensorBoardSink, lambda folder: FlightRecorder(folder / FILE_NAME, steps=64, values_per_step=64)]
)
def test_each_set_has_its_own_values(tmp_path: Path, make: Callable[[Path], Sink]) -> None:
    sink = make(tmp_path)
    write_in_turns(sink, 4, 40)
    sink.close()
    run = probes.read(tmp_path)
    for expert in range(4):
        series = run[f"grad_norm/experts.{expert}.2"]
        assert series.steps.tolist() == list(range(expert, 40, 4))
        assert np.allclose(series.values, 100 * expert + 2 + series.steps / 1000)


def test_what_is_remembered_is_bounded() -> None:
    known = KnownSeries[int]()
    for expert in range(3 * MAX_SETS + 1):
        known.add(names(expert), expert)
        assert known.get(names(expert)) == expert
        assert len(known) <= MAX_SETS
    assert known.get(names(0)) is None

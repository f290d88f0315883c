"""The last steps on disk: what is kept, how much room it takes, and what failures cost."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import probes
from probes.flight_recorder import FlightRecorder, set_aside
from probes.flight_recorder_file import FILE_NAME, Layout, read_steps
from probes.record import Series, StepRecords
from probes.sinks.known_series import MAX_SETS


def names(count: int, head: int | None = None) -> tuple[Series, ...]:
    return tuple(Series(f"blocks.{index}", "grad_norm", head=head) for index in range(count))


def step_records(step: int, series: tuple[Series, ...]) -> StepRecords:
    values = np.arange(len(series)) + step + 0.1
    return StepRecords(step, series, values, np.full(len(series), math.nan))


def train(log_dir: Path, steps: int, **arguments: object) -> probes.Probe:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probes.attach(model, optimizer, log_dir=log_dir, **arguments) as probe:
        for _ in range(steps):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return probe


def test_it_keeps_the_last_steps_in_full_precision(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path / "run" / "flight_recorder.bin", steps=5, values_per_step=4)
    for step in range(12):
        recorder.write(step_records(step, names(3)))
    recorder.close()
    series = probes.read(recorder.path)["grad_norm/blocks.2"]
    assert series.steps.tolist() == [7, 8, 9, 10, 11]
    assert series.values.tolist() == [step + 2.1 for step in range(7, 12)]


def test_values_that_are_not_finite_come_back(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path / "f.bin")
    values = np.array([math.nan, math.inf, -math.inf, 5e-324])
    recorder.write(StepRecords(0, names(4), values, values))
    (records,) = read_steps(recorder.path)
    np.testing.assert_array_equal(records.values, values)


def test_heads_calls_and_kinds_come_back(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path / "f.bin")
    series = (Series("é", "attention/entropy", 3, 1, 2, "estimate"), *names(2))
    recorder.write(step_records(0, series))
    (records,) = read_steps(recorder.path)
    assert set(records.series) == set(series)


def test_its_size_is_what_the_docstring_says_however_long_it_records(tmp_path: Path) -> None:
    slots, values = 16, 40
    recorder = FlightRecorder(tmp_path / "f.bin", steps=slots, values_per_step=values)
    stated = 44 + 128 * values + slots * (36 + 12 * values)
    assert os.path.getsize(recorder.path) == stated
    for step in range(200):
        recorder.write(step_records(step, names(step % 37)))
    assert os.path.getsize(recorder.path) == stated == len(recorder._map)
    # In the process: the names, and the sets of series that were seen.
    assert len(recorder._numbers) == 36
    assert len(recorder._columns) <= MAX_SETS


def test_the_size_that_attach_states(tmp_path: Path) -> None:
    train(tmp_path, 1, flight_recorder=100)
    v = 256 + 16 * 3  # layers: (root), 0, 1
    assert os.path.getsize(tmp_path / "flight_recorder.bin") == 44 + 128 * v + 100 * (36 + 12 * v)


def test_of_too_many_values_whole_layers_come_first(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path / "f.bin", values_per_step=3)
    with pytest.warns(probes.ProbeWarning, match="3 of 6 values of step 0 have no room") as caught:
        for step in range(4):
            recorder.write(step_records(step, names(4, head=0) + names(2)))
    assert len(caught) == 1
    assert [series.head for series in read_steps(recorder.path)[-1].series] == [None, None, 0]


def test_series_whose_names_find_no_room_are_left_out(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path / "f.bin", values_per_step=2)
    long = tuple(Series("x" * 100 + str(index), "grad_norm") for index in range(2))
    with pytest.warns(probes.ProbeWarning, match="1 of 2 values"):
        recorder.write(step_records(0, long))
        recorder.write(step_records(1, long))
    assert [records.series for records in read_steps(recorder.path)] == [long[:1]] * 2


def test_it_is_continued(tmp_path: Path) -> None:
    for start in (0, 3):
        recorder = FlightRecorder(tmp_path / "f.bin", steps=5, values_per_step=8)
        for step in range(start, start + 3):
            recorder.write(step_records(step, names(2 + start)))
        recorder.close()
    steps = read_steps(tmp_path / "f.bin")
    assert [records.step for records in steps] == [1, 2, 3, 4, 5]
    assert [len(records.series) for records in steps] == [2, 2, 5, 5, 5]
    assert steps[-1].values.tolist() == step_records(5, names(5)).values.tolist()


def test_a_file_of_another_size_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    for slots in (5, 9):
        recorder = FlightRecorder(path, steps=slots, values_per_step=4)
        recorder.write(step_records(slots, names(2)))
        recorder.close()
    assert [records.step for records in read_steps(path)] == [9]
    assert [records.step for records in read_steps(f"{path}.old")] == [5]


def test_a_run_taken_up_at_an_earlier_step(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path / "f.bin")
    for step in (0, 1, 2, 3, 1, 2):
        recorder.write(step_records(step, names(2 if step == 1 else 1)))
    recorder.write(step_records(2, names(1)))
    assert [records.step for records in read_steps(recorder.path)] == [0, 1, 2]


def test_a_step_that_is_told_in_two_parts_is_no_later_attempt(tmp_path: Path) -> None:
    train(tmp_path, 2, same_step=True, details_every=1)
    before, after = [set(records.series) for records in read_steps(tmp_path / "flight_recorder.bin")[:2]]
    assert {series.quantity for series in after} == {"update_ratio"}
    assert before.isdisjoint(after)
    with pytest.warns(probes.ProbeWarning, match="steps up to 1 of an earlier run"):
        train(tmp_path, 1, same_step=True, every=0, details_every=1)  # from step 0 again
    assert [records.step for records in read_steps(tmp_path / "flight_recorder.bin")] == [0, 0]


def test_two_recorders_do_not_share_a_file(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path / "f.bin")
    with pytest.raises(BlockingIOError, match="another probe records to"):
        FlightRecorder(tmp_path / "f.bin")
    recorder.close()
    FlightRecorder(tmp_path / "f.bin").close()


def test_nor_do_two_processes(tmp_path: Path) -> None:
    recorder = FlightRecorder(tmp_path / "f.bin")
    script = f"from probes.flight_recorder import FlightRecorder; FlightRecorder({str(recorder.path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "BlockingIOError: another probe records to" in done.stderr


def test_nor_do_two_processes_when_the_first_has_read_it(tmp_path: Path) -> None:
    """POSIX gives a process's lock away as soon as it closes the file, which reading it does."""
    recorder = FlightRecorder(tmp_path / FILE_NAME)
    recorder.write(step_records(0, names(1)))
    assert probes.read(tmp_path)["grad_norm/blocks.0"].steps.tolist() == [0]
    with pytest.raises(BlockingIOError, match="another probe records to"):
        FlightRecorder(recorder.path)
    set_aside(recorder.path)
    script = f"from probes.flight_recorder import FlightRecorder; FlightRecorder({str(recorder.path)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "BlockingIOError: another probe records to" in done.stderr
    recorder.close()
    assert [records.step for records in read_steps(recorder.path)] == [0]


def test_a_second_probe_in_one_directory_goes_without(tmp_path: Path) -> None:
    with probes.attach(nn.Linear(1, 1), log_dir=tmp_path):
        with pytest.warns(probes.ProbeWarning, match="no flight recorder and no incident folders"):
            train(tmp_path, 2)


def test_where_files_cannot_be_mapped_training_goes_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_device(*arguments: object) -> None:
        raise OSError(19, "No such device")

    train(tmp_path, 5)
    monkeypatch.setattr("probes.flight_recorder.mmap.mmap", no_device)
    with pytest.warns(probes.ProbeWarning, match="no flight recorder and no incident folders: .*such device"):
        train(tmp_path, 2)  # and the first session's is not read as this one's
    assert probes.read(tmp_path)["grad_norm/(all)"].steps.tolist() == [0, 1]


def test_zero_switches_it_off(tmp_path: Path) -> None:
    train(tmp_path, 2, flight_recorder=0)
    assert [path.name.split(".")[0] for path in tmp_path.iterdir()] == ["events"]


@pytest.mark.parametrize(("argument", "value"), [("steps", 0), ("values_per_step", -1)])
def test_numbers_that_are_not_positive(tmp_path: Path, argument: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"must be at least 1; got .*{value}"):
        FlightRecorder(tmp_path / "f.bin", **{argument: value})


def test_attach_refuses_a_negative_number_of_steps() -> None:
    with pytest.raises(ValueError, match="`flight_recorder` must be at least 0; got -1"):
        probes.attach(nn.Linear(1, 1), flight_recorder=-1)


def test_a_full_disk_says_so_when_the_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The largest file this process may write, in place of the disk.
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal = pytest.importorskip("signal")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(OSError, match="cannot write the flight recorder .* Choose a writable log_dir"):
            FlightRecorder(tmp_path / "f.bin", steps=512, values_per_step=1000)
        assert (tmp_path / "f.bin").stat().st_size == 0  # what room there was is left to the training
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    FlightRecorder(tmp_path / "f.bin", steps=512, values_per_step=1000).close()  # once there is room again


def test_a_failing_recorder_is_dropped_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: FlightRecorder, records: StepRecords) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(FlightRecorder, "write", full)
    with pytest.warns(probes.ProbeWarning, match="FlightRecorder failed and is dropped") as caught:
        probe = train(tmp_path, 4)
    assert len(caught) == 1
    assert {record.step for record in probe.records} == {0, 1, 2, 3}


def test_probes_read_puts_it_over_the_events(tmp_path: Path) -> None:
    probe = train(tmp_path, 6, flight_recorder=3)
    whole = [record.value for record in probe.records if record.series == Series("0", "grad_norm")]
    run = probes.read(tmp_path)["grad_norm/0"]
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert run.values.tolist() == [*np.float32(whole[:3]).tolist(), *whole[3:]]


def test_a_dropped_recorder_lets_go_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlightRecorder, "_columns_of", lambda *_: 1 / 0)
    with pytest.warns(probes.ProbeWarning, match="FlightRecorder failed and is dropped"):
        train(tmp_path, 4)
    FlightRecorder(tmp_path / "flight_recorder.bin").close()


def test_layout_of_the_parts() -> None:
    layout = Layout(3, 10)
    assert layout.slot_start(0) == layout.slot_start(3) == layout.names_end
    assert layout.slot_start(2) + layout.slot_size == layout.size


@pytest.mark.gpu
def test_it_survives_a_cuda_fault(tmp_path: Path) -> None:
    script = f"""
import torch, probes
model = torch.nn.Linear(4, 1).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with probes.attach(model, optimizer, log_dir={str(tmp_path)!r}) as probe:
    for step in range(20):
        model(torch.ones(2, 4, device="cuda")).sum().backward()
        optimizer.step()
    torch.zeros(4, device="cuda")[torch.tensor([99], device="cuda")].sum().item()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert probes.read(tmp_path / "flight_recorder.bin")["grad_norm/(all)"].steps[-1] >= 18
    (folder,) = (tmp_path / "incidents").iterdir()
    assert "ended the training in step 20" in (folder / "report.md").read_text()

"""A run's files: within their budget, thinned, whole at every moment."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import probes
from probes.sinks.event_files import EventFiles, begun_at
from probes.sinks.step_event import StepEvent

ROOT = Path(__file__).parent.parent.parent.parent
TAGS = [f"grad_norm/layer.{i}" for i in range(50)]
BUDGET = 100_000


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def write(files: EventFiles, steps: range) -> None:
    event = StepEvent(TAGS)
    for step in steps:
        if step % files.stride == 0:
            files.append(event.serialised(0.0, step, np.full(len(TAGS), step)))
            files.thin_if_full()


def steps_of(directory: Path) -> list[int]:
    series = probes.read(directory)[TAGS[-1]]
    assert series.values.tolist() == series.steps.tolist()
    return series.steps.tolist()


@pytest.mark.parametrize("size", [0, 1, 63, 5000])
def test_tensorboards_own_reader_finds_the_checksums_right(tmp_path: Path, size: int) -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    event = bytes((i * i + 7) % 256 for i in range(size))
    files = EventFiles(tmp_path, 10**6)
    files.append(event)
    files.close()
    (path,) = tmp_path.iterdir()
    reader = PyRecordReader_New(str(path))
    reader.GetNext()  # the file's version
    reader.GetNext()  # raises if a checksum is wrong
    assert reader.record() == event


def test_the_stride_doubles_and_the_budget_holds(tmp_path: Path) -> None:
    files = EventFiles(tmp_path, BUDGET)
    for start in range(0, 3000, 10):
        write(files, range(start, start + 10))
        assert size(tmp_path) < BUDGET * 2 / 3
    files.close()
    assert files.stride == 64
    assert steps_of(tmp_path) == list(range(0, 3000, 64))


def test_while_a_file_is_replaced_the_budget_holds_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (sizes.append(size(tmp_path)), fsync(file)))
    files = EventFiles(tmp_path, BUDGET)
    write(files, range(3000))
    files.close()
    assert BUDGET / 2 < max(sizes) <= BUDGET * 1.02


def test_sparse_steps_are_thinned_as_often_as_dense_ones(tmp_path: Path) -> None:
    files = EventFiles(tmp_path, BUDGET)
    write(files, range(0, 30_000, 10))
    files.close()
    assert size(tmp_path) < BUDGET
    assert 10 < len(steps_of(tmp_path)) < 60


def test_a_later_process_keeps_the_budget(tmp_path: Path) -> None:
    for start in range(0, 8000, 1000):
        files = EventFiles(tmp_path, BUDGET)
        write(files, range(start, start + 1000))
        files.close()
        assert size(tmp_path) < BUDGET * 2 / 3
    steps = steps_of(tmp_path)
    assert steps[0] == 0
    assert steps[-1] > 7900


def test_sessions_of_one_second_are_read_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first session's second file and the second session's first one have swapped names."""
    now = iter(1_700_000_000 + i / 1000 for i in range(100_000))
    monkeypatch.setattr("probes.sinks.event_files.time.time", lambda: next(now))
    for name, steps in (("0005", range(100)), ("0000", range(50, 150))):
        (tmp_path / name).mkdir()
        files = EventFiles(tmp_path / name, 10 * BUDGET)
        write(files, steps)
        files.close()
        (path,) = (tmp_path / name).iterdir()
        path.rename(tmp_path / f"events.out.tfevents.1700000000.host.1.{name}.probes")
        path.parent.rmdir()
    assert [begun_at(path) for path in sorted(tmp_path.iterdir())] != sorted(
        map(begun_at, tmp_path.iterdir())
    )
    assert steps_of(tmp_path) == [*range(150)]


def test_sessions_are_read_in_their_order_though_the_clock_was_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for first, now in ((0, 5000.0), (3, 4000.0), (5, 4000.0)):
        monkeypatch.setattr("probes.sinks.event_files.time.time", lambda now=now: now)
        files = EventFiles(tmp_path, BUDGET)
        write(files, range(first, first + 4))
        files.close()
    paths = sorted(tmp_path.iterdir(), key=begun_at)
    assert [steps_of(path)[0] for path in paths] == [0, 3, 5]
    assert paths == sorted(paths)  # TensorBoard goes by their names


def test_what_others_wrote_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "events.out.tfevents.1.host.1.0"
    other.write_bytes(b"x" * 2 * BUDGET)
    (tmp_path / ".thinned-1.host.1.0.probes").write_bytes(b"left by a killed process")
    files = EventFiles(tmp_path, BUDGET)
    write(files, range(30))
    files.close()
    assert files.stride == 1
    assert other.read_bytes() == b"x" * 2 * BUDGET
    assert not (tmp_path / ".thinned-1.host.1.0.probes").exists()


def test_a_file_another_probe_is_writing_is_not_replaced(tmp_path: Path) -> None:
    other = EventFiles(tmp_path, 10 * BUDGET)
    write(other, range(100))
    files = EventFiles(tmp_path, BUDGET)
    write(files, range(100, 2000))
    write(other, range(2000, 2010))
    files.close()
    other.close()
    steps = sorted(step for path in tmp_path.iterdir() for step in steps_of(path))
    assert [step for step in steps if step < 100 or step >= 2000] == [*range(100), *range(2000, 2010)]
    # The other's 200 KB are the other's: ours are as many as they would be alone.
    assert files.stride == 64
    assert {step for step in steps if 100 <= step < 2000} == set(range(128, 2000, 64))


def test_a_leftover_of_a_thinning_that_is_under_way_stays(tmp_path: Path) -> None:
    other = EventFiles(tmp_path, BUDGET)  # has its file locked, as one that thins it has
    (path,) = tmp_path.iterdir()
    unfinished = tmp_path / f".thinned-{path.name.removeprefix('events.out.tfevents.')}"
    unfinished.write_bytes(b"")
    EventFiles(tmp_path, BUDGET).close()
    assert unfinished.exists()
    other.close()
    EventFiles(tmp_path, BUDGET).close()
    assert not unfinished.exists()


@pytest.mark.parametrize("step", [0, 1])
def test_pictures_go_when_files_are_thinned(tmp_path: Path, step: int) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(encoded_image_string=b"picture of the first step")
    picture = Event(wall_time=1.0, step=step, summary=Summary(value=[Summary.Value(tag="map", image=image)]))
    files = EventFiles(tmp_path, BUDGET)
    files.append(picture.SerializeToString())
    write(files, range(1000))
    files.close()
    assert files.stride > 1
    assert not any(image.encoded_image_string in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize("num_texts", [0, 30, 100])
def test_what_cannot_be_thinned_does_not_run_away_with_the_stride(tmp_path: Path, num_texts: int) -> None:
    files = EventFiles(tmp_path, BUDGET)
    for _ in range(num_texts):
        files.append(b"\x1a\xe8\x07" + b"x" * 1000)  # a text of that length
    write(files, range(3000))
    files.close()
    assert 64 <= files.stride <= 256
    assert steps_of(tmp_path) == list(range(0, 3000, files.stride))


def test_where_two_steps_are_more_than_the_budget_the_first_stays(tmp_path: Path) -> None:
    files = EventFiles(tmp_path, 2000)
    write(files, range(3000))
    files.close()
    assert files.stride == 4096
    assert steps_of(tmp_path) == [0]


def test_without_locks_only_its_own_files_are_thinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    earlier = EventFiles(tmp_path, BUDGET)
    write(earlier, range(30))
    earlier.close()
    files = EventFiles(tmp_path, BUDGET)
    write(files, range(30, 3000))
    files.close()
    assert files.stride == 64
    assert [step for step in steps_of(tmp_path) if step < 64] == list(range(30))


def test_a_file_that_data_loaders_have_inherited_is_thinned(tmp_path: Path) -> None:
    files = EventFiles(tmp_path, BUDGET)
    inherited = os.dup(files._file.fileno())  # what fork leaves a worker
    write(files, range(3000))
    files.close()
    os.close(inherited)
    assert size(tmp_path) < BUDGET


def test_tensorboards_reader_goes_on_over_replaced_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = EventFiles(tmp_path, BUDGET)
    reader = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0})
    for start in range(0, 2000, 20):
        write(files, range(start, start + 20))
        reader.Reload()
    files.close()
    reader.Reload()
    seen = [event.step for event in reader.Scalars(TAGS[0])]
    assert seen == sorted(set(seen))
    assert seen[-1] == steps_of(tmp_path)[-1]
    # What was written between its last reload and a thinning, this reader (not the data server) sees only
    # when it is started anew.
    assert len(set(steps_of(tmp_path)) - set(seen)) <= 2 * np.log2(files.stride)


KILLED = f"""
import itertools, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.probes.sinks.test_event_files import BUDGET, EventFiles, write
files = EventFiles(Path(sys.argv[1]), BUDGET)
print("begun", flush=True)
for start in itertools.count(0, 10):
    write(files, range(start, start + 10))
    files.stride = min(files.stride, 2)  # so that it thins over and over
"""


def test_a_kill_while_files_are_thinned_leaves_readable_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for attempt in range(2):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(directory)], stdout=subprocess.PIPE, cwd=ROOT
        )
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.1, 0.5))
        process.kill()
        process.communicate()
        steps = steps_of(directory)
        assert steps[0] == 0
        assert len(steps) > 20
        assert size(directory) <= BUDGET * 1.02
        for path in sorted(directory.glob("events*"))[:-1]:  # the last may end in half a record
            data, start = path.read_bytes(), 0
            while start < len(data):
                start += 16 + struct.unpack_from("<Q", data, start)[0]
            assert start == len(data)

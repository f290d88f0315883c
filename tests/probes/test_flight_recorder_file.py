"""A flight recorder's file that was cut short, torn or spoilt is read as far as it is whole."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from probes.flight_recorder import FlightRecorder
from probes.flight_recorder_file import HEADER, Layout, read_steps
from probes.record import Series, StepRecords

LAYOUT = Layout(4, 6)
SERIES = tuple(Series(f"blocks.{index}", "grad_norm") for index in range(5))


def write(path: Path, steps: int) -> bytes:
    recorder = FlightRecorder(path, steps=LAYOUT.num_slots, values_per_step=LAYOUT.values_per_slot)
    for step in range(steps):
        # A new series now and then: names are written between slots.
        series = SERIES[: 1 + step]
        recorder.write(StepRecords(step, series, np.full(len(series), step + 0.5), np.zeros(len(series))))
    recorder.close()
    return path.read_bytes()


def assert_is_part_of_the_truth(path: Path) -> list[int]:
    steps = read_steps(path)
    for records in steps:
        assert records.series == SERIES[: 1 + records.step]
        assert records.values.tolist() == [records.step + 0.5] * len(records.series)
        assert all(math.isnan(error) for error in records.standard_errors)
    return [records.step for records in steps]


def test_every_truncation(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    whole = write(path, 5)
    assert assert_is_part_of_the_truth(path) == [1, 2, 3, 4]
    num_read = []
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        num_read.append(len(assert_is_part_of_the_truth(path)))
    assert num_read == sorted(num_read)
    assert num_read[-1] in (3, 4)


def test_a_recorder_continues_a_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    whole = write(path, 5)
    for size in (0, 10, HEADER.size, HEADER.size + 100, LAYOUT.names_end + 50, len(whole) - 1):
        path.write_bytes(whole[:size])
        before = assert_is_part_of_the_truth(path)
        recorder = FlightRecorder(path, steps=LAYOUT.num_slots, values_per_step=LAYOUT.values_per_slot)
        recorder.write(StepRecords(4, SERIES, np.full(5, 4.5), np.zeros(5)))
        recorder.close()
        kept = [*before, 4][-LAYOUT.num_slots :]
        assert assert_is_part_of_the_truth(path) == sorted(set(kept))  # step 4 once, of the later attempt
        (tmp_path / "f.bin.old").unlink(missing_ok=True)


def test_every_torn_slot_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    before, after = write(path, 4), write(path, 0)
    assert before == after
    recorder = FlightRecorder(path, steps=LAYOUT.num_slots, values_per_step=LAYOUT.values_per_slot)
    recorder.write(StepRecords(4, SERIES, np.full(5, 4.5), np.zeros(5)))
    recorder.close()
    after = path.read_bytes()
    changed = [index for index in range(len(before)) if before[index] != after[index]]
    # A process that dies while it writes has written a first part of it.
    for end in changed:
        path.write_bytes(after[:end] + before[end:])
        assert assert_is_part_of_the_truth(path) in ([0, 1, 2, 3], [1, 2, 3], [1, 2, 3, 4])


def test_any_spoilt_byte_costs_little_and_never_lies(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    whole = write(path, 5)
    for index in range(HEADER.size, len(whole), 7):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 0x5A]) + whole[index + 1 :])
        steps = assert_is_part_of_the_truth(path)
        if index >= LAYOUT.names_end:
            assert len(steps) >= 3


def test_names_that_a_power_loss_took_are_not_replaced_by_others(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    whole = write(path, 3)
    spoilt = bytearray(whole)
    spoilt[HEADER.size : LAYOUT.names_end] = bytes(LAYOUT.names_end - HEADER.size)
    path.write_bytes(spoilt)
    recorder = FlightRecorder(path, steps=LAYOUT.num_slots, values_per_step=LAYOUT.values_per_slot)
    others = tuple(Series("other", f"quantity {index}") for index in range(3))
    recorder.write(StepRecords(3, others, np.zeros(3), np.zeros(3)))
    recorder.close()
    (records,) = read_steps(path)
    assert (records.step, records.series) == (3, others)


def test_a_file_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "f.bin"
    for content in (b"GIF89a" * 20, b"short", LAYOUT.header.replace(b"v1", b"v9")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must be a flight recorder of version 1; it begins with"):
            read_steps(path)

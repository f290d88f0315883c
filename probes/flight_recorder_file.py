"""The flight recorder's file: its layout, and how it is read.

It has a fixed size and three parts, all little-endian::

    header   magic, number of slots, values per slot, checksum
    names    one entry per series, appended, never changed: length, checksum, JSON
    slots    a ring, one step each: checksum, counts, which names were known, sequence number, step,
             values, numbers of their series

Everything carries a checksum: what a kill, a power loss or a copy cut short has spoilt is left out.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from probes.record import Series, StepRecords

FILE_NAME = "flight_recorder.bin"

_MAGIC = b"stability-probes flight v1\n"
HEADER = struct.Struct("<32sIII")  # magic, slots, values per slot, checksum
NAME = struct.Struct("<II")  # length, checksum
# checksum, values, values left out, size and checksum of the names, sequence number, step
SLOT = struct.Struct("<IIIIIQq")
_BYTES_PER_VALUE = 8 + 4  # a float64 and the number of its series
_NAME_BYTES_PER_VALUE = 128  # a name takes about 70; single heads, seen every tenth step, need names too

# What this process records into, by device and inode. The lock is the process's own, and POSIX takes it away
# as soon as the process closes the file, however often it has opened it: such a file is not opened again.
mapped: dict[tuple[int, int], mmap.mmap] = {}


class Layout(NamedTuple):
    """Where the parts of a file lie.

    Attributes:
        num_slots: Steps that are kept.
        values_per_slot: Values that are kept of a step.
    """

    num_slots: int
    values_per_slot: int

    @property
    def header(self) -> bytes:
        """The first bytes of the file."""
        fields = (_MAGIC.ljust(32, b"\0"), self.num_slots, self.values_per_slot)
        return HEADER.pack(*fields, zlib.crc32(HEADER.pack(*fields, 0)))

    @property
    def names_end(self) -> int:
        """Where the names end and the slots begin."""
        return HEADER.size + _NAME_BYTES_PER_VALUE * self.values_per_slot

    @property
    def slot_size(self) -> int:
        """Size of a slot in bytes."""
        return SLOT.size + _BYTES_PER_VALUE * self.values_per_slot

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self.names_end + self.slot_size * self.num_slots

    def slot_start(self, sequence: int) -> int:
        """Where the slot of the step with this sequence number lies."""
        return self.names_end + self.slot_size * (sequence % self.num_slots)


def read_steps(path: str | Path) -> list[StepRecords]:
    """The steps that a flight recorder holds, oldest first; standard errors are not kept.

    What was torn or cut off is left out. Where a run was taken up again at an earlier step, the steps from
    there on are those of the later attempt.

    Raises:
        ValueError: If the file is not a flight recorder's.
    """
    mapping = mapped.get(identity(path))
    data = Path(path).read_bytes() if mapping is None else mapping[:]
    header = data[: HEADER.size]
    if not header.strip(b"\0"):
        return []  # killed before anything was recorded
    fields = HEADER.unpack(header.ljust(HEADER.size, b"\0"))
    layout = Layout(fields[1], fields[2])
    if header != layout.header:
        if len(header) < HEADER.size and _MAGIC.startswith(header[: len(_MAGIC)]):
            return []  # cut off within the header
        raise ValueError(f"{path} must be a flight recorder of version 1; it begins with {header[:16]!r}.")
    names = Names.parse(data, layout)
    steps: list[StepRecords] = []
    for slot in sorted(parse_slots(data, layout), key=lambda slot: slot.sequence):
        size, checksum = slot.names
        if names.checksums.get(size) != checksum:
            continue  # a power loss took its names; others may have come in their place
        series = tuple([names.series[number] for number in slot.numbers.tolist()])
        first = len(steps)
        while first and steps[first - 1].step >= slot.step:
            first -= 1
        # With `same_step`, what a step measures after its update has a slot of its own, of other series.
        is_later_attempt = any(
            records.step > slot.step or not set(series).isdisjoint(records.series)
            for records in steps[first:]
        )
        if is_later_attempt:
            del steps[first:]
        steps.append(StepRecords(slot.step, series, slot.values, np.full(len(series), math.nan)))
    return steps


def identity(path: str | Path | int) -> tuple[int, int]:
    """Device and inode of a file, or of a file descriptor."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


class Names(NamedTuple):
    """The series that a file names, in order; it ends where an entry was cut off."""

    series: list[Series]
    size: int
    checksums: dict[int, int]  # of the first so many bytes, up to each entry

    @classmethod
    def parse(cls, data: bytes, layout: Layout) -> Names:
        """Reads the names of a file, or of what there is of one."""
        names: list[Series] = []
        size = checksum = 0
        checksums = {0: 0}
        while (start := HEADER.size + size) + NAME.size <= min(len(data), layout.names_end):
            length, name_checksum = NAME.unpack_from(data, start)
            end = start + NAME.size + length
            name = data[start + NAME.size : end]
            if not length or zlib.crc32(name) != name_checksum:
                break
            names.append(Series(*json.loads(name)))
            size = end - HEADER.size
            checksum = checksums[size] = zlib.crc32(data[start:end], checksum)
        return cls(names, size, checksums)


class _Slot(NamedTuple):
    """One step as it lies in the file."""

    sequence: int
    step: int
    names: tuple[int, int]  # how many bytes of them were known, and their checksum
    values: np.ndarray
    numbers: np.ndarray


def parse_slots(data: bytes, layout: Layout) -> Iterator[_Slot]:
    """The slots that are whole, in the order of the file."""
    for start in range(layout.names_end, min(len(data), layout.size) - SLOT.size + 1, layout.slot_size):
        checksum, count, _, *names, sequence, step = SLOT.unpack_from(data, start)
        end = start + SLOT.size + _BYTES_PER_VALUE * count
        is_whole = count <= layout.values_per_slot and end <= len(data)
        if is_whole and zlib.crc32(data[start + 4 : end]) == checksum:
            values = np.frombuffer(data, "<f8", count, start + SLOT.size).astype(np.float64)
            yield _Slot(
                sequence,
                step,
                (names[0], names[1]),
                values,
                np.frombuffer(data, "<u4", count, end - 4 * count),
            )

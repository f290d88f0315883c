"""The last few hundred steps in a memory-mapped file, which is there whatever ends the process.

What a process has stored in a mapping belongs to the kernel: it is in the file when the process is killed or
its CUDA context is lost, without a flush.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from probes.failures import ProbeWarning
from probes.flight_recorder_file import HEADER, NAME, SLOT, Layout, Names, identity, mapped, parse_slots
from probes.record import Series, StepRecords
from probes.sinks.known_series import KnownSeries
from stability.divergence import Alert


class _Columns(NamedTuple):
    """Which values of a step with these series are kept, and the numbers of their series."""

    kept: np.ndarray
    numbers: bytes


class FlightRecorder:
    """A sink that keeps the last steps in a file of fixed size. :func:`probes.read` reads it.

    The file takes 44 + 128 v + n (36 + 12 v) bytes for n steps of v values, on disk and, as pages the kernel
    may write back and drop at any time, in memory; beside it are the names, and up to 32 sets of them. Of a
    step with more values, those of whole layers are kept first, then those of heads; a series whose name
    finds no room is not recorded. Either is warned of once.

    An existing file is continued. One of another size is kept beside it, with ``.old`` appended.

    Args:
        path: The file; directories on the way are created.
        steps: Steps that are kept.
        values_per_step: Values that are kept of a step.

    Raises:
        ValueError: If a number is not positive.
        BlockingIOError: If another recorder writes to that file.
        OSError: If the file cannot be written.
    """

    def __init__(self, path: str | Path, *, steps: int = 512, values_per_step: int = 4096) -> None:
        if steps < 1 or values_per_step < 1:
            raise ValueError(
                f"`steps` and `values_per_step` must be at least 1; got {steps} and {values_per_step}."
            )
        self.path = Path(path)
        self._layout = Layout(steps, values_per_step)
        self._columns = KnownSeries[_Columns]()
        self._has_warned = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._map = self._open()
        except BlockingIOError:
            raise
        except OSError as error:
            raise OSError(
                f"cannot write the flight recorder to {self.path}: {error}. Choose a writable log_dir."
            ) from error
        self._map[: HEADER.size] = self._layout.header
        self._identity = identity(self._file.fileno())
        mapped[self._identity] = self._map
        data = self._map[:]
        names = Names.parse(data, self._layout)
        self._numbers = {series: number for number, series in enumerate(names.series)}
        self._names_size, self._names_checksum = names.size, names.checksums[names.size]
        slots = parse_slots(data, self._layout)
        self._sequence = max((slot.sequence for slot in slots), default=-1) + 1

    def write(self, records: StepRecords) -> None:
        """See :class:`~probes.sinks.Sink`."""
        columns = self._columns_of(records.series)
        values = records.values[columns.kept].astype("<f8")
        num_left_out = len(records.series) - len(values)
        if num_left_out and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{num_left_out} of {len(records.series)} values of step {records.step} have no room in "
                f"{self.path} and are left out of it; other sinks have them.",
                ProbeWarning,
                stacklevel=2,
            )
        names = (self._names_size, self._names_checksum)
        fields = SLOT.pack(0, len(values), num_left_out, *names, self._sequence, records.step)
        content = fields[4:] + values.tobytes() + columns.numbers
        start = self._layout.slot_start(self._sequence)
        self._map[start : start + 4 + len(content)] = struct.pack("<I", zlib.crc32(content)) + content
        self._sequence += 1

    def write_alert(self, alert: Alert) -> None:
        """Nothing to do: an alert has an incident folder."""

    def close(self) -> None:
        """See :class:`~probes.sinks.Sink`."""
        mapped.pop(self._identity, None)
        self._map.close()
        self._file.close()

    def _columns_of(self, series: tuple[Series, ...]) -> _Columns:
        known = self._columns.get(series)
        if known is not None:
            return known
        order = sorted(range(len(series)), key=lambda index: series[index].head is not None)
        kept = [index for index in order if self._has_number(series[index])][: self._layout.values_per_slot]
        numbers = np.array([self._numbers[series[index]] for index in kept], dtype="<u4").tobytes()
        columns = _Columns(np.array(kept, dtype=np.intp), numbers)
        self._columns.add(series, columns)
        return columns

    def _has_number(self, series: Series) -> bool:
        """Whether the file names a series; a new one is named if there is room."""
        if series in self._numbers:
            return True
        name = json.dumps(series, separators=(",", ":")).encode()
        entry = NAME.pack(len(name), zlib.crc32(name)) + name
        start = HEADER.size + self._names_size
        if start + len(entry) > self._layout.names_end:
            return False
        self._map[start : start + len(entry)] = entry
        self._names_size += len(entry)
        self._names_checksum = zlib.crc32(entry, self._names_checksum)
        self._numbers[series] = len(self._numbers)
        return True

    def _open(self) -> tuple[BinaryIO, mmap.mmap]:
        """The file, locked, mapped and at its full size; one of another layout is renamed."""
        while True:
            _check_own(self.path)
            file = self.path.open("a+b", buffering=0)
            try:
                _lock(file, self.path)
                file.seek(0)
                header = file.read(HEADER.size)
                # Zeros: a recorder was killed before it had written anything else.
                if not header.strip(b"\0") or header == self._layout.header:
                    self._fill(file)
                    return file, mmap.mmap(file.fileno(), self._layout.size)
            except BaseException:
                file.close()
                raise
            os.replace(self.path, f"{self.path}.old")
            file.close()

    def _fill(self, file: BinaryIO) -> None:
        """Brings it to its full size."""
        # Written, not sparse: a full disk says so here, and not by a signal at the first store.
        size = begin = file.seek(0, os.SEEK_END)
        try:
            while size < self._layout.size:
                size += file.write(bytes(min(1 << 20, self._layout.size - size)))
        except OSError:
            file.truncate(begin)  # the room that there was is the training's: its checkpoints need it
            raise


def set_aside(path: Path) -> None:
    """Renames an earlier session's file, if there is one and no one records to it."""
    with contextlib.suppress(OSError):
        _check_own(path)
        with path.open("r+b") as file:
            _lock(file, path)
            os.replace(path, f"{path}.old")


def _check_own(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if identity(path) in mapped:
            raise _taken(path)


def _lock(file: BinaryIO, path: Path) -> None:
    # A lock of the process, not of the open file: forked data loaders outlive a killed parent by seconds.
    try:
        with contextlib.suppress(ImportError):  # Windows has no such locks
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise _taken(path) from None


def _taken(path: Path) -> BlockingIOError:
    return BlockingIOError(f"another probe records to {path}; close it first, or give each its own log_dir.")

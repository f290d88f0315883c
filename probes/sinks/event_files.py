"""A run's TensorBoard files within a budget of bytes, however long it lasts.

When they have grown to two thirds of it, the stride between the steps that are kept doubles, each file is
replaced by one with half of its steps, and a new file is begun. The last third is room for the file that is
being written in another's place. A file keeps its name: a TensorBoard that has read it goes on where it was.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from probes.sinks.step_event import is_image, step_of_scalars

_PREFIX, _SUFFIX = "events.out.tfevents.", ".probes"  # others' files in the directory are not ours to thin
_WALL_TIME = slice(13, 21)  # of a file's first event: after 12 bytes of frame and the field's tag
_UNFINISHED = ".thinned-"  # TensorBoard reads whatever has "tfevents" in its name
_FIRST_EVENT = b"\x1a\x0dbrain.Event:2"  # Event.file_version


def begun_at(path: Path) -> float:
    """Seconds since the epoch when a file was begun, from its first event; 0 of one that has none.

    Names tell whole seconds only, and two sessions of one process may share one.
    """
    with path.open("rb") as file:
        head = file.read(_WALL_TIME.stop)
    is_event = len(head) == _WALL_TIME.stop and head[_WALL_TIME.start - 1] == 0x09
    return struct.unpack("<d", head[_WALL_TIME])[0] if is_event else 0.0


class EventFiles:
    """Appends events; thins what is there when it becomes too much.

    Every event is with the kernel when ``append`` returns, so a killed process loses none. A file that
    another process is writing is that process's to thin, and counts towards its budget.

    Args:
        directory: Where the files are; files of earlier processes count, and are thinned too.
        max_bytes: The budget.

    Attributes:
        last_step: The newest step in the files; None before the first.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._limit = max_bytes * 2 // 3
        self.stride = 1
        self.last_step: int | None = None
        self._size = 0
        self._fixed = 0  # bytes of it that no stride takes away
        self._num_files = 0
        self._own: set[Path] = set()
        self._begun = max(map(begun_at, directory.glob(f"{_PREFIX}*{_SUFFIX}")), default=0.0)
        self._remove_unfinished()
        for _, data in self._contents():
            self._count(_records(data))
        self._file = self._begin()

    def append(self, event: bytes) -> None:
        """Adds a serialised event."""
        self._write(self._file, event)

    def open_again(self) -> None:
        """Begins a new file if the last one is closed."""
        if self._file.closed:
            self._file = self._begin()

    def thin_if_full(self) -> bool:
        """Makes room if two thirds of the budget are full.

        Returns:
            Whether it did; pictures are gone then, and to be drawn anew.
        """
        if not self._is_beyond(self._limit):
            return False
        self._thin()
        return True

    def close(self) -> None:
        """Closes the file."""
        if not self._file.closed:
            _unlock(self._file)
            self._file.close()

    def _begin(self) -> BinaryIO:
        # Later than all before, though the clock may have been put back: files are read in this order.
        self._begun = max(time.time(), self._begun + 1e-6)
        name = f"{_PREFIX}{self._begun:010.0f}.{socket.gethostname()}.{os.getpid()}"
        while True:  # a second run of one process in the same second
            path = self._directory / f"{name}.{self._num_files:04d}{_SUFFIX}"
            self._num_files += 1
            try:
                file = path.open("xb")
            except FileExistsError:
                continue
            with contextlib.suppress(OSError):  # a file system without locks
                _lock(file)
            self._own.add(path)
            wall_time = b"\x09" + struct.pack("<d", self._begun)
            self._write(file, wall_time + _FIRST_EVENT)
            return file

    def _write(self, file: BinaryIO, event: bytes) -> None:
        record = _framed(event)
        file.write(record)
        file.flush()
        self._count([memoryview(record)])

    def _count(self, records: Iterable[memoryview]) -> None:
        for record in records:
            self._size += len(record)
            step = step_of_scalars(_event(record))
            if step is not None:
                self.last_step = step
            if not step:  # step 0 is a multiple of every stride
                self._fixed += len(record)

    def _is_beyond(self, limit: int) -> bool:
        """Whether the steps take more of a limit than what is fixed leaves them, which is at least half."""
        return self._size - self._fixed >= max(limit - self._fixed, limit // 2)

    def _thin(self) -> None:
        self.close()
        # A run that was taken up again begins with stride 1, beside files that have been thinned often. The
        # stride does not outgrow the last step: beyond it there is only what is fixed.
        while self._is_beyond(self._limit * 3 // 4):
            self.stride *= 2
            self._size = self._fixed = 0
            for path, data in self._contents():
                self._replace(path, data)
        self._file = self._begin()

    def _contents(self) -> Iterator[tuple[Path, bytes]]:
        """What is in our files; each is locked until the next is asked for, and others' are passed over."""
        for path in sorted(self._directory.glob(f"{_PREFIX}*{_SUFFIX}")):
            with path.open("rb") as file:
                try:
                    _lock(file)
                except OSError:  # another process is writing it; or no lock can tell
                    if path not in self._own:
                        continue
                yield path, file.read()

    def _replace(self, path: Path, data: bytes) -> None:
        records = [record for record in _records(data) if self._is_kept(_event(record))]
        self._count(records)
        kept = b"".join(records)
        if len(kept) == len(data):
            return
        unfinished = self._directory / f"{_UNFINISHED}{path.name.removeprefix(_PREFIX)}"
        with unfinished.open("wb") as thinned:
            thinned.write(kept)
            thinned.flush()
            os.fsync(thinned.fileno())
        unfinished.replace(path)

    def _is_kept(self, event: memoryview) -> bool:
        step = step_of_scalars(event)
        if step is None:
            return not is_image(event)  # each shows the whole run, so the next one tells all
        return step % self.stride == 0

    def _remove_unfinished(self) -> None:
        """Of a process that was killed while it thinned; one that is thinning has the file locked."""
        for path in self._directory.glob(f"{_UNFINISHED}*"):
            try:
                with (self._directory / f"{_PREFIX}{path.name.removeprefix(_UNFINISHED)}").open("rb") as file:
                    _lock(file)
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                path.unlink(missing_ok=True)
            except OSError:  # locked; or no lock can tell
                continue


def _framed(payload: bytes) -> bytes:
    """A record of a TFRecord file: length, its checksum, payload, its checksum."""
    length = struct.pack("<Q", len(payload))
    return b"".join([length, _masked_crc32c(length), payload, _masked_crc32c(payload)])


def _masked_crc32c(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _event(record: memoryview) -> memoryview:
    return record[12:-4]


def _records(data: bytes) -> Iterator[memoryview]:
    """The whole records of a file; checksums are the readers' to check."""
    view = memoryview(data)
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        end = start + 12 + length + 4
        if end > len(data):
            return  # a killed process was writing it
        yield view[start:end]
        start = end


def _lock(file: BinaryIO) -> None:
    """Marks a file as being written; raises OSError if another process has, or without locks."""
    with contextlib.suppress(ImportError):  # Windows has no such locks
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlock(file: BinaryIO) -> None:
    # Closing is not enough: forked data loaders have the file open too.
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)

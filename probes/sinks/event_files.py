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
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from probes.sinks.crc32c import framed
from probes.sinks.step_event import is_image, step_of_scalars

_SUFFIX = ".probes"  # what others write into the same directory is not ours to thin
_UNFINISHED = ".thinned-"
_MAX_STRIDE = 2**40
_FIRST_EVENT = b"\x1a\x0dbrain.Event:2"  # Event.file_version


class EventFiles:
    """Appends events; thins what is there when it becomes too much.

    Every event is with the kernel when ``append`` returns, so a killed process loses none.

    Args:
        directory: Where the files are; files of earlier processes count, and are thinned too.
        max_bytes: The budget.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._limit = max_bytes * 2 // 3
        self.stride = 1
        self._num_files = 0
        for path in directory.glob(f"{_UNFINISHED}*"):  # of a process that was killed while it thinned
            path.unlink(missing_ok=True)
        self._file = self._begin()
        self._size = self._measured_size()

    def append(self, event: bytes) -> bool:
        """Adds a serialised event.

        Returns:
            Whether the files were thinned after it, so that pictures are to be drawn anew.
        """
        record = framed(event)
        self._file.write(record)
        self._file.flush()
        self._size += len(record)
        if self._size < self._limit or self.stride >= _MAX_STRIDE:
            return False
        self._thin()
        return True

    def close(self) -> None:
        """Closes the file."""
        if not self._file.closed:
            _unlock(self._file)
            self._file.close()

    def _begin(self) -> BinaryIO:
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        while True:  # a second run of one process in the same second
            path = self._directory / f"{name}.{self._num_files:04d}{_SUFFIX}"
            self._num_files += 1
            try:
                file = path.open("xb")
            except FileExistsError:
                continue
            _lock(file)
            wall_time = b"\x09" + struct.pack("<d", time.time())
            file.write(framed(wall_time + _FIRST_EVENT))
            file.flush()
            return file

    def _measured_size(self) -> int:
        return sum(path.stat().st_size for path in self._paths())

    def _paths(self) -> list[Path]:
        return sorted(self._directory.glob(f"events.out.tfevents.*{_SUFFIX}"))

    def _thin(self) -> None:
        self.close()
        # A run that was taken up again begins with stride 1, beside files that have been thinned often.
        while self._size > self._limit * 3 // 4 and self.stride < _MAX_STRIDE:
            self.stride *= 2
            for path in self._paths():
                self._replace(path)
            self._size = self._measured_size()
        self._file = self._begin()

    def _replace(self, path: Path) -> None:
        with path.open("rb") as file:
            try:
                _lock(file)
            except BlockingIOError:  # another process is writing it
                return
            data = file.read()
            kept = b"".join(record for record in _records(data) if self._is_kept(record))
            if len(kept) == len(data):
                return
            unfinished = self._directory / f"{_UNFINISHED}{os.getpid()}"
            with unfinished.open("wb") as thinned:
                thinned.write(kept)
                thinned.flush()
                os.fsync(thinned.fileno())
            unfinished.replace(path)

    def _is_kept(self, record: memoryview) -> bool:
        event = record[12:-4]
        step = step_of_scalars(event)
        if step is None:
            return not is_image(event)  # each shows the whole run, so the next one tells all
        return step % self.stride == 0


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
    """Marks a file as being written; raises BlockingIOError if another process has."""
    with contextlib.suppress(ImportError):  # Windows has no such locks
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _unlock(file: BinaryIO) -> None:
    # Closing is not enough: forked data loaders have the file open too.
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)

"""Records as a CSV table: one row a record, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TextIO

from probes.record import Record, StepRecords, alert_marker
from stability.divergence import Alert

COLUMNS = (*Record._fields, "reason")
_CRLF = "\r\n"


class CsvSink:
    """Appends to a ``.csv`` file.

    The columns are the fields of :class:`~probes.Record` and ``reason``. An alert is a row of the quantity
    ``alert/kind``, 1 for a warning and 2 for divergence, and it alone has a reason. Values are in full
    precision, also ``nan``, ``inf`` and ``-inf``; what a record does not have is empty. Each step is flushed:
    a killed process loses at most the one it was writing, and the next takes its half row away.

    Args:
        path: The file; directories on the way are created, an existing file is continued.

    Raises:
        OSError: If the file cannot be opened for writing.

    Example:
        >>> import tempfile
        >>> sink = CsvSink(f"{tempfile.mkdtemp()}/run.csv")
        >>> sink.close()
        >>> sink.path.read_text().split(",")[:4]
        ['step', 'layer', 'quantity', 'value']
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open()

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _end_last_row(self.path)
            self._file = self.path.open("a", newline="", encoding="utf-8", errors="replace")
        except OSError as error:
            raise OSError(f"cannot write records to {self.path}: {error}. Choose a writable path.") from error
        # Before Python 3.13 only what ends lines is quoted, and readers end a row at a lone "\r" too.
        self._writer = csv.writer(_Rows(self._file), lineterminator=_CRLF)
        if self._file.tell() == 0:
            self._writer.writerow(COLUMNS)
        self._file.flush()

    def write(self, records: StepRecords) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self._write((*record, None) for record in records.records())

    def write_alert(self, alert: Alert) -> None:
        """See :class:`~probes.sinks.Sink`."""
        series, value = alert_marker(alert)
        record = Record(alert.step, series.layer, series.quantity, value)
        self._write([(*record, alert.reason)])

    def close(self) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self._file.close()

    def _write(self, rows: Iterable[tuple[object, ...]]) -> None:
        if self._file.closed:  # with an earlier probe
            self._open()
        self._writer.writerows(rows)
        self._file.flush()


class _Rows(NamedTuple):
    """Where the writer's rows go, which end with a line feed alone."""

    file: TextIO

    def write(self, row: str) -> int:
        return self.file.write(row.removesuffix(_CRLF) + "\n")


def _end_last_row(path: Path) -> None:
    """Takes away the row that a killed process left half written: half a number is another number."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        begin = file.readline()
        file.seek(0)
        end, is_quoted, row = 0, False, b""  # where the last whole row ends, and what comes after
        for line in file:
            row += line
            is_quoted ^= line.count(b'"') % 2 > 0
            if line.endswith(b"\n") and not is_quoted:
                end, row = end + len(row), b""
        is_whole = not is_quoted and len(next(csv.reader([row.decode(errors="replace")]))) >= len(COLUMNS)
        is_ours = f"{','.join(COLUMNS)}\n".encode().startswith(begin)
        if is_ours and not is_whole:
            file.truncate(end)
        else:
            file.write(b"\n")

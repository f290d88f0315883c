"""Records as a CSV table: one row a record, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from probes.record import Record, StepRecords, alert_marker
from stability.divergence import Alert

COLUMNS = (*Record._fields, "reason")


class CsvSink:
    """Appends to a ``.csv`` file.

    The columns are the fields of :class:`~probes.Record` and ``reason``. An alert is a row of the quantity
    ``alert/kind``, 1 for a warning and 2 for divergence, and it alone has a reason. Values are in full
    precision, also ``nan``, ``inf`` and ``-inf``; what a record does not have is empty. Each step is flushed:
    a killed process loses at most the one it was writing.

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
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_cut_short = _is_cut_short(self.path)
            self._file = self.path.open("a", newline="", encoding="utf-8")
        except OSError as error:
            raise OSError(f"cannot write records to {self.path}: {error}. Choose a writable path.") from error
        self._writer = csv.writer(self._file, lineterminator="\n")
        if self._file.tell() == 0:
            self._writer.writerow(COLUMNS)
        elif is_cut_short:
            self._file.write("\n")
        self._file.flush()

    def write(self, records: StepRecords) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self._writer.writerows((*record, None) for record in records.records())
        self._file.flush()

    def write_alert(self, alert: Alert) -> None:
        """See :class:`~probes.sinks.Sink`."""
        series, value = alert_marker(alert)
        record = Record(alert.step, series.layer, series.quantity, value)
        self._writer.writerow((*record, alert.reason))
        self._file.flush()

    def close(self) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self._file.close()


def _is_cut_short(path: Path) -> bool:
    """Whether a killed process left the last line half written."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"

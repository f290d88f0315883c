"""Records as JSON lines: every record in full precision, one object per line, for jq and pandas."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from probes.record import StepRecords
from stability.divergence import Alert

SCHEMA_VERSION = 1


class JsonLinesSink:
    """Appends to a ``.jsonl`` file.

    The first line is ``{"schema": "stability-probes", "schema_version": 1}``. Each following line has a
    ``type``: "record" (the fields of :class:`~probes.Record`; defaults are left out) or "alert" (those of
    :class:`~stability.divergence.Alert`). JSON has no NaN: non-finite values are the strings "NaN",
    "Infinity" and "-Infinity". Each step is flushed, so a dead process loses at most its last line.

    Args:
        path: The file; directories on the way are created, an existing file is continued.

    Raises:
        OSError: If the file cannot be opened for writing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise OSError(f"cannot write records to {self.path}: {error}. Choose a writable path.") from error
        if self._file.tell() == 0:
            self._write_line({"schema": "stability-probes", "schema_version": SCHEMA_VERSION})
        elif not self.path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # a killed process left half a line

    def write(self, records: StepRecords) -> None:
        """See :class:`~probes.sinks.Sink`."""
        for record in records.records():
            line: dict[str, Any] = {"type": "record", **record._asdict()}
            for field, default in record._field_defaults.items():
                if line[field] == default:
                    del line[field]
            self._write_line(line)
        self._file.flush()

    def write_alert(self, alert: Alert) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self._write_line({"type": "alert", **dataclasses.asdict(alert)})
        self._file.flush()

    def close(self) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self._file.close()

    def _write_line(self, line: dict[str, Any]) -> None:
        encoded = {key: _encode(value) for key, value in line.items()}
        self._file.write(json.dumps(encoded, allow_nan=False, separators=(",", ":")) + "\n")


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value

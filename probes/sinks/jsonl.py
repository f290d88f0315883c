"""Records as JSON lines: every record in full precision, one object per line, for jq and pandas."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from probes.record import StepRecords
from stability.divergence import Alert

SCHEMA_VERSION = 1


class JsonLinesSink:
    """Appends to a ``.jsonl`` file.

    The first line is ``{"schema": "stability-probes", "schema_version": 1}``. Each following line has a
    ``type``: "record" (the fields of :class:`~probes.Record`; defaults are left out), "alert" (those of
    :class:`~stability.divergence.Alert`) or "session" (no others: a later process continues the file from
    here on). JSON has no NaN: non-finite values are the strings "NaN", "Infinity" and "-Infinity". Each step
    is flushed: a killed process loses at most the one it was writing.

    Args:
        path: The file; directories on the way are created, an existing file is continued.

    Raises:
        OSError: If the file cannot be opened for writing.

    Example:
        >>> import tempfile, torch, probes
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sink = JsonLinesSink(f"{folder}/run.jsonl")
        ...     with probes.attach(model, optimizer, sinks=[sink], details_every=0) as probe:
        ...         model(torch.ones(1, 2)).sum().backward()
        ...         optimizer.step()
        ...     lines = sink.path.read_text().splitlines()
        >>> lines[0]
        '{"schema":"stability-probes","schema_version":1}'
        >>> [line for line in lines if '"(all)"' in line]
        ['{"type":"record","step":0,"layer":"(all)","quantity":"grad_norm","value":1.73...}']
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open()

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            try:
                self._begin()
            except OSError:
                self._file.close()
                raise
        except OSError as error:
            raise OSError(f"cannot write records to {self.path}: {error}. Choose a writable path.") from error

    def write(self, records: StepRecords) -> None:
        """See :class:`~probes.sinks.Sink`."""
        lines = []
        for record in records.records():
            line: dict[str, Any] = {"type": "record", **record._asdict()}
            for field, default in record._field_defaults.items():
                if line[field] == default:
                    del line[field]
            lines.append(to_json(line) + "\n")
        self._write("".join(lines))

    def write_alert(self, alert: Alert) -> None:
        """See :class:`~probes.sinks.Sink`."""
        line = {"type": "alert", **dataclasses.asdict(alert)}
        self._write(f"{to_json(line)}\n")

    def close(self) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self._file.close()

    def _write(self, lines: str) -> None:
        if self._file.closed:  # with an earlier probe
            self._open()
        self._file.write(lines.encode())
        self._file.flush()

    def _begin(self) -> None:
        """Writes the header of a new file, or marks where another session continues an old one."""
        header = f"{to_json({'schema': 'stability-probes', 'schema_version': SCHEMA_VERSION})}\n".encode()
        with self.path.open("rb") as file:
            first_line = file.readline()
            has_header = first_line.endswith(b"\n")
            file.seek(-1 if has_header else 0, os.SEEK_END)
            is_cut_short = file.read() != b"\n"
        if not has_header:
            if not header.startswith(first_line.replace(b" ", b"")):
                raise FileExistsError(f"it holds something else, {first_line[:40]!r}")
            self._file.truncate(0)  # of a process that was killed as it began
            self._file.write(header)
        else:
            if is_cut_short:  # a killed process left its line half written
                self._file.write(b"\n")
            self._file.write(f"{to_json({'type': 'session'})}\n".encode())
        self._file.flush()


def to_json(fields: dict[str, Any]) -> str:
    """One line of JSON, without NaN."""
    return json.dumps(_encode(fields), allow_nan=False, separators=(",", ":"))


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [_encode(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value

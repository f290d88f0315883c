"""A run's state as one line on the terminal, renewed while the training goes on."""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import TextIO

from probes.alerts import gravity
from probes.quantities import QUANTITIES
from probes.record import ALL_LAYERS, StepRecords
from stability.divergence import Alert

_RENEW_SECONDS = 0.5
_MAX_LOGGED = 2
_CLEAR_LINE = "\r\x1b[2K"


class ConsoleSink:
    """Shows step, steps per second, what the script logs (the loss), the largest gradient's layer and alerts.

    The line is renewed twice a second at most, and nothing is written where the stream is no terminal: a log
    file stays free of it. An alert wipes the line, so that what is printed then stands on its own.

    Args:
        stream: Where to write; None: standard error, as it is when the sink is made.

    Example:
        >>> import io
        >>> log_file = io.StringIO()
        >>> ConsoleSink(log_file).close()
        >>> log_file.getvalue()
        ''
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._shown_at = -math.inf
        self._shown_step = 0
        self._is_line_open = False
        self._num_alerts = 0
        self._alert: Alert | None = None  # the newest of the gravest

    def write(self, records: StepRecords) -> None:
        """See :class:`~probes.sinks.Sink`."""
        if not self._is_terminal:
            return
        now = time.monotonic()
        if now - self._shown_at < _RENEW_SECONDS:
            return
        speed = (records.step - self._shown_step) / (now - self._shown_at)  # 0 the first time
        self._shown_at, self._shown_step = now, records.step
        self._show(_status(records, speed, self._num_alerts, self._alert))

    def write_alert(self, alert: Alert) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self._num_alerts += 1
        if self._alert is None or gravity(alert) >= gravity(self._alert):
            self._alert = alert
        if self._is_line_open:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()
            self._is_line_open = False

    def close(self) -> None:
        """See :class:`~probes.sinks.Sink`."""
        if self._is_line_open:
            self._stream.write("\n")
            self._stream.flush()
            self._is_line_open = False

    def _show(self, text: str) -> None:
        # One column less than there are: a full line makes some terminals begin a new one.
        width = max(shutil.get_terminal_size().columns - 1, 1)
        text = "".join(character if character.isprintable() else "?" for character in text)
        shown = text if len(text) <= width else f"{text[: width - 1]}…"
        self._stream.write(f"{_CLEAR_LINE}{shown}")
        self._stream.flush()
        self._is_line_open = True


def _status(records: StepRecords, speed: float, num_alerts: int, alert: Alert | None) -> str:
    parts = [f"step {records.step:,}"]
    if speed > 0:
        parts.append(f"{speed:.3g} steps/s")
    logged: list[str] = []
    worst: tuple[float, str, float] | None = None
    for series, value in zip(records.series, records.values.tolist(), strict=True):
        if series.quantity not in QUANTITIES:
            logged.append(f"{series.quantity} {value:.4g}")
        elif series.quantity == "grad_norm" and series.layer != ALL_LAYERS and series.head is None:
            size = value if math.isfinite(value) else math.inf
            if worst is None or size > worst[0]:
                worst = size, series.layer, value
    parts += logged[:_MAX_LOGGED]
    if num_alerts and alert is not None:
        what = alert.name.replace("-", " ")
        parts.append(f"{num_alerts} alert{'s' if num_alerts > 1 else ''}: {what} in {alert.layer}")
    if worst is not None:
        parts.append(f"largest gradient {worst[2]:.3g} in {worst[1]}")
    return " · ".join(parts)

"""What every sink can do."""

from __future__ import annotations

from typing import Protocol

from probes.record import StepRecords
from stability.divergence import Alert


class Sink(Protocol):
    """Receives each recorded step once, in order.

    A sink that raises is dropped with one warning and the training goes on.
    """

    def write(self, records: StepRecords) -> None:
        """Takes all records of one step."""
        ...

    def write_alert(self, alert: Alert) -> None:
        """Takes one alert, after the records of its step."""
        ...

    def close(self) -> None:
        """Brings everything taken so far to its place. Called once."""
        ...

"""Records in memory, bounded: the oldest steps go first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from probes.record import Record, StepRecords
from stability.divergence import Alert


class MemorySink:
    """Keeps the last ``max_values`` recorded numbers (16 bytes each) and every alert.

    Iterating yields :class:`~probes.Record` after record, oldest first.

    Args:
        max_values: How many numbers are kept; whole steps are dropped, and the newest step always stays.

    Raises:
        ValueError: If ``max_values`` is not positive.

    Example:
        >>> import torch, probes
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sink = MemorySink()
        >>> with probes.attach(model, optimizer, sinks=[sink]) as probe:
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> [record.value for record in sink if record.quantity == "grad_max_abs"]
        [1.0]
    """

    def __init__(self, max_values: int = 2_000_000) -> None:
        if max_values < 1:
            raise ValueError(f"max_values must be at least 1; got {max_values}.")
        self._max_values = max_values
        self._steps: deque[StepRecords] = deque()
        self._num_values = 0
        self.alerts: list[Alert] = []

    def __len__(self) -> int:
        return self._num_values

    def __iter__(self) -> Iterator[Record]:
        for step in list(self._steps):
            yield from step.records()

    def write(self, records: StepRecords) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self._steps.append(records)
        self._num_values += len(records.series)
        while self._num_values > self._max_values and len(self._steps) > 1:
            self._num_values -= len(self._steps.popleft().series)

    def write_alert(self, alert: Alert) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self.alerts.append(alert)

    def close(self) -> None:
        """Nothing to do: what is in memory stays readable."""

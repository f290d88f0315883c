"""What every sink can do."""

from __future__ import annotations

from typing import Protocol

from probes.record import StepRecords
from stability.divergence import Alert


class Sink(Protocol):
    """Receives each recorded step once, in order.

    A sink that raises is dropped with one warning and the training goes on.

    Example:
        >>> import torch, probes
        >>> class LargestGradient:
        ...     def write(self, records):
        ...         norms = {r.layer: r.value for r in records.records() if r.quantity == "grad_norm"}
        ...         print(records.step, max(norms, key=norms.get))
        ...     def write_alert(self, alert):
        ...         print(alert)
        ...     def close(self):
        ...         pass
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with probes.attach(model, optimizer, sinks=[LargestGradient()]) as probe:
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        0 (all)
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

"""What every sink can do."""

from __future__ import annotations

from typing import Protocol

from probes.record import StepRecords
from stability.divergence import Alert


class Sink(Protocol):
    """Receives each recorded step, usually once.

    With ``same_step`` what a step measures after its update comes as a second part of the same step; of
    several processes, what only the first has measured does. After ``load_state_dict`` steps may go back.

    A sink that raises is dropped with one warning and the training goes on.

    Example:
        >>> import torch, probes
        >>> class LargestGradient:
        ...     def write(self, records):
        ...         norms = {r.layer: r.value for r in records.records() if r.quantity == "grad_norm"}
        ...         if norms:
        ...             print(records.step, max(norms, key=norms.get))
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
        """Takes records of one step: all, or a part of them."""
        ...

    def write_alert(self, alert: Alert) -> None:
        """Takes one alert, after the records it was found in."""
        ...

    def close(self) -> None:
        """Brings everything taken so far to its place. Each probe calls it once."""
        ...

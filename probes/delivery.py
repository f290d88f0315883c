"""From the device to sinks and detectors: what happens to a step's numbers once they are measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from probes.alerts import AlertAction
from probes.pending import Pending, Transfer
from probes.record import StepRecords
from probes.sinks.memory import MemorySink
from probes.sinks.sink import Sink
from stability.divergence import Alert, Detector

T = TypeVar("T")
R = TypeVar("R")


class ProbeWarning(UserWarning):
    """Something could not be measured or written; the training goes on without it."""


class Delivery:
    """Hands each step's numbers to every sink and detector, one step after they were measured.

    By then their one asynchronous copy from the device has arrived without anyone waiting for it.

    Args:
        sinks: Where records go, beside the memory.
        detectors: Who judges them.
        action: What follows a verdict.
        layers: Names of the model's layers, in its order; that of the forward pass takes its place once it is
            known.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        detectors: Sequence[Detector],
        action: AlertAction,
        layers: Iterable[str] = (),
    ) -> None:
        self._forward_order = list(layers)
        self._num_ordered = 0
        self.memory = MemorySink()
        self._sinks: list[Sink] = [self.memory, *sinks]
        self._detectors = list(detectors)
        self._action = action
        self._in_flight: Transfer | None = None

    def send(self, step: int, pending: Pending) -> None:
        """Starts the copy of a step's numbers; delivers those of the step before.

        Raises:
            DivergenceError: If the step before shows divergence and that is to be raised.
        """
        arrived, self._in_flight = self._in_flight, None
        if pending:
            try:
                self._in_flight = Transfer(step, pending)
            except Exception as error:
                warnings.warn(
                    f"the numbers of step {step} could not be copied; training goes on without: {error!r}",
                    ProbeWarning,
                    stacklevel=2,
                )
        self._act(self._deliver(arrived))

    def close(self, *, silently: bool) -> None:
        """Delivers what is in flight and closes the sinks.

        Args:
            silently: Whether alerts of the last step are only written, not acted on.

        Raises:
            DivergenceError: As in ``send``.
        """
        arrived, self._in_flight = self._in_flight, None
        alerts = self._deliver(arrived)
        for sink in list(self._sinks):
            self._try(self._sinks, sink, sink.close)
        if not silently:
            self._act(alerts)

    def flush(self) -> None:
        """Waits for the numbers in flight and delivers them.

        Raises:
            DivergenceError: As in ``send``.
        """
        arrived, self._in_flight = self._in_flight, None
        self._act(self._deliver(arrived))

    def state_dict(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and state of every detector."""
        return [(type(detector).__name__, detector.state_dict()) for detector in self._detectors]

    def load_state_dict(self, state: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Restores the detectors.

        Raises:
            ValueError: If they are not the ones the state was saved from.
        """
        saved = [name for name, _ in state]
        present = [type(detector).__name__ for detector in self._detectors]
        if saved != present:
            raise ValueError(
                f"the state is of the detectors {saved}; this probe has {present}. Attach with the same ones."
            )
        for detector, (_, detector_state) in zip(self._detectors, state, strict=True):
            detector.load_state_dict(detector_state)

    def _deliver(self, transfer: Transfer | None) -> list[Alert]:
        if transfer is None:
            return []
        records = transfer.wait()
        for sink in list(self._sinks):
            self._try(self._sinks, sink, sink.write, records)
        readings = self._readings(records)
        alerts: list[Alert] = []
        for detector in list(self._detectors):
            alerts += self._try(self._detectors, detector, detector.update, records.step, readings) or []
        for alert in alerts:
            for sink in list(self._sinks):
                self._try(self._sinks, sink, sink.write_alert, alert)
        return alerts

    def _readings(self, records: StepRecords) -> dict[str, dict[str, float]]:
        """The step as detectors read it: whole layers only, a module's later calls under their own names."""
        readings: dict[str, dict[str, float]] = {}
        for series, value in zip(records.series, records.values.tolist(), strict=True):
            if series.head is None:
                layer = f"{series.layer}/call_{series.call}" if series.call else series.layer
                readings.setdefault(series.quantity, {})[layer] = value
        # Detectors read forward. Outputs are measured in that order, gradients at them on the way back, and
        # parameters in the optimizer's order. The step that measured most outputs knows it best.
        outputs = readings.get("activation_rms", {})
        if len(outputs) > self._num_ordered:
            self._forward_order, self._num_ordered = list(outputs), len(outputs)
        position = {layer: i for i, layer in enumerate(self._forward_order)}
        return {
            quantity: dict(sorted(values.items(), key=lambda item: position.get(item[0], -1)))
            for quantity, values in readings.items()
        }

    def _try(self, members: list[T], member: T, method: Callable[..., R], *arguments: object) -> R | None:
        """Calls a sink or detector; one that fails is dropped with a warning."""
        try:
            return method(*arguments)
        except Exception as error:
            members.remove(member)
            warnings.warn(
                f"{type(member).__name__} failed and is dropped; training and recording go on: {error!r}",
                ProbeWarning,
                stacklevel=2,
            )
            return None

    def _act(self, alerts: Iterable[Alert]) -> None:
        for alert in alerts:
            self._action(alert)

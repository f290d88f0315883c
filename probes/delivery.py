"""From the device to sinks and detectors: what happens to a step's numbers once they are measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from probes.alerts import AlertAction
from probes.collective import GlobalTransfer, LocalTransfer
from probes.detection import Detection
from probes.distributed import Ranks
from probes.failures import ProbeWarning, call_or_drop
from probes.incident import IncidentWriter
from probes.pending import Pending
from probes.readings import ForwardReadings
from probes.record import Series, StepRecords
from probes.sinks.memory import MemorySink
from probes.sinks.sink import Sink
from probes.transfer import Transfer
from stability.divergence import Alert, Detector

# Transfers that a fault of the device has cut short, kept until the process ends: freeing host memory that
# such a device was writing aborts the process, before its report is written.
_lost: list[Transfer | GlobalTransfer] = []


class _Judged(NamedTuple):
    """What of a step was judged before its update, and whether the update is left out."""

    size: int
    series: frozenset[Series]
    is_left_out: bool


class _InFlight(NamedTuple):
    """A step's numbers on their way; of a step that was judged before its update, only the others are new."""

    transfer: Transfer | GlobalTransfer
    judged: _Judged | None


class _Verdict(NamedTuple):
    """Alerts that are written and not yet acted on, and the incident folder that tells of them."""

    alerts: list[Alert]
    report: Path | None


class Delivery:
    """Hands each step's numbers to every sink and detector, one step after they were measured.

    By then their one asynchronous copy from the device has arrived without anyone waiting for it.

    Args:
        sinks: Where records go, beside the memory.
        detectors: Who judges them.
        action: What follows a verdict.
        layers: Names of the model's layers, in its order; that of the forward pass takes its place once it is
            known.
        incidents: Writes incident folders, if there is a place for them.
        ranks: The processes that train the model together, if there are others: their numbers are joined
            before anything else happens to them.

    Attributes:
        readings: Knows the order of the forward pass.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        detectors: Sequence[Detector],
        action: AlertAction,
        layers: Iterable[str] = (),
        incidents: IncidentWriter | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.readings = ForwardReadings(layers)
        self.memory = MemorySink()
        self._sinks: list[Sink] = [self.memory, *sinks]
        self.detection = Detection(detectors, can_forget=action.leaves_out_updates)
        self._action = action
        self._ranks = ranks
        self._in_flight: _InFlight | None = None
        self._alone_in_flight: LocalTransfer | None = None
        self._put_off: list[_Verdict] = []
        self.incidents = incidents
        self._judged: _Judged | None = None
        self._has_warned_of_copy = False
        self._unjudged: dict[str, dict[str, float]] = {}

    def takes(self, step: int, pending: Pending) -> bool:
        """Whether a step has anything to deliver. Several ranks answer alike, whatever each has measured."""
        return bool(pending) if self._ranks is None else self._ranks.is_due(step)

    def send(self, step: int, pending: Pending, *, is_whole: bool = True) -> None:
        """Starts the copy of a step's numbers; delivers those of the step before.

        Args:
            step: The step.
            pending: Its numbers.
            is_whole: Whether the step has ended. One that was cut short on this rank may not have been on
                others, which therefore are not asked for theirs.

        Raises:
            DivergenceError: If the step before shows divergence and that is to be raised.
        """
        judged, self._judged = self._judged, None
        arrived, alone = self._take_in_flight()
        if self._ranks is None:
            if pending and (judged is None or judged.size < pending.size):
                self._in_flight = self._start(step, pending, judged)
        elif is_whole and self._ranks.is_due(step):
            # May fail: without this rank the others would wait for ever.
            transfer = self._ranks.start(step, pending, is_rest=judged is not None)
            self._in_flight = _InFlight(transfer, judged)
            self._alone_in_flight = self._start_alone(self._ranks, step, transfer.left_out)
        else:
            self._alone_in_flight = self._start_alone(self._ranks, step, pending)
        self._act(self._deliver(arrived, alone))

    def judge(self, step: int, pending: Pending) -> Alert | None:
        """Delivers what the step under way has measured so far, waiting for it.

        What is measured later in the step goes to the sinks when it ends, and to the detectors with the
        numbers of the next.

        Returns:
            The divergence because of which the update is to be left out, if there is one and that was asked
            for.

        Raises:
            DivergenceError: If the step shows divergence and that is to be raised.
        """
        self._act(self._deliver(*self._take_in_flight()))
        started = self._start(step, pending, None)
        records = self._arrive(started)
        if started is None or records is None:
            return None
        alerts = self._hand_out(records, started.transfer)
        left_out_for = None
        if self._action.leaves_out_updates:
            left_out_for = next((alert for alert in alerts if alert.severity == "divergence"), None)
        if left_out_for is not None:
            self.detection.forget()
        self._act(self._verdict(alerts))
        self._judged = _Judged(pending.size, frozenset(records.series), left_out_for is not None)
        return left_out_for

    def close(self, *, silently: bool, step: int = 0, error: BaseException | None = None) -> None:
        """Delivers what is in flight, writes the report if there is something to tell, and closes the sinks.

        Args:
            silently: Whether alerts of the last step are only written, not acted on.
            step: The step under way.
            error: The exception that ends the training, if one does.

        Raises:
            DivergenceError: As in ``send``.
        """
        verdict = self._deliver(*self._take_in_flight())
        self.detection.close()
        if self.incidents is not None:
            self.incidents.see_end(step, error, self.readings.order)
        for sink in list(self._sinks):
            call_or_drop(self._sinks, sink, sink.close)
        if not silently:
            self._act(verdict)

    def flush(self) -> None:
        """Waits for the numbers in flight and delivers them.

        One rank may do so alone, to save a checkpoint. What the verdict asks for then happens when the step
        under way ends, as it does on the others.

        Raises:
            DivergenceError: As in ``send``, unless there are other ranks.
        """
        verdict = self._deliver(*self._take_in_flight())
        if self._ranks is None:
            self._act(verdict)
        else:
            self._put_off.append(verdict)

    def check_same_step(self, step: int) -> None:
        """Waits for the other ranks, if there are any, and raises on all of them if theirs is another.

        Raises:
            ValueError: If it is.
        """
        if self._ranks is not None:
            self._ranks.check_same("step", step)

    def abandon(self) -> None:
        """Writes the numbers in flight without judging them: the training goes back to before their step."""
        arrived, alone = self._take_in_flight()
        records = self._arrive(arrived)
        if records is not None:
            self._write(records)
        if alone is not None:
            self._write_alone(alone)
        self._put_off = []
        self._judged = None
        self._unjudged = {}

    def keep_in_memory(self) -> None:
        """Writes nothing from now on: the files are another process's. Touches no tensor, after a fork."""
        self._others = self._sinks, self.incidents  # not let go of: a file that is freed may be written to
        self._sinks, self.incidents = [self.memory], None

    def _start(self, step: int, pending: Pending, judged: _Judged | None) -> _InFlight | None:
        if self._ranks is not None:  # may fail: without this rank the others would wait for ever
            return _InFlight(self._ranks.start(step, pending, is_rest=judged is not None), judged)
        try:
            return _InFlight(Transfer(step, pending), judged)
        except Exception as error:
            self._warn_of_copy(step, error)
            return None

    def _start_alone(self, ranks: Ranks, step: int, pending: Pending | None) -> LocalTransfer | None:
        try:
            return ranks.start_alone(step, pending)
        except Exception as error:  # no other rank waits for these
            self._warn_of_copy(step, error)
            return None

    def _take_in_flight(self) -> tuple[_InFlight | None, LocalTransfer | None]:
        taken = self._in_flight, self._alone_in_flight
        self._in_flight = self._alone_in_flight = None
        return taken

    def _arrive(self, in_flight: _InFlight | None) -> StepRecords | None:
        if in_flight is None:
            return None
        try:
            records = in_flight.transfer.wait()
        except Exception as error:  # a CUDA fault or a dead rank: what was recorded is not lost
            self._give_up(in_flight.transfer, error)
            return None
        return records if in_flight.judged is None else records.without(in_flight.judged.series)

    def _write_alone(self, alone: LocalTransfer) -> None:
        try:
            records = alone.wait()
        except Exception as error:  # as in `_arrive`
            self._give_up(alone, error)
            return
        self._write(records)

    def _deliver(self, in_flight: _InFlight | None, alone: LocalTransfer | None) -> _Verdict:
        alerts: list[Alert] = []
        records = self._arrive(in_flight)
        if in_flight is not None and records is not None:
            if in_flight.judged is None:
                alerts = self._hand_out(records, in_flight.transfer)
            else:
                self._write(records)
                if not in_flight.judged.is_left_out:
                    self._unjudged = self.readings(records)
        if alone is not None:
            self._write_alone(alone)  # no detector sees it, or ranks would come to different verdicts
        return self._verdict(alerts)

    def _write(self, records: StepRecords) -> None:
        for sink in list(self._sinks):
            call_or_drop(self._sinks, sink, sink.write, records)

    def _hand_out(self, records: StepRecords, transfer: Transfer | GlobalTransfer) -> list[Alert]:
        self._write(records)
        readings = {**self._unjudged, **self.readings(records)}
        self._unjudged = {}
        alerts = self.detection.update(records.step, readings)
        if self._ranks is not None and isinstance(transfer, GlobalTransfer):
            alerts = [self._ranks.blame(alert, transfer.first_broken) for alert in alerts]
        for alert in alerts:
            for sink in list(self._sinks):
                call_or_drop(self._sinks, sink, sink.write_alert, alert)
        return alerts

    def _give_up(self, transfer: Transfer | GlobalTransfer, error: Exception) -> None:
        if transfer.has_device:
            _lost.append(transfer)
        self._warn_of_copy(transfer.step, error)

    def _warn_of_copy(self, step: int, error: Exception) -> None:
        if not self._has_warned_of_copy:
            self._has_warned_of_copy = True
            warnings.warn(
                f"the numbers of step {step} could not be copied; training goes on without: {error!r}",
                ProbeWarning,
                stacklevel=3,
            )

    def _verdict(self, alerts: list[Alert]) -> _Verdict:
        report = None
        if self.incidents is not None:
            report = self.incidents.see_alerts(alerts, self.readings.order, self.detection.episodes())
        return _Verdict(alerts, report)

    def _act(self, verdict: _Verdict) -> None:
        verdicts, self._put_off = [*self._put_off, verdict], []
        for alerts, report in verdicts:
            for alert in alerts:
                self._action(alert, report)

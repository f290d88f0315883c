"""The detectors of one probe, and steps that they are made to forget."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

from probes.detector_quantities import AwaitedLosses
from probes.failures import ProbeWarning, call_or_drop, stacklevel_of_script
from stability.divergence import Alert, Detector, Episode, EpisodeDetector, Readings
from stability.divergence.detector import what_it_reads

# What each detector remembers; None of one that could not say.
Memory = list[tuple[Detector, dict[str, Any] | None]]

# Their state is large, so it is not saved at every step: steps since then are judged again, which is exact.
SAVE_EVERY = 16


def _named(detector: Detector) -> str:
    """Its type and what it reads: two losses that change places are not the same detectors."""
    return f"{type(detector).__name__} {what_it_reads(detector)}".strip()


class Detection:
    """Asks every detector; one that fails is dropped with a warning.

    Args:
        detectors: Who judges.
        can_forget: Whether ``forget`` will be needed.
    """

    def __init__(self, detectors: Sequence[Detector], *, can_forget: bool) -> None:
        self._detectors = list(detectors)
        self._awaited = AwaitedLosses(detectors)
        self._can_forget = can_forget
        self._saved: Memory = []
        self._since: list[tuple[int, Readings]] = []

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """The alerts of a step."""
        self._awaited.see(readings)
        if self._can_forget:
            if not self._saved or len(self._since) == SAVE_EVERY:
                self._saved, self._since = self.memory(), []
            self._since.append((step, readings))
        return self._judge(step, readings)

    def close(self) -> None:
        """Warns of detectors that never had anything to judge."""
        self._awaited.tell()

    def forget(self) -> None:
        """Takes the last step back: later verdicts are as if it had never been."""
        self._since.pop()
        self._recall(self._saved)
        for step, readings in self._since:
            self._judge(step, readings)  # these verdicts were given already

    def memory(self) -> Memory:
        """What the detectors remember now, for `go_back`."""
        detectors = list(self._detectors)
        return [(d, call_or_drop(self._detectors, d, d.state_dict)) for d in detectors]

    def go_back(self, memory: Memory) -> None:
        """Takes back every step since: later verdicts are as if they had never been."""
        self._recall(memory)
        self._saved = []

    def episodes(self) -> list[Episode]:
        """The newest episode of every detector that has them."""
        merging = (detector for detector in self._detectors if isinstance(detector, EpisodeDetector))
        return [detector.episode for detector in merging if detector.episode is not None]

    def state_dict(self) -> list[tuple[str, dict[str, Any]]]:
        """Name and state of every detector."""
        return [(_named(detector), detector.state_dict()) for detector in self._detectors]

    def load_state_dict(self, state: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Restores the detectors; one that another version saved begins anew, with a warning.

        Raises:
            ValueError: If they are not the ones the state was saved from.
        """
        saved = [name for name, _ in state]
        present = [_named(detector) for detector in self._detectors]
        # Earlier versions saved types alone.
        if saved not in (present, [type(detector).__name__ for detector in self._detectors]):
            raise ValueError(
                f"the state is of the detectors {saved}; this probe has {present}. Attach with the same ones."
            )
        for detector, (_, detector_state) in zip(list(self._detectors), state, strict=True):
            self._load(detector, detector_state)
        self._saved = []

    def _load(self, detector: Detector, state: dict[str, Any]) -> None:
        # A training that is taken up after an upgrade must not fail because of who watches it.
        before = copy.deepcopy(call_or_drop(self._detectors, detector, detector.state_dict))
        if detector not in self._detectors:
            return
        try:
            detector.load_state_dict(state)
        except Exception as error:
            warnings.warn(
                f"The state of {type(detector).__name__} cannot be read ({error!r}): it was saved by another "
                "version of stability-probes, or the checkpoint is damaged. The detector goes on without it, "
                "and learns what is usual in this training again.",
                ProbeWarning,
                stacklevel=stacklevel_of_script(),
            )
            call_or_drop(self._detectors, detector, detector.load_state_dict, before)

    def _recall(self, memory: Memory) -> None:
        for detector, state in memory:
            if detector in self._detectors:
                call_or_drop(self._detectors, detector, detector.load_state_dict, copy.deepcopy(state))

    def _judge(self, step: int, readings: Readings) -> list[Alert]:
        alerts: list[Alert] = []
        for detector in list(self._detectors):
            alerts += call_or_drop(self._detectors, detector, detector.update, step, readings) or []
        return alerts

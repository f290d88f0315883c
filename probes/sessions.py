"""A run that several sessions recorded one after the other, each from attaching a probe to closing it."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from probes.failures import ProbeWarning, stacklevel_of_script
from stability.divergence import Alert

_ALERT_MARKER = "alert/"

Point = tuple[str, int, float]  # tag, step, value


class Recorded:
    """What was recorded, in one session or in several.

    Args:
        points: Of a step recorded twice the later value counts.

    Attributes:
        values: Tag → step → value.
        alerts: In the order in which they were given.
    """

    def __init__(self, points: Iterable[Point] = ()) -> None:
        self.values: defaultdict[str, dict[int, float]] = defaultdict(dict)
        for tag, step, value in points:
            self.values[tag][step] = value
        self.alerts: list[Alert] = []
        self._last_step: int | None = None

    def take(self, tag: str, step: int, value: float) -> None:
        """Takes the next number of a session.

        An earlier step than that of the one before: the training was taken back to it, by
        ``probe.load_state_dict``, and what was recorded from there on is void.
        """
        if not tag.startswith(_ALERT_MARKER):
            if self._last_step is not None and step < self._last_step:
                self._forget_from(step)
            self._last_step = step
        self.values[tag][step] = value

    def add(self, other: Recorded) -> None:
        """Takes over what stands beside it; of a step recorded twice the other's value counts."""
        for tag, by_step in other.values.items():
            self.values[tag].update(by_step)
        self.alerts += other.alerts

    def go_on_with(self, session: Recorded) -> None:
        """Takes over a later session. It makes void what is here from its first step on, alerts too."""
        # A marker may stand alone: thinning begins a new file between a step and its alert.
        of_records = (by_step for tag, by_step in session.values.items() if not tag.startswith(_ALERT_MARKER))
        first_step = min((min(by_step) for by_step in of_records), default=None)
        if first_step is not None:
            self._forget_from(first_step)
        self.add(session)

    def _forget_from(self, step: int) -> None:
        """Makes void what sessions have recorded from a step on, alerts too."""
        for tag, by_step in list(self.values.items()):
            if tag.startswith(_ALERT_MARKER):  # a detector may speak of any step, in any order
                by_step = self.values[tag] = {at: value for at, value in by_step.items() if at < step}
            # The others ascend, so that a run of many sessions does not go through all of it for each.
            while by_step and next(reversed(by_step)) >= step:
                by_step.popitem()
            if not by_step:
                del self.values[tag]
        self.alerts = [alert for alert in self.alerts if alert.step < step]


class EarlierSession(NamedTuple):
    """What was in a ``log_dir`` when a probe was attached.

    Attributes:
        log_dir: The directory.
        last_step: Of the newest session there.
    """

    log_dir: Path
    last_step: int

    def warn_of_rerun(self) -> None:
        """Says that a session from step 0 on takes its place."""
        warnings.warn(
            f"{self.log_dir} holds steps up to {self.last_step} of an earlier run, and this one begins at "
            "step 0: probes.read and the report leave the earlier one out from now on. Give a run of its own "
            "a new `log_dir`; to go on with the earlier one, call probe.load_state_dict first.",
            ProbeWarning,
            stacklevel=stacklevel_of_script(),
        )

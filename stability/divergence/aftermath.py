"""What an episode leaves behind: attention that collapsed in the wake of a gradient spike and stays so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from stability.divergence.detector import ALL_LAYERS, Alert, Readings, alert_from

_TINY = 1e-12  # a share, an entropy or a norm of zero has no logarithm


class Aftermath:
    """Follows the conditions among an episode's verdicts, each in the layer where it began.

    A condition has stayed when, the episode over, its quantity is nearer to what it was at the verdict than
    to what it was compared with then, on a logarithmic scale. What began the episode has been told: while it
    stays, all that followed is its consequence.

    Args:
        origin: What began it; None before the first episode.

    Example:
        >>> origin = Alert(100, "b", "grad_norm", "warning", 9.0, 0.01, "it grew", "gradient-explosion")
        >>> collapse = Alert(110, "a", "entropy", "warning", 0.4, 3.1, "rows fell.", "entropy-collapse")
        >>> aftermath = Aftermath(origin)
        >>> aftermath.take([origin, collapse])
        >>> aftermath.see({"entropy": {"a": 0.3}})
        >>> print(*aftermath.settle(211))
        step 211: warning in a: rows fell. It came at step 110, after gradient-explosion in b at ...
    """

    def __init__(self, origin: Alert | None = None) -> None:
        self._origin = origin
        # By kind and layer, each with the newest value since its verdict; None where there is none yet.
        self._open: dict[tuple[str, str], tuple[Alert, float | None]] = {}

    def take(self, alerts: Sequence[Alert]) -> None:
        """Follows the conditions among further verdicts; of one that comes again, the first."""
        for alert in alerts:
            if not alert.is_event:
                self._open.setdefault(_condition(alert), (alert, None))

    def see(self, readings: Readings) -> None:
        """Takes the numbers of a step after those verdicts."""
        for condition, (alert, _) in self._open.items():
            value = readings.get(alert.quantity, {}).get(alert.layer, math.nan)
            if math.isfinite(value):
                self._open[condition] = alert, value

    def settle(self, step: int) -> list[Alert]:
        """What has stayed now that the episode is over, as one alert or none; each is told or dropped once.

        What has not been recorded since its verdict is left for a later step.
        """
        seen = [(alert, value) for alert, value in self._open.values() if value is not None]
        staying = [(alert, value) for alert, value in seen if _has_stayed(alert, value)]
        self._open = {condition: known for condition, known in self._open.items() if known[1] is None}
        origin = self._origin
        if origin is None or not staying:
            return []
        begun = _condition(origin)
        if begun in self._open or any(_condition(alert) == begun for alert, _ in staying):
            self._open = {}
            return []
        (first, value), *others = staying
        reason = (
            f"{first.reason} It came at step {first.step}, after {origin.in_short}, and has stayed: "
            f"{value:.3g} now."
        )
        if others:
            also = ", ".join(f"{alert.name} in {alert.layer} ({value:.3g})" for alert, value in others)
            reason += f" So {'has' if len(others) == 1 else 'have'} {also}."
        spread = dict.fromkeys(layer for alert, _ in staying for layer in (alert.layer, *alert.spread))
        for layer in (first.layer, ALL_LAYERS):
            spread.pop(layer, None)
        return [replace(first, step=step, value=value, reason=reason, spread=tuple(spread))]

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {
            "origin": None if self._origin is None else asdict(self._origin),
            "open": [[asdict(alert), value] for alert, value in self._open.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        self._origin = None if state["origin"] is None else alert_from(state["origin"])
        known = [(alert_from(fields), value) for fields, value in state["open"]]
        self._open = {_condition(alert): (alert, value) for alert, value in known}


def _condition(alert: Alert) -> tuple[str, str]:
    return alert.name, alert.layer


def _has_stayed(alert: Alert, value: float) -> bool:
    if alert.reference is None:
        return value == alert.value
    now, then, before = (math.log(max(x, _TINY)) for x in (value, alert.value, alert.reference))
    return abs(now - then) <= abs(now - before)

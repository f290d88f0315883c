"""Gradient norms against their own recent history, on a logarithmic scale."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from typing import Any

from stability.divergence.detector import ALL_LAYERS, Alert, Readings, Severity

_SEVERITIES: tuple[Severity, ...] = ("warning", "divergence")


class GradientExplosionDetector:
    """Alerts when a layer's gradient norm leaves its recent median by orders of magnitude.

    A layer explodes when its norm reaches ``warning_ratio`` × the median of its last ``window`` calm steps;
    from ``divergence_ratio`` on the alert says divergence. The median is robust: a single spike does not move
    it, and exploding steps never enter it. Of the layers that cross in the same step, the one nearest to the
    loss is named, since gradients grow on their way back from there. One alert per severity and episode; an
    episode ends when every layer is back under ``warning_ratio``.

    Args:
        warning_ratio: Norm over median that is worth a warning. Spikes of 10 × are ordinary in training
            without clipping (docs/results/), 100 × are not.
        divergence_ratio: Norm over median that counts as an explosion: the four orders of magnitude of
            arXiv 2604.27124.
        window: Calm steps that the median covers.
        min_history: Calm steps before the first verdict; the first steps' transient has no reference.

    Raises:
        ValueError: If the ratios are not 1 < warning ≤ divergence, or the history is longer than the window.

    Example:
        >>> detector = GradientExplosionDetector(min_history=3)
        >>> calm = [detector.update(step, {"grad_norm": {"fc": 1.0}}) for step in range(3)]
        >>> [alert] = detector.update(3, {"grad_norm": {"fc": 5000.0}})
        >>> alert.layer, alert.severity, alert.reference
        ('fc', 'warning', 1.0)
    """

    def __init__(
        self,
        *,
        warning_ratio: float = 1e2,
        divergence_ratio: float = 1e4,
        window: int = 100,
        min_history: int = 20,
    ) -> None:
        if not 1 < warning_ratio <= divergence_ratio:
            raise ValueError(
                "the ratios must obey 1 < warning_ratio <= divergence_ratio; "
                f"got {warning_ratio} and {divergence_ratio}."
            )
        if not 1 <= min_history <= window:
            raise ValueError(f"min_history must lie in [1, window={window}]; got {min_history}.")
        self._thresholds = (math.log(warning_ratio), math.log(divergence_ratio))
        self._window = window
        self._min_history = min_history
        self._history: dict[str, _RunningMedian] = {}
        self._reported = 0  # severities already reported in this episode

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        worst = num_judged = 0
        origin: tuple[str, float, float] | None = None
        for layer, norm in readings.get("grad_norm", {}).items():
            if layer == ALL_LAYERS or not 0 < norm < math.inf:
                continue  # NonFiniteDetector speaks of these; a gradient of zero has no logarithm
            history = self._history.get(layer)
            if history is None:
                history = self._history[layer] = _RunningMedian(self._window)
            log_norm = math.log(norm)
            level = 0
            if len(history) >= self._min_history:
                reference = history.median()
                num_judged += 1
                level = sum(log_norm - reference >= threshold for threshold in self._thresholds)
                if level and level >= worst:  # the last such layer is the one nearest to the loss
                    worst, origin = level, (layer, norm, math.exp(reference))
            if level == 0:
                history.append(log_norm)
        if origin is None:
            if num_judged:  # a step without a finite gradient does not end an episode
                self._reported = 0
            return []
        if worst <= self._reported:
            return []
        self._reported = worst
        layer, norm, reference = origin
        reason = f"gradient norm {norm:.3g} is {norm / reference:.3g} × its median of {reference:.3g}."
        return [Alert(step, layer, "grad_norm", _SEVERITIES[worst - 1], norm, reference, reason)]

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        history = {layer: list(median.values) for layer, median in self._history.items()}
        return {"history": history, "reported": self._reported}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        self._history = {
            layer: _RunningMedian(self._window, values) for layer, values in state["history"].items()
        }
        self._reported = state["reported"]


class _RunningMedian:
    """Median of the last values; in sorted order too, since it is asked for at every step and layer."""

    def __init__(self, window: int, values: Iterable[float] = ()) -> None:
        self.values: deque[float] = deque()
        self._window = window
        self._sorted: list[float] = []
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self.values)

    def append(self, value: float) -> None:
        if len(self.values) == self._window:
            del self._sorted[bisect_left(self._sorted, self.values.popleft())]
        self.values.append(value)
        insort(self._sorted, value)

    def median(self) -> float:
        middle = len(self._sorted) // 2
        if len(self._sorted) % 2:
            return self._sorted[middle]
        return (self._sorted[middle - 1] + self._sorted[middle]) / 2

"""The loss against its own trend: single spikes, and a level that it does not come back from."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from stability.divergence.detector import ALL_LAYERS, Alert, Readings
from stability.divergence.remedies import REMEDIES
from stability.divergence.running_range import RunningRange
from stability.divergence.track import MAX_EVIDENCE, ONSET_SCORE


class LossDetector:
    """Alerts when the loss leaves its trend.

    The trend is the median of the last ``trend_steps`` losses. The noise is the spread of the last ``window``
    residuals (loss − trend of the steps before): as their quartiles give it or their 90 % quantile, whichever
    is larger, since losses of small batches have long tails; and at least ``min_relative_noise`` of the
    trend. A spike is a residual of ``spike_spreads`` times the noise that is also ``spike_ratio`` times the
    largest of them. A shift is a median residual of ``shift_spreads`` over the last ``shift_steps``, which
    noise of a constant level, of labels say, does not reach. One alert an episode, which ends after
    ``shift_steps`` ordinary steps.

    Args:
        name: Under which the script logs its loss.
        spike_spreads: Near the 6 standard deviations of OLMo-core's spike test; alone it would alarm on every
            second clean run of a small convolutional network.
        spike_ratio: Residual over the largest in the window. Calibrated: clean runs reach 6.6, bad batches
            begin at 13 (docs/detectors.md).
        shift_spreads: Calibrated: clean runs reach 3.0, label noise begins at 4.7.
        shift_steps: Steps that a shift is read from.
        trend_steps: Steps that the trend is read from.
        window: Residuals that the noise is read from.
        min_history: Residuals before the first verdict.
        min_relative_noise: Least noise, in units of the trend; a loss that does not vary at all has none.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> detector = LossDetector()
        >>> for step in range(60):
        ...     assert not detector.update(step, {"loss": {"(all)": 2 + 0.1 * (step % 3)}})
        >>> [alert] = detector.update(60, {"loss": {"(all)": 9.0}})
        >>> alert.kind, alert.layer
        ('loss-spike', '(all)')
    """

    def __init__(
        self,
        *,
        name: str = "loss",
        spike_spreads: float = 5.0,
        spike_ratio: float = 8.0,
        shift_spreads: float = 3.5,
        shift_steps: int = 8,
        trend_steps: int = 16,
        window: int = 200,
        min_history: int = 20,
        min_relative_noise: float = 1e-3,
    ) -> None:
        if min(spike_spreads, spike_ratio, shift_spreads, min_relative_noise) <= 0:
            raise ValueError(
                "spike_spreads, spike_ratio, shift_spreads and min_relative_noise must be positive; "
                f"got {spike_spreads}, {spike_ratio}, {shift_spreads} and {min_relative_noise}."
            )
        if not 1 <= min_history <= window:
            raise ValueError(f"min_history must lie in [1, window={window}]; got {min_history}.")
        if not 1 <= shift_steps <= min(trend_steps, MAX_EVIDENCE):
            raise ValueError(
                f"shift_steps must lie in [1, {min(trend_steps, MAX_EVIDENCE)}], the trend and the evidence; "
                f"got {shift_steps}."
            )
        self._name = name
        self._spike = spike_spreads
        self._spike_ratio = spike_ratio
        self._shift = shift_spreads
        self._shift_steps = shift_steps
        self._trend_steps = trend_steps
        self._window = window
        self._min_history = min_history
        self._min_relative_noise = min_relative_noise
        self._trend = RunningRange(trend_steps)
        self._residuals = RunningRange(window)
        self._scores = RunningRange(shift_steps)  # of the last residuals, in units of the noise
        self._recent: deque[tuple[int, float]] = deque(maxlen=MAX_EVIDENCE)
        self._num_calm: int | None = None  # steps since the episode's last alarm; None: no episode

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        loss = readings.get(self._name, {}).get(ALL_LAYERS, math.nan)
        if not math.isfinite(loss):
            return []
        self._recent.append((step, loss))
        if len(self._trend) < self._trend_steps:
            self._trend.append(loss)
            return []
        trend = self._trend.median()
        self._trend.append(loss)
        residual = loss - trend
        if len(self._residuals) < self._min_history:
            self._residuals.append(residual)
            return []
        noise = max(
            self._residuals.spread(),
            self._residuals.upper_spread(),
            self._min_relative_noise * abs(trend),
            _TINY,
        )
        score = residual / noise
        largest = max(self._residuals.largest(), noise)
        is_spike = score >= self._spike and residual >= self._spike_ratio * largest
        self._residuals.append(residual)
        self._scores.append(score)
        is_full = len(self._scores) == self._shift_steps
        shift = self._scores.median() if is_full else 0.0
        if not is_spike and shift < self._shift:
            if self._num_calm is not None:
                self._num_calm += 1
                if self._num_calm >= self._shift_steps:
                    self._num_calm = None
            return []
        begins, self._num_calm = self._num_calm is None, 0
        if not begins:
            return []
        if is_spike:
            onset, what = step, f"{score:.1f} × its noise of {noise:.2g}"
        else:
            steps = [at for at, _ in self._recent][-self._shift_steps :]
            scores = zip(steps, self._scores.values, strict=True)
            onset = next(at for at, score in scores if score >= ONSET_SCORE * self._shift)
            what = f"and has been {shift:.1f} × its noise of {noise:.2g} above for {self._shift_steps} steps"
        return [
            Alert(
                step,
                ALL_LAYERS,
                self._name,
                "warning",
                loss,
                trend,
                f"loss {loss:.4g} left its trend of {trend:.4g}: {what}.",
                kind="loss-spike",
                onset_step=onset,
                evidence=tuple(self._recent),
                remedies=REMEDIES["loss-spike"],
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {
            "trend": list(self._trend.values),
            "residuals": list(self._residuals.values),
            "scores": list(self._scores.values),
            "recent": [list(point) for point in self._recent],
            "num_calm": self._num_calm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        self._trend = RunningRange(self._trend_steps, state["trend"])
        self._residuals = RunningRange(self._window, state["residuals"])
        self._scores = RunningRange(self._shift_steps, state["scores"])
        self._recent = deque(((step, loss) for step, loss in state["recent"]), maxlen=MAX_EVIDENCE)
        self._num_calm = state["num_calm"]


_TINY = 1e-30

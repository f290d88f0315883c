"""The loss against its own past: first steps, single spikes, and a level that it does not come back from."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

from stability.divergence.detector import ALL_LAYERS, Alert, Readings
from stability.divergence.remedies import REMEDIES
from stability.divergence.running_range import RunningRange
from stability.divergence.track import MAX_EVIDENCE

_TREND_STEPS = 16
_NOISE_STEPS = 64
_TINY = 1e-30
_ROUNDING = 2.0**-23  # float32's
# No single step may say much of a shift: Winsorised at what a normal variable hardly reaches.
_MAX_SHIFT_SPREADS = 4.0
# Of a spike that loss and gradient show in the same step: in clean runs they never reach 4.5 together.
_WITNESSED_SPREADS = 5.0
_WITNESSED_RATIO = 1.5


class LossDetector:
    """Alerts when the loss leaves its trend.

    The trend is the median of the last 16 losses, a residual the distance of the next loss from it. The noise
    is the spread of 64 residuals, the 16 newest left out so that what begins does not hide itself: as their
    quartiles give it or their 90 % quantile, whichever is larger, since losses of small batches have long
    tails; and at least ``min_relative_noise`` of the loss that is judged, and float32's rounding of the first
    loss: one that has come to zero has no noise, and 1e-6 is no spike of it.

    * A **spike** is a residual of ``spike_spreads`` times the noise and ``spike_ratio`` times the largest of
      the last ``window``. 5 times the noise and 1.5 times the largest will do where the logarithm of the
      whole model's gradient norm, measured in the same way, stands out as far in the same step: two witnesses
      seldom err together.
    * A **shift** is told by a cumulative sum: z, the loss over the trend of 16 to 32 steps ago in units of
      the noise and cut off at ± 4, less ``shift_slack``, is added up and starts anew at zero. At
      ``shift_sum`` it is a shift, whose onset is where the sum left zero.
    * Before there is a history, a loss of ``first_ratio`` times the first one, with a gradient norm twice the
      first one where that is recorded, is told at once.

    One alert an episode, which ends after 16 ordinary steps.

    Args:
        name: Under which the script logs its loss.
        spike_spreads: OLMo-core's 6 standard deviations; alone they would alarm on many clean runs of small
            batches.
        spike_ratio: Residual over the largest in the window. Calibrated: clean runs stay under 2.5, or under
            6 standard deviations; bad batches without a witness begin at 6.3.
        shift_slack: Of Page's test: half of the smallest shift worth a word, in units of the noise.
        shift_sum: Its threshold. Calibrated: clean runs reach 14, label noise that shows begins at 26.
        first_ratio: Calibrated: clean runs reach 2.
        window: Residuals that the largest is read from.
        min_history: Residuals before spikes and shifts are judged.
        min_relative_noise: Least noise, in units of the loss that is judged (of the logarithm of a gradient
            norm, as it is); a loss that does not vary at all has none.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Cumulative sums: Page, Biometrika 41 (1954). Loss and gradient norm of a step by the standard
        deviations of the last 128: OLMo-core's SkipStepOptimizer, which skips at 6.

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
        spike_spreads: float = 6.0,
        spike_ratio: float = 5.0,
        shift_slack: float = 1.0,
        shift_sum: float = 20.0,
        first_ratio: float = 10.0,
        window: int = 200,
        min_history: int = 20,
        min_relative_noise: float = 1e-3,
    ) -> None:
        if min(spike_spreads, spike_ratio, shift_sum, min_relative_noise) <= 0 or shift_slack < 0:
            raise ValueError(
                "spike_spreads, spike_ratio, shift_sum and min_relative_noise must be positive and "
                f"shift_slack at least 0; got {spike_spreads}, {spike_ratio}, {shift_sum}, "
                f"{min_relative_noise} and {shift_slack}."
            )
        if first_ratio <= 1:
            raise ValueError(f"first_ratio must be above 1; got {first_ratio}.")
        if not 1 <= min_history <= min(window, _NOISE_STEPS):
            raise ValueError(
                f"min_history must lie in [1, {min(window, _NOISE_STEPS)}], within window and noise; "
                f"got {min_history}."
            )
        self._name = name
        self._spike = spike_spreads
        self._spike_ratio = spike_ratio
        self._slack = shift_slack
        self._shift_sum = shift_sum
        self._first_ratio = first_ratio
        self._window = window
        self._min_history = min_history
        self._min_relative_noise = min_relative_noise
        self._losses = _Series(window, min_history)
        self._gradients = _Series(window, min_history)  # logarithms of the whole model's norm
        self._sum = 0.0
        self._sum_since: int | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=MAX_EVIDENCE)
        self._num_calm: int | None = None  # steps since the episode's last alarm; None: no episode

    @property
    def name(self) -> str:
        """Under which the loss is logged."""
        return self._name

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        loss = readings.get(self._name, {}).get(ALL_LAYERS, math.nan)
        if not math.isfinite(loss):
            return []
        self._recent.append((step, loss))
        norm = readings.get("grad_norm", {}).get(ALL_LAYERS, math.nan)
        log_norm = math.log(norm) if 0 < norm < math.inf else None
        gradient = None if log_norm is None else self._gradients.add(log_norm, self._min_relative_noise)
        place = self._losses.add(
            loss, max(self._min_relative_noise * abs(loss), _ROUNDING * abs(self._losses.first))
        )
        if place is None:
            first = self._losses.first
            rises = log_norm is None or log_norm > self._gradients.first + math.log(2)
            verdict = None
            if rises and loss >= self._first_ratio * first > 0:
                verdict = (step, first, f"is {loss / first:.3g} × the first one, {first:.4g}")
        else:
            verdict = self._spike_verdict(step, place, gradient) or self._shift_verdict(step, place)
        if verdict is None:
            if self._num_calm is not None:
                self._num_calm += 1
                if self._num_calm >= _TREND_STEPS:
                    self._num_calm = None
            return []
        begins, self._num_calm = self._num_calm is None, 0
        if not begins:
            return []
        onset, reference, what = verdict
        return [
            Alert(
                step,
                ALL_LAYERS,
                self._name,
                "warning",
                loss,
                reference,
                f"loss {loss:.4g} {what}.",
                kind="loss-spike",
                onset_step=onset,
                evidence=tuple(self._recent),
                remedies=REMEDIES["loss-spike"],
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {
            "losses": self._losses.state_dict(),
            "gradients": self._gradients.state_dict(),
            "sum": self._sum,
            "sum_since": self._sum_since,
            "recent": [list(point) for point in self._recent],
            "num_calm": self._num_calm,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        self._losses = _Series(self._window, self._min_history, state["losses"])
        self._gradients = _Series(self._window, self._min_history, state["gradients"])
        self._sum, self._sum_since = state["sum"], state["sum_since"]
        self._recent = deque(((step, loss) for step, loss in state["recent"]), maxlen=MAX_EVIDENCE)
        self._num_calm = state["num_calm"]

    def _spike_verdict(
        self, step: int, loss: _Place, gradient: _Place | None
    ) -> tuple[int, float, str] | None:
        witnessed = gradient is not None and _is_witness(loss) and _is_witness(gradient)
        if not witnessed and not (loss.spreads >= self._spike and loss.ratio >= self._spike_ratio):
            return None
        what = f"left its trend of {loss.trend:.4g}: {loss.spreads:.1f} × its noise of {loss.noise:.2g}"
        return step, loss.trend, what + (", and the gradient norm with it" if witnessed else "")

    def _shift_verdict(self, step: int, loss: _Place) -> tuple[int, float, str] | None:
        z = max(-_MAX_SHIFT_SPREADS, min(_MAX_SHIFT_SPREADS, loss.level_spreads))
        self._sum += z - self._slack
        if self._sum <= 0:
            self._sum, self._sum_since = 0.0, None
            return None
        if self._sum_since is None:
            self._sum_since = step
        if self._sum < self._shift_sum:
            return None
        onset, self._sum, self._sum_since = self._sum_since, 0.0, None
        what = f"has left its level of {loss.level:.4g} since step {onset}, by more than its noise of"
        return onset, loss.level, f"{what} {loss.noise:.2g}"


class _Place(NamedTuple):
    """Where a value lies, as seen from the ones before it."""

    trend: float  # median of the last 16
    level: float  # of the 16 before those
    noise: float
    spreads: float  # over the trend, in units of the noise
    level_spreads: float
    ratio: float  # of the residual to the largest one


def _is_witness(place: _Place) -> bool:
    return place.spreads >= _WITNESSED_SPREADS and place.ratio >= _WITNESSED_RATIO


class _Series:
    """Trend, level and noise of a series."""

    def __init__(self, window: int, min_history: int, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.first: float = state.get("first", 0.0)
        self._min_history = min_history
        self._trend = RunningRange(_TREND_STEPS, state.get("trend", ()))
        self._level = RunningRange(_TREND_STEPS, state.get("level", ()))
        self._noise = RunningRange(_NOISE_STEPS, state.get("noise", ()))
        self._residuals = RunningRange(window, state.get("residuals", ()))
        self._waiting: deque[tuple[float, float]] = deque(
            (value, residual) for value, residual in state.get("waiting", ())
        )

    def add(self, value: float, least_noise: float) -> _Place | None:
        """Takes the next value; where it lies, or None while there is too little to see it from."""
        if not self._trend.values:
            self.first = value
        if len(self._trend) < _TREND_STEPS:
            self._trend.append(value)
            return None
        trend = self._trend.median()
        residual = value - trend
        self._trend.append(value)
        place = None
        if len(self._noise) >= self._min_history:
            noise = max(self._noise.spread(), self._noise.upper_spread(), least_noise, _TINY)
            level = self._level.median()
            largest = max(self._residuals.largest(), noise)
            place = _Place(trend, level, noise, residual / noise, (value - level) / noise, residual / largest)
        self._residuals.append(residual)
        self._waiting.append((value, residual))
        # The first residuals do not wait: without them nothing could be judged for 16 steps more.
        if len(self._waiting) > _TREND_STEPS or len(self._noise) < self._min_history:
            value, residual = self._waiting.popleft()
            self._level.append(value)
            self._noise.append(residual)
        return place

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return {
            "first": self.first,
            "trend": list(self._trend.values),
            "level": list(self._level.values),
            "noise": list(self._noise.values),
            "residuals": list(self._residuals.values),
            "waiting": [list(pair) for pair in self._waiting],
        }

"""Weights that change in one step as they never did: scaled, corrupted, or thrown by their own update."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stability.divergence.detector import ALL_LAYERS, Alert, Readings
from stability.divergence.remedies import REMEDIES
from stability.divergence.track import Tracks, logs, origin

_SHORTEST_HABIT = 5
_TINY = 1e-12
_SMALLEST_RATIO, _LARGEST_RATIO = 1e-300, 1e300


class WeightJumpDetector:
    """Alerts when a layer's weight norm changes in a step far beyond its own and the other layers' habit.

    Of each layer, δ is log w(t) − log w(t−1). Its habit is the half width of the middle 90 % of its last
    ``window`` changes, or the size of their median if that is larger. Its excess u is ``|δ − median|`` over
    the habit, or over that and the excess of most layers: what all layers do at once is the learning rate's
    doing, not theirs. A layer has jumped when ``|δ|`` reaches ``min_change`` and u ``ratio``, and either its
    surprise ``|δ|`` u² reaches ``surprise`` or u alone ``max_ratio``: how unusual a change is tells a fault
    from a training in motion better than how large it is. A step whose gradient was exactly zero (an expert
    that no token was routed to) teaches no habit: weight decay and momentum alone move weights far less than
    the next gradient will.

    What most layers do is an alert of its own, for the whole model: the lower median of ``|δ|`` over the
    layers reaches ``common_ratio`` times the largest of the steps that were in range (one alert until it is
    back there), so that warm-up and restarts, which come back to rates seen before, are silent; value and
    reference of that alert are these changes.

    Args:
        surprise: Change times excess squared. Calibrated: clean runs reach 0.8, query and key weights that
            grow by 5 % a step 0.9 to 3 at once (docs/detectors.md).
        min_change: Least change worth a word, however unusual: 1e-3 is the usual size of an update, and at
            the end of a training habits are smaller by orders of magnitude. The smallest change of a fault
            that the fault suite's recordings tell by its jump is 1.6e-3.
        ratio: Least excess. Calibrated with ``surprise``.
        max_ratio: Excess that needs no surprise, of a layer alone. Calibrated: clean runs reach 8.5, where a
            layer's second moment was scaled by 10⁻³ or less 14 to hundreds.
        common_ratio: The same for the median change of all layers over its largest so far.
        window: Changes that the habit covers.
        min_history: Changes that make a habit. Of n fewer ones (five at least) (min_history / n)² times the
            excess is asked: in a warm-up every step is larger than the one before.
        min_layers: Layers that can speak for the whole model.

    Raises:
        ValueError: If a threshold is not positive, a ratio is not above 1, or the history is longer than the
            window.

    Example:
        >>> detector = WeightJumpDetector(min_history=3)
        >>> for step in range(6):
        ...     weights = {"a": 1 + 1e-4 * step, "b": 2 + 1e-4 * step, "c": 3 + 1e-4 * step}
        ...     assert not detector.update(step, {"weight_norm": weights})
        >>> [alert] = detector.update(6, {"weight_norm": {**weights, "b": 40.0}})
        >>> alert.layer, alert.kind
        ('b', 'weight-jump')
    """

    def __init__(
        self,
        *,
        surprise: float = 1.1,
        min_change: float = 1e-3,
        ratio: float = 3.0,
        max_ratio: float = 12.0,
        common_ratio: float = 4.0,
        window: int = 64,
        min_history: int = 40,
        min_layers: int = 3,
    ) -> None:
        if min(surprise, min_change) <= 0:
            raise ValueError(f"surprise and min_change must be positive; got {surprise} and {min_change}.")
        if not (1 < ratio <= max_ratio and common_ratio > 1):
            raise ValueError(
                "ratios must be above 1 and max_ratio at least ratio; "
                f"got {ratio}, {max_ratio} and {common_ratio} (common)."
            )
        if not 1 <= min_history <= window:
            raise ValueError(f"min_history must lie in [1, window={window}]; got {min_history}.")
        if min_layers < 2:
            raise ValueError(f"min_layers must be at least 2; got {min_layers}.")
        self._surprise = surprise
        self._min_change = min_change
        self._ratio = ratio
        self._max_ratio = max_ratio
        self._common_ratio = common_ratio
        self._window = window
        self._min_history = min_history
        self._min_layers = min_layers
        self._tracks = Tracks(window)
        self._without_gradient: set[str] = set()  # layers, at the last step
        self._largest_common = 0.0
        self._num_common = 0  # steps that it is the largest of
        self._is_reported = False
        self._is_common_reported = False

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        norms = {layer: w for layer, w in readings.get("weight_norm", {}).items() if 0 < w < math.inf}
        layers = list(norms)
        rows, values = self._tracks.rows(layers), np.array(list(norms.values()))
        changes = self._changes(step, rows, values)
        has_changed = changes != 0
        lengths = self._tracks.lengths(rows)
        judged = np.flatnonzero(has_changed & (lengths >= _SHORTEST_HABIT))
        middles = self._tracks.medians(rows[judged])
        # Half width of the middle 90 % of the changes, or the size of their median if that is larger.
        habits = np.maximum(np.maximum(self._tracks.half_widths(rows[judged]), np.abs(middles)), _TINY)
        unusual = np.abs(changes[judged] - middles) / habits
        if len(judged) >= self._min_layers:
            unusual /= max(1.0, _median_low(unusual))
        sizes = np.abs(changes[judged])
        excesses = unusual / np.maximum(1.0, self._min_history / lengths[judged]) ** 2
        surprises = sizes * excesses**2 / self._surprise
        if np.count_nonzero(unusual >= self._ratio) == 1:  # a layer alone
            surprises = np.maximum(surprises, excesses / self._max_ratio)
        scores = np.zeros(len(layers))
        scores[judged] = np.where((excesses >= self._ratio) & (sizes >= self._min_change), surprises, 0.0)
        # Changes enter the history cut off.
        kept, reach = changes.copy(), self._ratio * habits
        kept[judged] = np.clip(kept[judged], middles - reach, middles + reach)
        is_habit = has_changed & np.array([layer not in self._without_gradient for layer in layers], bool)
        self._tracks.append(rows[is_habit], kept[is_habit])
        self._tracks.add(step, rows, values, scores)
        self._without_gradient = {layer for layer, g in readings.get("grad_norm", {}).items() if g == 0}
        if not judged.size:
            return []
        names = [layers[index] for index in judged]
        return self._common_alerts(step, np.abs(changes[has_changed])) or self._single_alerts(
            step, names, sizes, habits, unusual, scores[judged]
        )

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {
            "tracks": self._tracks.state_dict(),
            "without_gradient": sorted(self._without_gradient),
            "largest_common": self._largest_common,
            "num_common": self._num_common,
            "is_reported": self._is_reported,
            "is_common_reported": self._is_common_reported,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        self._tracks = Tracks(self._window, state["tracks"])
        self._without_gradient = set(state["without_gradient"])
        self._largest_common = state["largest_common"]
        self._num_common = state["num_common"]
        self._is_reported = state["is_reported"]
        self._is_common_reported = state["is_common_reported"]

    def _changes(self, step: int, rows: np.ndarray, norms: np.ndarray) -> np.ndarray:
        """Each layer's change of its log norm in a step; 0 where nothing was updated, or nothing is known."""
        steps, before = self._tracks.newest(rows)
        is_later = (step > steps) & ~np.isnan(before)
        with np.errstate(over="ignore", under="ignore"):
            ratios = np.where(is_later, norms / before, 1.0)
        ratios = np.clip(ratios, _SMALLEST_RATIO, _LARGEST_RATIO)  # float64's own weights may go further
        growth = logs(ratios.tolist())
        return growth / np.maximum(step - steps, 1)

    def _common_alerts(self, step: int, sizes: np.ndarray) -> list[Alert]:
        if len(sizes) < self._min_layers:
            return []
        common, largest = _median_low(sizes), self._largest_common
        self._num_common += 1
        if self._num_common <= self._min_history or common < largest * self._common_ratio:
            self._largest_common = max(common, largest)
            self._is_common_reported = False
            return []
        if self._is_common_reported:
            return []
        self._is_common_reported = True
        return [
            Alert(
                step,
                ALL_LAYERS,
                "weight_norm",
                "warning",
                common,
                largest,
                "the weights of more than half of the layers change by at least "
                f"{_in_words(common)} in a step, {common / largest:.3g} × the most so far: "
                "look at the learning rate.",
                kind="weight-jump",
                onset_step=step,
                remedies=REMEDIES["weight-jump"],
            )
        ]

    def _single_alerts(
        self,
        step: int,
        layers: list[str],
        sizes: np.ndarray,
        habits: np.ndarray,
        unusual: np.ndarray,
        scores: np.ndarray,
    ) -> list[Alert]:
        out = [layer for layer, score in zip(layers, scores.tolist(), strict=True) if score >= 1]
        begins, self._is_reported = bool(out) and not self._is_reported, bool(out)
        if not begins:
            return []
        layer, spread = origin(self._tracks, out, ties="worst")
        track, index = self._tracks[layer], layers.index(layer)
        before, norm = track.recent[-2][1], track.recent[-1][1]
        change = math.copysign(sizes[index], norm - before)
        restless = np.count_nonzero(np.delete(unusual, index) >= self._ratio)
        others = len(unusual) - 1
        if restless:
            which = f"; {restless} of {others} other layers leave theirs at the same step"
        else:
            which = " and the other layers keep to theirs" if others else ""
        return [
            Alert(
                step,
                layer,
                "weight_norm",
                "warning",
                norm,
                before,
                f"weight norm went from {before:.3g} to {norm:.3g}: {_in_words(change)} in a step, where "
                f"{_in_words(habits[index], digits=1)} is its habit{which}.",
                kind="weight-jump",
                onset_step=track.onset,
                evidence=track.recent,
                spread=spread,
                remedies=REMEDIES["weight-jump"],
            )
        ]


def _in_words(change: float, digits: int = 2) -> str:
    """A change of a logarithm in percent; from twice and half on, as a factor."""
    if abs(change) < math.log(2):
        return f"{100 * math.expm1(change):.{digits}g} %"
    return f"× {math.exp(min(change, 700.0)):.{digits}g}"


def _median_low(values: np.ndarray) -> float:
    """Of an even number of values the lower one of the middle two."""
    return float(np.sort(values)[(len(values) - 1) // 2])

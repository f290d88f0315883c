"""Weights that change in one step as they never did: scaled, corrupted, or thrown by their own update."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from stability.divergence.detector import ALL_LAYERS, Alert, Readings
from stability.divergence.remedies import REMEDIES
from stability.divergence.track import Track, from_states, origin, states

_SHORTEST_HABIT = 5


class WeightJumpDetector:
    """Alerts when a layer's weight norm changes in a step far beyond its own and the other layers' habit.

    Of each layer, d is the size of log w(t) − log w(t−1). Its excess e is log d over the median of its
    last ``window`` changes, or over that and the median excess of all layers: what all layers do at once is
    the learning rate's doing, not theirs. A layer has jumped when its surprise d eᵉ, the change times how
    unusual it is, reaches ``surprise``, d reaches ``min_change`` and eᵉ ``ratio``. What all layers do is an
    alert of its own, for the whole model: the median of log d over the layers reaches log ``common_ratio``
    over the largest it has been, so that warm-up and restarts, which come back to rates seen before, are
    silent; value and reference of that alert are these changes.

    Args:
        surprise: Change times change over habit. Calibrated: clean runs stay under 0.14, query and key
            weights that grow by 8 % a step reach 0.6 at once (docs/detectors.md).
        min_change: Least change worth a word; at the end of a training habits are smaller by orders of
            magnitude.
        ratio: Least change over habit. Calibrated with ``surprise``.
        common_ratio: The same for the median change of all layers over its largest so far.
        window: Changes that the habit covers.
        min_history: Changes that make a habit. Of n fewer ones (five at least) (min_history / n)³ times the
            surprise is asked: in a warm-up every step is larger than the one before.
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
        surprise: float = 0.25,
        min_change: float = 0.005,
        ratio: float = 3.0,
        common_ratio: float = 4.0,
        window: int = 64,
        min_history: int = 40,
        min_layers: int = 3,
    ) -> None:
        if min(surprise, min_change) <= 0:
            raise ValueError(f"surprise and min_change must be positive; got {surprise} and {min_change}.")
        if not (ratio > 1 and common_ratio > 1):
            raise ValueError(f"ratio and common_ratio must be above 1; got {ratio} and {common_ratio}.")
        if not 1 <= min_history <= window:
            raise ValueError(f"min_history must lie in [1, window={window}]; got {min_history}.")
        if min_layers < 2:
            raise ValueError(f"min_layers must be at least 2; got {min_layers}.")
        self._surprise = surprise
        self._min_change = math.log(min_change)
        self._ratio = math.log(ratio)
        self._common_ratio = math.log(common_ratio)
        self._window = window
        self._min_history = min_history
        self._min_layers = min_layers
        self._tracks: dict[str, Track] = {}
        self._largest_common = -math.inf
        self._num_common = 0  # steps that it is the largest of
        self._is_reported = False
        self._is_common_reported = False

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        norms = {layer: w for layer, w in readings.get("weight_norm", {}).items() if 0 < w < math.inf}
        changes = self._changes(step, norms)
        excesses = {
            layer: change - self._tracks[layer].range.median()
            for layer, change in changes.items()
            if len(self._tracks[layer].range) >= _SHORTEST_HABIT
        }
        habit_of_all = median(excesses.values()) if len(excesses) >= self._min_layers else 0.0
        for layer, norm in norms.items():
            track, change = self._tracks[layer], changes.get(layer)
            score = 0.0
            if layer in excesses:
                excess = excesses[layer]
                unusual = min(excess, excess - habit_of_all)
                if unusual >= self._ratio and changes[layer] >= self._min_change:
                    shortage = max(1.0, self._min_history / len(track.range))
                    score = math.exp(changes[layer] + unusual) / (self._surprise * shortage**3)
                change = changes[layer] - max(0.0, excess - self._ratio)
            if change is not None:
                track.range.append(change)
            track.add(step, norm, score)
        if not excesses:
            return []
        return self._common_alerts(step, changes) or self._single_alerts(step, changes, list(excesses))

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {
            "tracks": states(self._tracks),
            "largest_common": self._largest_common if self._num_common else None,  # JSON has no infinity
            "num_common": self._num_common,
            "is_reported": self._is_reported,
            "is_common_reported": self._is_common_reported,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        self._tracks = from_states(self._window, state["tracks"])
        self._largest_common = -math.inf if state["largest_common"] is None else state["largest_common"]
        self._num_common = state["num_common"]
        self._is_reported = state["is_reported"]
        self._is_common_reported = state["is_common_reported"]

    def _changes(self, step: int, norms: dict[str, float]) -> dict[str, float]:
        """Logarithm of each layer's relative change a step; none where nothing was updated."""
        changes: dict[str, float] = {}
        for layer, norm in norms.items():
            track = self._tracks.get(layer)
            if track is None:
                track = self._tracks[layer] = Track(self._window)
                continue
            before, value = track.recent[-1]
            change = abs(math.log(norm / value))
            if step > before and change > 0:
                changes[layer] = math.log(change / (step - before))
        return changes

    def _common_alerts(self, step: int, changes: dict[str, float]) -> list[Alert]:
        if len(changes) < self._min_layers:
            return []
        common, largest = median(changes.values()), self._largest_common
        self._num_common += 1
        if self._num_common <= self._min_history or common < largest + self._common_ratio:
            self._largest_common = max(common, largest)
            self._is_common_reported = False
            return []
        if self._is_common_reported:
            return []
        self._is_common_reported = True
        change, reference = math.exp(common), math.exp(largest)
        ratio = change / reference
        return [
            Alert(
                step,
                ALL_LAYERS,
                "weight_norm",
                "warning",
                change,
                reference,
                f"the weights of all layers change by {100 * change:.2g} % in a step (median), {ratio:.3g} × "
                "the most so far: look at the learning rate.",
                kind="weight-jump",
                onset_step=step,
                remedies=REMEDIES["weight-jump"],
            )
        ]

    def _single_alerts(self, step: int, changes: dict[str, float], layers: list[str]) -> list[Alert]:
        has_jumped = any(self._tracks[layer].score >= 1 for layer in layers)
        begins, self._is_reported = has_jumped and not self._is_reported, has_jumped
        if not begins:
            return []
        out = [layer for layer in layers if self._tracks[layer].score >= 1]
        layer, spread = origin(self._tracks, out, ties="worst")
        track = self._tracks[layer]
        change, habit = math.exp(changes[layer]), math.exp(track.range.median())
        before, norm = track.recent[-2][1], track.recent[-1][1]
        return [
            Alert(
                step,
                layer,
                "weight_norm",
                "warning",
                norm,
                before,
                f"weight norm went from {before:.3g} to {norm:.3g}: {100 * change:.2g} % in a step, where "
                f"{100 * habit:.1g} % is its habit and the other layers keep to theirs.",
                kind="weight-jump",
                onset_step=track.onset,
                evidence=tuple(track.recent),
                spread=spread,
                remedies=REMEDIES["weight-jump"],
            )
        ]

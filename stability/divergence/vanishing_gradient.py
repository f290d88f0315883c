"""Layers whose gradient is gone while others still learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from stability.divergence.detector import ALL_LAYERS, Alert, Readings
from stability.divergence.remedies import REMEDIES
from stability.divergence.track import ONSET_SCORE, Track, Tracks, logs, origin

_ALIVE = math.log(10)
_LOG_CHANCE = math.log(1e-6)


class VanishingGradientDetector:
    """Alerts when a layer's gradient falls by orders of magnitude, or to zero, while others keep theirs.

    A layer is dead ("dead-layer") when its gradient is exactly zero for ``num_steps`` steps in a row, and
    vanishing ("vanishing-gradient") when it is below the median of its last ``window`` values by ``ratio``
    and by ``num_spreads`` of their spread for as long; both only while at least one other layer's is within a
    factor 10 of its own median, because a training that has learned everything has small gradients
    everywhere. A layer whose gradient comes and goes (an expert that few tokens are routed to) has to be
    without one for longer: until a run of that many steps would come by chance once in a million times, were
    steps independent, at the share of steps that brought it none so far. One that never had a gradient is
    dead after ``window`` steps. An episode ends when no layer is dead or vanishing; in it every layer is told
    once, those of one step by one alert. Named is the one that went first, of several the last in the forward
    pass: what dies there, dies before it too.

    Args:
        ratio: Median over norm that counts as vanished.
        num_spreads: Robust standard deviations under the median.
        num_steps: Least number of steps in a row before the verdict.
        window: Values that the median covers.
        min_history: Values before the first verdict on a vanishing gradient.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Dying ReLU: Lu et al. 1903.06733. The thresholds are calibrated (docs/detectors.md).

    Example:
        >>> detector = VanishingGradientDetector()
        >>> for step in range(40):
        ...     assert not detector.update(step, {"grad_norm": {"a": 1.0, "b": 1.0}})
        >>> for step in range(40, 44):
        ...     assert not detector.update(step, {"grad_norm": {"a": 0.0, "b": 1.0}})
        >>> [alert] = detector.update(44, {"grad_norm": {"a": 0.0, "b": 1.0}})
        >>> alert.layer, alert.kind, alert.onset_step
        ('a', 'dead-layer', 40)
    """

    def __init__(
        self,
        *,
        ratio: float = 1e3,
        num_spreads: float = 6.0,
        num_steps: int = 5,
        window: int = 100,
        min_history: int = 20,
    ) -> None:
        if not ratio > 10:
            raise ValueError(f"ratio must be above 10, within which a layer counts as alive; got {ratio}.")
        if num_spreads < 0 or num_steps < 1:
            raise ValueError(
                f"num_spreads must be at least 0 and num_steps at least 1; got {num_spreads} and {num_steps}."
            )
        if not 1 <= min_history <= window:
            raise ValueError(f"min_history must lie in [1, window={window}]; got {min_history}.")
        self._ratio = math.log(ratio)
        self._num_spreads = num_spreads
        self._num_steps = num_steps
        self._window = window
        self._min_history = min_history
        self._tracks = Tracks(window)
        self._num_gone: dict[str, int] = {}  # steps in a row, by layer
        self._num_present: dict[str, int] = {}  # other steps
        self._num_steps_seen = 0
        self._told: set[str] = set()  # layers, in this episode

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        norms = {
            layer: norm
            for layer, norm in readings.get("grad_norm", {}).items()
            if layer != ALL_LAYERS and 0 <= norm < math.inf
        }
        if not norms:
            return []
        layers = list(norms)
        rows, values = self._tracks.rows(layers), np.array(list(norms.values()))
        is_zero = values == 0
        log_norms = logs([norm or 1.0 for norm in norms.values()])
        judged = np.flatnonzero(~is_zero & (self._tracks.lengths(rows) >= self._min_history))
        medians = self._tracks.medians(rows[judged])
        depths = medians - log_norms[judged]
        thresholds = np.full(len(judged), self._ratio)
        far = depths >= ONSET_SCORE * thresholds  # as in GradientExplosionDetector
        if far.any():
            spreads = self._tracks.spreads(rows[judged][far])
            thresholds[far] = np.maximum(thresholds[far], self._num_spreads * spreads)
        scores = np.where(is_zero, math.inf, 0.0)
        scores[judged] = depths / thresholds
        log_norms[judged] = np.maximum(log_norms[judged], medians - thresholds)
        is_any_alive = bool((medians - log_norms[judged] < _ALIVE).any())
        self._tracks.append(rows[~is_zero], log_norms[~is_zero])
        self._tracks.add(step, rows, values, scores)
        self._num_steps_seen += 1
        for layer, is_gone in zip(layers, (scores >= 1).tolist(), strict=True):
            num_gone = self._num_gone.get(layer, 0)
            self._num_gone[layer] = num_gone + 1 if is_gone else 0
            if not is_gone:
                self._num_present[layer] = self._num_present.get(layer, 0) + 1
        gone = [
            layer
            for layer in layers
            if self._num_gone[layer] >= self._num_steps and self._num_gone[layer] >= self._patience(layer)
        ]
        # A layer that a step leaves out, or whose gradient is NaN there, is what it was.
        if not gone and all(layer in norms or not self._num_gone[layer] for layer in self._told):
            self._told.clear()
        joined = [layer for layer in gone if is_any_alive and layer not in self._told]
        self._told.update(joined)
        if not joined:
            return []
        of_layer = {layers[index]: median for index, median in zip(judged, medians.tolist(), strict=True)}
        return [self._alert(step, joined, of_layer, len(gone), len(layers))]

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {
            "tracks": self._tracks.state_dict(),
            "num_gone": dict(self._num_gone),
            "num_present": dict(self._num_present),
            "num_steps_seen": self._num_steps_seen,
            "told": sorted(self._told),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        self._tracks = Tracks(self._window, state["tracks"])
        self._num_gone = dict(state["num_gone"])
        self._num_present = dict(state["num_present"])
        self._num_steps_seen = state["num_steps_seen"]
        self._told = set(state["told"])

    def _patience(self, layer: str) -> float:
        """Steps in a row without a gradient that are no habit of this layer."""
        num_present = self._num_present.get(layer, 0)
        if not num_present:
            return self._window
        # Before this row, those of no gradient at all (None) among them; one more, as in Laplace's rule: no
        # layer is sure never to miss one.
        num_absent = self._num_steps_seen - self._num_gone[layer] - num_present + 1
        return _LOG_CHANCE / math.log(num_absent / (num_absent + num_present))

    def _alert(
        self, step: int, joined: list[str], medians: Mapping[str, float], num_gone: int, num_layers: int
    ) -> Alert:
        layer, spread = origin(self._tracks, joined, ties="last")
        track = self._tracks[layer]
        norm = track.recent[-1][1]
        row = self._tracks.rows([layer])
        # What it was judged by: this step's value has entered the history since, unless it is zero.
        median = medians.get(layer, self._tracks.medians(row)[0] if self._tracks.lengths(row)[0] else None)
        reference = None if median is None else math.exp(median)
        if norm == 0 and (reference is None or _begins_with_zero(track)):
            what = f"its gradient has been zero since step {track.onset}"
        elif norm == 0:
            what = f"its gradient is zero, and has been out of its range since step {track.onset}"
        else:
            what = f"its gradient norm {norm:.3g} is {norm / (reference or norm):.1g} × its median"
        kind = "dead-layer" if norm == 0 else "vanishing-gradient"
        return Alert(
            step,
            layer,
            "grad_norm",
            "warning",
            norm,
            reference,
            f"{what}, while other layers still learn; {num_gone} of {num_layers} layers.",
            kind=kind,
            onset_step=track.onset,
            evidence=track.recent,
            spread=spread,
            remedies=REMEDIES[kind],
        )


def _begins_with_zero(track: Track) -> bool:
    """Whether a gradient of zero is known to have been zero since its onset: it may have fallen first."""
    since_onset = [(step, norm) for step, norm in track.recent if step >= (track.onset or 0)]
    return since_onset[:1] == [(track.onset, 0.0)] and not any(norm for _, norm in since_onset)

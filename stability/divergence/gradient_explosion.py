"""Gradient norms against their own recent history, on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from stability.divergence.detector import ALL_LAYERS, Alert, Readings, Severity
from stability.divergence.remedies import REMEDIES
from stability.divergence.track import ONSET_SCORE, Tracks, logs, origin

_WHAT = {"grad_norm": "gradient norm", "activation_grad_norm": "the norm of the gradient at its output,"}
_SEVERITIES: tuple[Severity, ...] = ("warning", "divergence")
_GROWTH_STEPS = 8  # over how many steps the rate of growth is read


class GradientExplosionDetector:
    """Alerts when a layer's gradient norm leaves its recent median by orders of magnitude.

    A norm g is out of range when log g exceeds the median of the layer's last ``window`` values by log
    ``warning_ratio`` and by ``num_spreads`` of their spread; from ``divergence_ratio`` on the alert says
    divergence. Values enter the history cut off at the threshold, so a spike does not move it and a new level
    becomes the ordinary one after half a window. The layer is named that left its range first (half of the
    way, on the logarithmic scale), of several the one nearest to the loss, since gradients grow on their way
    back from there. Before there is a history, the norm of the whole model is compared with its first one in
    the same ratios; single layers are not, since those behind an output that starts at zero begin with no
    gradient at all. A warning says when the rate of growth will make it an explosion, unless the layer left
    its range in this very step. One alert per severity and episode; an episode ends when every layer is back
    in its range.

    Args:
        quantity: "grad_norm", or "activation_grad_norm", which also grows where the script clips gradients.
        warning_ratio: Norm over median that is worth a warning. Spikes of 10 × are ordinary in training
            without clipping (docs/results/); clean runs reach 93 ×, and 7 × the first norm of the whole model
            (docs/detectors.md).
        divergence_ratio: Norm over median that counts as an explosion: the four orders of magnitude of
            arXiv 2604.27124.
        num_spreads: Robust standard deviations from the median, as for loss and gradient spikes in OLMo-core;
            it matters for noisy or steadily growing norms, whose spread is wide.
        window: Values that the median covers.
        min_history: Values before a layer is judged; the first steps' transient has no reference.

    Raises:
        ValueError: If the quantity is another, the ratios are not 1 < warning ≤ divergence, ``num_spreads``
            is negative, or the history is longer than the window.

    Source:
        Robust statistics of the log norm: ZClip 2504.02507, AdaGC 2502.11034.

    Example:
        >>> detector = GradientExplosionDetector(min_history=3)
        >>> calm = [detector.update(step, {"grad_norm": {"fc": 1.0}}) for step in range(3)]
        >>> [alert] = detector.update(3, {"grad_norm": {"fc": 5000.0}})
        >>> alert.layer, alert.severity, alert.reference
        ('fc', 'warning', 1.0)
    """

    def __init__(
        self,
        quantity: Literal["grad_norm", "activation_grad_norm"] = "grad_norm",
        *,
        warning_ratio: float = 3e2,
        divergence_ratio: float = 1e4,
        num_spreads: float = 6.0,
        window: int = 100,
        min_history: int = 20,
    ) -> None:
        if quantity not in _WHAT:
            raise ValueError(f"quantity must be one of {', '.join(_WHAT)}; got {quantity!r}.")
        if not 1 < warning_ratio <= divergence_ratio:
            raise ValueError(
                "the ratios must obey 1 < warning_ratio <= divergence_ratio; "
                f"got {warning_ratio} and {divergence_ratio}."
            )
        if num_spreads < 0:
            raise ValueError(f"num_spreads must be at least 0; got {num_spreads}.")
        if not 1 <= min_history <= window:
            raise ValueError(f"min_history must lie in [1, window={window}]; got {min_history}.")
        self._quantity = quantity
        self._warning = math.log(warning_ratio)
        self._divergence = math.log(divergence_ratio)
        self._num_spreads = num_spreads
        self._window = window
        self._min_history = min_history
        self._tracks = Tracks(window)
        self._reported = 0  # severities already reported in this episode
        self._first = 0.0  # norm of the whole model

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        norms = {
            layer: norm
            for layer, norm in readings.get(self._quantity, {}).items()
            # NonFiniteDetector speaks of others; a gradient of zero has no logarithm.
            if layer != ALL_LAYERS and 0 < norm < math.inf
        }
        if not norms:
            return self._first_alerts(step, readings)
        layers = list(norms)
        rows, values = self._tracks.rows(layers), np.array(list(norms.values()))
        log_norms = logs(norms.values())
        judged = np.flatnonzero(self._tracks.lengths(rows) >= self._min_history)
        medians = self._tracks.medians(rows[judged])
        excesses = log_norms[judged] - medians
        thresholds = np.full(len(judged), self._warning)
        far = excesses >= ONSET_SCORE * thresholds  # nearly never; below, a wider spread changes nothing
        if far.any():
            spreads = self._tracks.spreads(rows[judged][far])
            thresholds[far] = np.maximum(thresholds[far], self._num_spreads * spreads)
        scores = np.zeros(len(layers))
        scores[judged] = excesses / thresholds
        log_norms[judged] = np.minimum(log_norms[judged], medians + thresholds)
        self._tracks.append(rows, log_norms)
        self._tracks.add(step, rows, values, scores)
        if not judged.size:
            return self._first_alerts(step, readings)
        out = excesses[excesses >= thresholds]
        level = 0 if not out.size else 2 if out.max() >= self._divergence else 1
        if level <= self._reported:
            if self._tracks.are_ordinary(rows[judged]):
                self._reported = 0
            return []
        self._reported = level
        of_layer = {layers[index]: median for index, median in zip(judged, medians.tolist(), strict=True)}
        loudest = layers[judged[np.where(excesses >= thresholds, excesses, -math.inf).argmax()]]
        return [self._alert(step, of_layer, _SEVERITIES[level - 1], loudest)]

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {"tracks": self._tracks.state_dict(), "reported": self._reported, "first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        self._tracks = Tracks(self._window, state["tracks"])
        self._reported = state["reported"]
        self._first = state["first"]

    def _first_alerts(self, step: int, readings: Readings) -> list[Alert]:
        norm = readings.get(self._quantity, {}).get(ALL_LAYERS, math.nan)
        if not 0 < norm < math.inf:
            return []
        self._first = self._first or norm
        ratio = norm / self._first
        height = math.log(ratio) if ratio > 0 else -math.inf  # float64 gradients may fall out of its range
        level = (height >= self._warning) + (height >= self._divergence)
        if level <= self._reported:
            return []
        self._reported = level
        return [
            Alert(
                step,
                ALL_LAYERS,
                self._quantity,
                _SEVERITIES[level - 1],
                norm,
                self._first,
                f"{_WHAT[self._quantity]} of the whole model {norm:.3g} is {ratio:.3g} × the first one, "
                f"{self._first:.3g}.",
                kind="gradient-explosion",
                onset_step=step,
                evidence=((step, norm),),
                remedies=REMEDIES["gradient-explosion"],
            )
        ]

    def _alert(self, step: int, medians: Mapping[str, float], severity: Severity, loudest: str) -> Alert:
        layer, spread = origin(self._tracks, list(medians), ties="last")
        track = self._tracks[layer]
        norm, reference = track.recent[-1][1], math.exp(medians[layer])
        reason = (
            f"{_WHAT[self._quantity]} {norm:.3g} is {norm / reference:.3g} × its median of {reference:.3g}"
        )
        alarm = self._warning if severity == "warning" else self._divergence
        if math.log(norm / reference) < alarm:  # it began here, but what passed the ratio is elsewhere
            ratio = self._tracks[loudest].recent[-1][1] / math.exp(medians[loudest])
            reason += f", while that of {loudest} is {ratio:.3g} × its own"
        points = track.recent[-_GROWTH_STEPS:]
        growth = (math.log(points[-1][1]) - math.log(points[0][1])) / max(1, points[-1][0] - points[0][0])
        missing = self._divergence - math.log(norm / reference)
        is_single = track.onset == step  # a spike more often than growth, and no rate can be read from it
        if severity == "warning" and growth > 0 < missing and not is_single:
            reason += (
                f"; it grows by {math.expm1(growth):.0%} a step and reaches "
                f"{math.exp(self._divergence):.0e} × in about {math.ceil(missing / growth)} steps"
            )
        return Alert(
            step,
            layer,
            self._quantity,
            severity,
            norm,
            reference,
            reason + ".",
            kind="gradient-explosion",
            onset_step=track.onset,
            evidence=track.recent,
            spread=spread,
            remedies=REMEDIES["gradient-explosion"],
        )

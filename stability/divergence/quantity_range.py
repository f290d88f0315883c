"""One quantity against an absolute limit and its own history: what most detectors of sparse quantities do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from stability.divergence.detector import ALL_LAYERS, Alert, Readings
from stability.divergence.remedies import remedies_for
from stability.divergence.track import Tracks, logs, origin

_TINY = 1e-12  # a share or an entropy of zero has no logarithm


class QuantityRangeDetector:
    """Alerts when a quantity passes a limit *and* is far from what it has been in that layer.

    Both are needed: the limit comes from the literature and knows nothing of this model, the history knows
    nothing of what is healthy (attention sharpens by orders of magnitude while a model learns). On a
    logarithmic scale a value is out of its range when it is beyond the median of the last ``window`` values
    by log ``ratio``; values enter the history cut off there. Named is the layer, of those that are out, that
    left its range first (came half of the way to both), of several the first in the forward pass. One alert
    an episode, which ends when every layer is back.

    Args:
        quantity: Which. Of a probe one of its own; :func:`probes.attach` refuses others, which no layer has.
        kind: Of its alerts.
        meaning: What it means, for the reason.
        bad: Whether large or small values are.
        limit: Value beyond which the quantity is worth a word.
        ratio: Value over median (or median over value, where small values are bad), above 1.
        window: Values that the median covers.
        min_history: Values before the first verdict.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> detector = QuantityRangeDetector("temperature", "fever", "it is hot", limit=39.0, ratio=1.02)
        >>> values = [37.0, 37.1, 36.9, 37.0, 39.5]
        >>> alerts = [detector.update(i, {"temperature": {"a": value}}) for i, value in enumerate(values)]
        >>> alerts[-1][0].reason
        'it is hot: temperature 39.5, where 37 is its median (limit 39).'
    """

    def __init__(
        self,
        quantity: str,
        kind: str,
        meaning: str,
        *,
        bad: Literal["large", "small"] = "large",
        limit: float,
        ratio: float,
        window: int = 50,
        min_history: int = 3,
    ) -> None:
        if limit <= 0:
            raise ValueError(f"limit must be positive; got {limit}.")
        if ratio <= 1:
            raise ValueError(f"ratio must be above 1; got {ratio}.")
        if not 1 <= min_history <= window:
            raise ValueError(f"min_history must lie in [1, window={window}]; got {min_history}.")
        self._quantity = quantity
        self._kind = kind
        self._meaning = meaning
        self._limit = limit
        self._ratio = math.log(ratio)
        self._window = window
        self._min_history = min_history
        self._sign = 1 if bad == "large" else -1
        self._tracks = Tracks(window)
        self._is_reported = False

    @property
    def quantity(self) -> str:
        """What it reads, of layers; numbers of the whole model are left out."""
        return self._quantity

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        of_layer = {
            layer: value
            for layer, value in readings.get(self._quantity, {}).items()
            if layer != ALL_LAYERS and 0 <= value < math.inf
        }
        if not of_layer:
            return []
        layers = list(of_layer)
        rows, values = self._tracks.rows(layers), np.array(list(of_layer.values()))
        heights = self._sign * logs(np.maximum(values, _TINY).tolist())
        judged = np.flatnonzero(self._tracks.lengths(rows) >= self._min_history)
        medians = self._tracks.medians(rows[judged])  # before this value
        # 1 at the limit, from either side.
        nearness = (np.maximum(values[judged], _TINY) / self._limit) ** float(self._sign)
        scores = np.zeros(len(layers))
        scores[judged] = np.minimum((heights[judged] - medians) / self._ratio, nearness)
        heights[judged] = np.minimum(heights[judged], medians + self._ratio)
        self._tracks.append(rows, heights)
        self._tracks.add(step, rows, values, scores)
        if not judged.size:
            return []
        # Many layers move half of the way while they learn: only those that are out are candidates.
        out = {
            layers[i]: median for i, median in zip(judged, medians.tolist(), strict=True) if scores[i] >= 1
        }
        begins = not self._is_reported and bool(out)
        self._is_reported |= begins
        self._is_reported &= not self._tracks.are_ordinary(rows[judged])
        if not begins:
            return []
        # A largest logit below zero is not judged, since it has no logarithm, and is not beyond its limit.
        num_negative = sum(
            layer != ALL_LAYERS and value < 0 for layer, value in readings[self._quantity].items()
        )
        return [self._alert(step, readings, out, len(judged) + num_negative)]

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {"tracks": self._tracks.state_dict(), "is_reported": self._is_reported}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        self._tracks = Tracks(self._window, state["tracks"])
        self._is_reported = state["is_reported"]

    def _alert(self, step: int, readings: Readings, medians: Mapping[str, float], num_layers: int) -> Alert:
        layer, spread = origin(self._tracks, medians, ties="first")
        track = self._tracks[layer]
        value, reference = track.recent[-1][1], math.exp(self._sign * medians[layer])
        others = ""
        if len(medians) > 1:
            others = f"; {len(medians) - 1} of {num_layers - 1} other layers are beyond theirs as well"
        return Alert(
            step,
            layer,
            self._quantity,
            "warning",
            value,
            reference,
            f"{self._meaning}: {self._quantity} {value:.3g}, where {reference:.3g} is its median "
            f"(limit {self._limit:g}){others}.",
            kind=self._kind,
            onset_step=track.onset,
            evidence=track.recent,
            spread=spread,
            remedies=remedies_for(self._kind, layer, readings),
        )

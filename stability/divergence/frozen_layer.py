"""Layers that Adam no longer moves, while it moves others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stability.divergence.detector import ALL_LAYERS, Alert, Readings
from stability.divergence.remedies import REMEDIES
from stability.divergence.track import Tracks, origin

# Times the limit. Where everything has been learned, sizes spread over three orders and single batches more.
_ALIVE = 100.0
_WINDOW = 1  # no range is needed: a full Adam step is 1 in every layer


class FrozenLayerDetector:
    """Alerts when Adam's steps in a layer are a vanishing part of full size, while others are not.

    Adam divides a gradient by the root of what it remembers of the layer's squared gradients. Where gradients
    have fallen by orders of magnitude since the first steps, or lie below ε, next to nothing is left, and
    weight decay alone moves the weights, however calm the training looks. A layer is frozen ("frozen-layer")
    when `adam_update_rms` is below ``limit`` for ``num_records`` of its records in a row, while that of one
    and the same other layer is a hundred times the limit for as long: a training that has learned everything
    has small gradients everywhere. A gradient that is exactly zero (an expert that no token was routed to)
    says nothing here; a layer that has none at all is `VanishingGradientDetector`'s. An episode ends when
    no layer is frozen; in it every layer is told once, those that turn out to be frozen at one record by one
    alert. Named is the one that froze first, of several the first in the forward pass.

    Args:
        limit: √mean(g²/v̂), 1 where gradients are what they have been.
        num_records: Records, every two hundredth step by default.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Own; the limit is calibrated (docs/detectors.md).

    Example:
        >>> detector = FrozenLayerDetector()
        >>> for step, size in [(0, 1.0), (200, 3e-5), (400, 3e-5), (600, 3e-5)]:
        ...     alerts = detector.update(step, {"adam_update_rms": {"mlp": size, "head": 0.5}})
        >>> alerts[0].layer, alerts[0].kind, alerts[0].onset_step
        ('mlp', 'frozen-layer', 200)
    """

    def __init__(self, *, limit: float = 1e-3, num_records: int = 3) -> None:
        if not 0 < limit < 1 / _ALIVE:
            raise ValueError(
                f"limit must lie between 0 and {1 / _ALIVE:g}, since others must be {_ALIVE:g} times above "
                f"it and full size is 1; got {limit}."
            )
        if num_records < 1:
            raise ValueError(f"num_records must be at least 1; got {num_records}.")
        self._limit = limit
        self._num_records = num_records
        self._tracks = Tracks(_WINDOW)
        self._num_frozen: dict[str, int] = {}  # records in a row, by layer
        self._num_alive: dict[str, int] = {}
        self._told: set[str] = set()  # layers, in this episode

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        sizes = {
            layer: size
            for layer, size in readings.get("adam_update_rms", {}).items()
            if layer != ALL_LAYERS and 0 < size < math.inf
        }
        if not sizes:
            return []
        layers, values = list(sizes), np.array(list(sizes.values()))
        self._tracks.add(step, self._tracks.rows(layers), values, self._limit / values)
        for layer, size in sizes.items():
            self._num_frozen[layer] = self._num_frozen.get(layer, 0) + 1 if size < self._limit else 0
            is_alive = size > _ALIVE * self._limit
            self._num_alive[layer] = self._num_alive.get(layer, 0) + 1 if is_alive else 0
        frozen = {layer for layer, number in self._num_frozen.items() if number >= self._num_records}
        # Of this record's layers: one that is trained no longer was alive when it was seen last.
        is_any_alive = max(self._num_alive[layer] for layer in sizes) >= self._num_records
        if not frozen:
            self._told.clear()
        # In the order of this record: a layer whose first gradients were zero came to be known after others.
        news = frozen - self._told if is_any_alive else set()
        joined = [layer for layer in sizes if layer in news]
        self._told.update(joined)
        return [self._alert(step, joined, len(frozen))] if joined else []

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {
            "tracks": self._tracks.state_dict(),
            "num_frozen": dict(self._num_frozen),
            "num_alive": dict(self._num_alive),
            "told": sorted(self._told),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        self._tracks = Tracks(_WINDOW, state["tracks"])
        self._num_frozen = dict(state["num_frozen"])
        self._num_alive = dict(state["num_alive"])
        self._told = set(state["told"])

    def _alert(self, step: int, joined: list[str], num_frozen: int) -> Alert:
        layer, spread = origin(self._tracks, joined, ties="first")
        track = self._tracks[layer]
        size = track.recent[-1][1]
        return Alert(
            step,
            layer,
            "adam_update_rms",
            "warning",
            size,
            self._limit,
            f"Adam hardly moves it: its steps are {size:.1g} of full size since step {track.onset}, while "
            f"other layers learn; {num_frozen} of {len(self._num_frozen)} layers.",
            kind="frozen-layer",
            onset_step=track.onset,
            evidence=track.recent,
            spread=spread,
            remedies=REMEDIES["frozen-layer"],
        )

"""NaN and infinity, and the layer where they began."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stability.divergence.detector import ALL_LAYERS, Alert, Readings

# In the order of cause: a broken weight breaks the output, that breaks every gradient behind it.
# Values run forward through the layers, gradients backward: which end of the list is the origin follows.
_FIRST_LAYER = ("weight_norm", "attention/max_logit", "activation_rms", "loss")
_LAST_LAYER = ("activation_grad_norm", "grad_norm")
_WHAT = {
    "weight_norm": "its weights hold",
    "attention/max_logit": "its attention logits hold",
    "activation_rms": "its output holds",
    "loss": "the loss is",
    "activation_grad_norm": "the gradient at its output holds",
    "grad_norm": "its gradient holds",
}


class NonFiniteDetector:
    """Divergence as soon as a weight, an output, the loss or a gradient is not finite.

    There is no threshold. Of all layers that are not finite in the same step the origin is named: the first
    in the forward pass for weights and outputs, the last one (where the backward pass enters) for gradients.
    One alert per episode; a finite step ends it. Gradients of a step that a GradScaler skipped do not count:
    it tries again with a smaller scale.

    Example:
        >>> detector = NonFiniteDetector()
        >>> nan = float("nan")
        >>> [alert] = detector.update(7, {"activation_rms": {"a": 1.0, "b": nan, "c": nan}})
        >>> alert.layer, alert.severity
        ('b', 'divergence')
    """

    def __init__(self) -> None:
        self._in_episode = False

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        alert = self._find(step, readings)
        begins = alert is not None and not self._in_episode
        self._in_episode = alert is not None
        return [alert] if alert is not None and begins else []

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {"in_episode": self._in_episode}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        self._in_episode = state["in_episode"]

    def _find(self, step: int, readings: Readings) -> Alert | None:
        is_skipped = readings.get("skipped_step", {}).get(ALL_LAYERS, 0.0) > 0
        for quantity in _FIRST_LAYER + (() if is_skipped else _LAST_LAYER):
            values: Mapping[str, float] = readings.get(quantity, {})
            broken = [(layer, value) for layer, value in values.items() if not math.isfinite(value)]
            if quantity == "attention/max_logit":  # −inf: no row had a key
                broken = [(layer, value) for layer, value in broken if value != -math.inf]
            # The whole model's value names no layer; it counts where nothing more precise is recorded.
            layer_known = [item for item in broken if item[0] != ALL_LAYERS] or broken
            if layer_known:
                layer, value = layer_known[0 if quantity in _FIRST_LAYER else -1]
                reason = (
                    f"{_WHAT[quantity]} {value} ({quantity}); {len(layer_known)} of {len(values)} layers."
                )
                return Alert(step, layer, quantity, "divergence", value, None, reason)
        return None

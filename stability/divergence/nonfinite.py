"""NaN and infinity, and the layer where they began."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stability.divergence.detector import ALL_LAYERS, Alert, Readings
from stability.divergence.remedies import REMEDIES
from stability.divergence.track import MAX_EVIDENCE, innermost

# In the order of cause: a broken weight breaks the output, that breaks every gradient behind it, and those
# the next update. Values run forward through the layers, gradients backward: which end of the list is the
# origin follows.
_LOGITS = "attention/max_logit"
_FIRST_LAYER = ("weight_norm", _LOGITS, "activation_rms", "activation_max_abs")
_LOSS = "loss"
_LAST_LAYER = ("activation_grad_norm", "grad_norm", "adam_update_rms", "update_ratio")
_OUTPUTS = ("activation_rms", "activation_max_abs")
_HOW_TO_KNOW = (
    "to know the layer, measure outputs at every step (activations_every=1) and run again from the last "
    "checkpoint before this step"
)
_WHAT = {
    "weight_norm": "its weights hold",
    _LOGITS: "its attention logits hold",
    "activation_rms": "its output holds",
    "activation_max_abs": "its output holds",
    _LOSS: "the loss is",
    "activation_grad_norm": "the gradient at its output holds",
    "grad_norm": "its gradient holds",
    "adam_update_rms": "its optimizer state holds",
    "update_ratio": "its update holds",
}


class NonFiniteDetector:
    """Divergence as soon as a weight, an output, the loss, a gradient or an update is not finite.

    There is no threshold. Of all layers that are not finite in the same step the origin is named: the first
    in the forward pass for weights and outputs, the last one (where the backward pass enters) for gradients.
    A step in which every gradient is broken was broken before its backward pass began, by the batch or
    between two layers; unless an output says where, the first layer is named. Where outputs were not measured
    at that step the alert says that the layer is a guess, and how to know it. One alert per episode; a finite
    step ends it.

    Gradients of a step that a GradScaler skipped do not count, since it tries again with a smaller scale,
    until it has skipped ``max_skipped`` steps in a row.

    Args:
        max_skipped: Skipped steps in a row that are ordinary. A GradScaler starts at 2¹⁶ and halves its scale
            with every step it skips: after 16 the scale is 1 and no longer the reason.

    Raises:
        ValueError: If ``max_skipped`` is negative.

    Example:
        >>> detector = NonFiniteDetector()
        >>> nan = float("nan")
        >>> [alert] = detector.update(7, {"activation_rms": {"a": 1.0, "b": nan, "c": nan}})
        >>> alert.layer, alert.severity
        ('b', 'divergence')
    """

    def __init__(self, *, max_skipped: int = 16) -> None:
        if max_skipped < 0:
            raise ValueError(f"max_skipped must be at least 0; got {max_skipped}.")
        self._max_skipped = max_skipped
        self._num_skipped = 0
        self._in_episode = False
        self._recent: dict[str, deque[tuple[int, Mapping[str, float]]]] = {}

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        for quantity in _WHAT:
            if quantity in readings:
                recent = self._recent.setdefault(quantity, deque(maxlen=MAX_EVIDENCE // 2))
                recent.append((step, readings[quantity]))
        if "skipped_step" in readings:
            is_skipped = readings["skipped_step"].get(ALL_LAYERS, 0.0) > 0
            self._num_skipped = self._num_skipped + 1 if is_skipped else 0
        alert = self._find(step, readings)
        begins = alert is not None and not self._in_episode
        self._in_episode = alert is not None
        return [alert] if alert is not None and begins else []

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {
            "in_episode": self._in_episode,
            "num_skipped": self._num_skipped,
            "recent": {
                quantity: [[step, dict(values)] for step, values in recent]
                for quantity, recent in self._recent.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        self._in_episode = state["in_episode"]
        self._num_skipped = state["num_skipped"]
        self._recent = {
            quantity: deque(((step, values) for step, values in recent), maxlen=MAX_EVIDENCE // 2)
            for quantity, recent in state["recent"].items()
        }

    def _find(self, step: int, readings: Readings) -> Alert | None:
        is_excused = 0 < self._num_skipped <= self._max_skipped
        quantities = (*_FIRST_LAYER, _LOSS, *(() if is_excused else _LAST_LAYER))
        for quantity in quantities:
            values = readings.get(quantity, {})
            # Their sum is the cheapest look at many numbers; an overflow of finite ones is found out below.
            if math.isfinite(sum(values.values())):
                continue
            broken = [layer for layer, value in values.items() if not _is_fine(quantity, value)]
            # The whole model's value names no layer; it counts where nothing more precise is recorded.
            layers = [layer for layer in values if layer != ALL_LAYERS] or [ALL_LAYERS]
            broken = [layer for layer in broken if layer in layers] or broken
            if not broken:
                continue
            inner = innermost(broken)
            layer = inner[0 if quantity in _FIRST_LAYER or len(broken) == len(layers) else -1]
            how_many = f"{len(broken)} of {len(layers)} layers"
            # Logits that are broken in every layer came in broken: before attention less is measured.
            is_unclear = quantity == _LOSS or (quantity == _LOGITS and len(broken) == len(layers))
            if is_unclear and not is_excused:
                layer, how_many = self._where_all_gradients_broke(readings) or (layer, how_many)
            alert = self._alert(step, layer, quantity, broken, how_many + _logged(readings))
            return _as_guess(alert) if _is_guess(alert, readings) else alert
        return None

    def _where_all_gradients_broke(self, readings: Readings) -> tuple[str, str] | None:
        gradients = {k: v for k, v in readings.get("grad_norm", {}).items() if k != ALL_LAYERS}
        broken = [layer for layer, norm in gradients.items() if not math.isfinite(norm)]
        if broken and len(broken) == len(gradients):
            how_many = "and every layer's gradient with it: the batch, or a value between layers"
            return innermost(broken)[0], how_many
        return None

    def _alert(self, step: int, layer: str, quantity: str, broken: list[str], how_many: str) -> Alert:
        recent = self._recent[quantity]
        shown = layer if layer in recent[-1][1] else broken[0]  # the loss, of a layer that has none
        evidence = tuple((at, values[shown]) for at, values in recent if shown in values)
        value = evidence[-1][1]
        tried = ""
        if self._num_skipped > self._max_skipped:
            tried = f" {self._num_skipped} updates in a row were skipped: the loss scale is not the reason."
        return Alert(
            step,
            layer,
            quantity,
            "divergence",
            value,
            None,
            f"{_WHAT[quantity]} {value} ({quantity}); {how_many}.{tried}",
            kind="non-finite",
            onset_step=step,
            evidence=evidence,
            spread=tuple(name for name in broken if name != layer),
            remedies=REMEDIES["non-finite"],
        )


def _logged(readings: Readings) -> str:
    """Numbers that the script logged, other than the loss, that are not finite either."""
    return "".join(
        f"; {name}, which the script logged, is {values[ALL_LAYERS]}"
        for name, values in readings.items()
        if name not in _WHAT and values.keys() == {ALL_LAYERS} and not math.isfinite(values[ALL_LAYERS])
    )


def _is_guess(alert: Alert, readings: Readings) -> bool:
    """Whether the layer is the first of many whose gradients all broke, with no output to tell them apart."""
    gradients = [norm for layer, norm in readings.get("grad_norm", {}).items() if layer != ALL_LAYERS]
    return (
        (alert.quantity == "grad_norm" or alert.layer not in readings[alert.quantity])
        and len(gradients) > 1
        and not any(math.isfinite(norm) for norm in gradients)
        and not any(layer != ALL_LAYERS for quantity in _OUTPUTS for layer in readings.get(quantity, {}))
    )


def _as_guess(alert: Alert) -> Alert:
    reason = f"{alert.reason} Outputs were not measured at this step, so the layer is a guess."
    return replace(alert, reason=reason, remedies=(_HOW_TO_KNOW, *alert.remedies))


def _is_fine(quantity: str, value: float) -> bool:
    # A largest logit of −inf: no row had a key.
    return math.isfinite(value) or (quantity == _LOGITS and value == -math.inf)

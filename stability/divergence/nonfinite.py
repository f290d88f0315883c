"""NaN and infinity, and the layer where they began."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
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
_NOT_KNOWN = "outputs were not measured at this step, so the layer is not known"
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
    A step in which every gradient is broken was broken before its backward pass began: by the batch, between
    two layers, or in the loss. Unless an output says where, no layer is named; where outputs were not
    measured at that step the alert says so, and how to know the layer. Numbers that the script logs (losses
    of any name) are no alarm by themselves; one that ceases to be finite in the step in which gradients do is
    what they broke with, and is named. One alert per episode; a finite step ends it.

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
        for quantity, values in readings.items():
            if quantity in _WHAT or _is_logged(quantity, values):
                recent = self._recent.setdefault(quantity, deque(maxlen=MAX_EVIDENCE // 2))
                recent.append((step, dict(values)))  # the caller may use its own for the next step
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
            if quantity == _LOGITS and broken and _breaks_before(innermost(broken)[0], readings):
                continue  # an output's own turn comes next
            if broken:
                return self._verdict(step, readings, quantity, broken, len(layers), is_excused)
        return None

    def _verdict(
        self,
        step: int,
        readings: Readings,
        quantity: str,
        broken: list[str],
        num_layers: int,
        is_excused: bool,
    ) -> Alert:
        """The alert of the first quantity that is broken: about what it broke with, where that is known."""
        is_everywhere = len(broken) == num_layers
        inner = innermost(broken)
        layer = inner[0 if quantity in _FIRST_LAYER else -1]
        how_many = f"{len(broken)} of {num_layers} layers"
        if quantity in _LAST_LAYER:
            if is_everywhere and num_layers > 1:
                layer = ALL_LAYERS
            lost = next((name for name in readings if self._ceased_to_be_finite(name, step)), None)
            # A norm that the script logs breaks with any layer; what gradients break with, the last one has.
            layers = [name for name in readings[quantity] if name != ALL_LAYERS] or [ALL_LAYERS]
            if lost is not None and innermost(layers)[-1] in broken:
                how_many = f"with it {quantity} of {how_many}"
                quantity, layer = lost, ALL_LAYERS
        # Logits that are broken in every layer came in broken: before attention less is measured.
        is_unclear = quantity not in _FIRST_LAYER or (quantity == _LOGITS and is_everywhere)
        remedies = REMEDIES["non-finite"]
        if is_unclear and not is_excused and _has_every_gradient_broken(readings):
            layer = ALL_LAYERS
            how_many = "every layer's gradient is broken: the batch, a value between layers, or the loss"
            if not _has_outputs(readings):
                how_many += f"; {_NOT_KNOWN}"
                remedies = (_HOW_TO_KNOW, *remedies)
        how_many += _logged(readings, quantity)
        return self._alert(step, layer, quantity, broken, how_many, remedies)

    def _ceased_to_be_finite(self, name: str, step: int) -> bool:
        """Whether it is a number that the script logs, and this its first value that is not finite."""
        recent = list(self._recent.get(name, ()))[-2:]
        if name in _WHAT or len(recent) < 2 or recent[-1][0] != step:
            return False
        before, now = (values[ALL_LAYERS] for _, values in recent)
        return math.isfinite(before) and not math.isfinite(now)

    def _alert(
        self,
        step: int,
        layer: str,
        quantity: str,
        broken: list[str],
        how_many: str,
        remedies: tuple[str, ...],
    ) -> Alert:
        recent = self._recent[quantity]
        shown = layer if layer in recent[-1][1] else broken[0]  # the whole model, where it has no value
        evidence = tuple((at, values[shown]) for at, values in recent if shown in values)
        value = evidence[-1][1]
        what = f"{_WHAT[quantity]} {value} ({quantity})" if quantity in _WHAT else _in_words(quantity, value)
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
            f"{what}; {how_many}.{tried}",
            kind="non-finite",
            onset_step=step,
            evidence=evidence,
            spread=tuple(name for name in broken if name != layer),
            remedies=remedies,
        )


def _breaks_before(attention: str, readings: Readings) -> bool:
    """Whether an output is broken that the forward pass comes to before it comes to an attention layer."""
    outputs = readings.get("activation_rms", {})
    # Where it is among them: itself, what is inside, or else what is around it.
    place = attention.partition("/call_")[0]
    while place and not any(name == place or name.startswith(f"{place}.") for name in outputs):
        place = place.rpartition(".")[0]
    for name, value in outputs.items():
        if not place or name == place or name.startswith(f"{place}."):
            return False
        if not math.isfinite(value):
            return True
    return False


def _is_logged(quantity: str, values: Mapping[str, float]) -> bool:
    return quantity != "skipped_step" and values.keys() == {ALL_LAYERS}


def _logged(readings: Readings, told: str) -> str:
    """Numbers that the script logged, other than the loss and what is told already, that are not finite."""
    return "".join(
        f"; {_in_words(name, values[ALL_LAYERS])}"
        for name, values in readings.items()
        if name not in _WHAT
        and name != told
        and _is_logged(name, values)
        and not math.isfinite(values[ALL_LAYERS])
    )


def _in_words(name: str, value: float) -> str:
    return f"{name}, which the script logged, is {value}"


def _has_every_gradient_broken(readings: Readings) -> bool:
    """Whether there are several layers, none of which has a finite gradient."""
    gradients = [norm for layer, norm in readings.get("grad_norm", {}).items() if layer != ALL_LAYERS]
    return len(gradients) > 1 and not any(math.isfinite(norm) for norm in gradients)


def _has_outputs(readings: Readings) -> bool:
    return any(layer != ALL_LAYERS for quantity in _OUTPUTS for layer in readings.get(quantity, {}))


def _is_fine(quantity: str, value: float) -> bool:
    # A largest logit of −inf: no row had a key.
    return math.isfinite(value) or (quantity == _LOGITS and value == -math.inf)

"""A step's records as detectors read them: whole layers, in the order of the forward pass."""

from __future__ import annotations

from collections.abc import Iterable

from probes.layers import forward_place
from probes.record import Series, StepRecords

_MAX_KNOWN = 16


class ForwardReadings:
    """Puts the numbers of steps in the order of the forward pass.

    Outputs are measured in that order, gradients at them on the way back, and parameters in the optimizer's
    order. The step that measured most outputs knows it best.

    Args:
        layers: Names of the model's layers, in its order; it serves until a step has measured outputs.

    Attributes:
        seen_order: Layers in the order of the forward pass, as far as outputs have shown it.
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self._layers = list(layers)
        self.seen_order: list[str] = []
        # By the identity of the names, which most steps share: quantity, layers, indices of their values.
        self._known: dict[int, tuple[tuple[Series, ...], list[tuple[str, list[str], list[int]]]]] = {}

    @property
    def order(self) -> list[str]:
        """Layers in the order of the forward pass, as well as it is known."""
        return self.seen_order or self._layers

    def resume(self, seen_order: Iterable[str]) -> None:
        """Goes on with the order that an earlier run has seen."""
        self.seen_order = list(seen_order)
        self._known.clear()

    def __call__(self, records: StepRecords) -> dict[str, dict[str, float]]:
        """Quantity → layer → value; single heads are left out, a module's later calls have own names."""
        known = self._known.get(id(records.series))
        if known is None:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            known = self._known[id(records.series)] = records.series, self._places(records.series)
        values = records.values.tolist()
        return {
            quantity: {layer: values[index] for layer, index in zip(layers, indices, strict=True)}
            for quantity, layers, indices in known[1]
        }

    def _places(self, series: Iterable[Series]) -> list[tuple[str, list[str], list[int]]]:
        places: dict[str, dict[str, int]] = {}
        for index, name in enumerate(series):
            if name.head is None:
                layer = f"{name.layer}/call_{name.call}" if name.call else name.layer
                places.setdefault(name.quantity, {})[layer] = index
        outputs = places.get("activation_rms", {})
        if len(outputs) > len(self.seen_order):
            self.seen_order = list(outputs)
            self._known.clear()
        place_of = {layer: i for i, layer in enumerate(self.order)}
        ordered = []
        for quantity, of_quantity in places.items():
            layers = sorted(of_quantity, key=lambda layer: forward_place(layer, place_of))
            ordered.append((quantity, layers, [of_quantity[layer] for layer in layers]))
        return ordered

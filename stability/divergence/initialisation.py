"""Layers that start with weights unlike those of their siblings in other blocks."""

from __future__ import annotations

import math
import re
from statistics import median
from typing import Any

from stability.divergence.detector import ALL_LAYERS, Alert, Readings
from stability.divergence.remedies import REMEDIES

_BLOCK_NUMBER = re.compile(r"\.\d+\.")


class InitialisationDetector:
    """Alerts when a layer's first weight norm is far from that of the same layer in other blocks.

    There is no history at the first step, but there are siblings: layers whose names differ in the numbers of
    their blocks alone (``blocks.0.mlp.output``, ``blocks.1.mlp.output``; not ``0`` and ``2`` of a Sequential,
    which may be of any shapes). A layer is out when its log norm lies log ``ratio`` from the median of its
    siblings', and ``num_ranges`` times as far as they lie from each other. Of several, the furthest is named;
    of two siblings that disagree the larger, since too large is what training does not forgive. One verdict,
    on the first step with weights, never again; none where that is not step 0, since the weights of a
    training that is taken up have been learned.

    Args:
        ratio: Norm over the siblings' median. Calibrated: those of one shape agree within 1.1; outer stages
            of a convolutional network whose width doubles are 2 from the median.
        num_ranges: Distance from the siblings' median over the distance between their extremes.

    Raises:
        ValueError: If ``ratio`` is not above 1 or ``num_ranges`` is negative.

    Source:
        Why layers of one shape start alike: He et al. 1502.01852. The thresholds are calibrated.

    Example:
        >>> norms = {"blocks.0.output": 1.0, "blocks.1.output": 30.0, "blocks.2.output": 1.1}
        >>> [alert] = InitialisationDetector().update(0, {"weight_norm": norms})
        >>> alert.layer, alert.kind
        ('blocks.1.output', 'initialisation')
    """

    def __init__(self, *, ratio: float = 3.0, num_ranges: float = 2.0) -> None:
        if ratio <= 1 or num_ranges < 0:
            raise ValueError(
                f"ratio must be above 1 and num_ranges at least 0; got {ratio} and {num_ranges}."
            )
        self._ratio = math.log(ratio)
        self._num_ranges = num_ranges
        self._is_done = False

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        norms = readings.get("weight_norm", {})
        if self._is_done or not norms:
            return []
        self._is_done = True
        if step > 0:  # a training that is taken up: these norms have been learned
            return []
        siblings: dict[str, dict[str, float]] = {}
        for layer, norm in norms.items():
            if layer != ALL_LAYERS and 0 < norm < math.inf:
                siblings.setdefault(_BLOCK_NUMBER.sub(".*.", layer), {})[layer] = math.log(norm)
        outliers = {
            layer: deviation
            for group in siblings.values()
            if len(group) > 1
            for layer, deviation in self._outliers(group).items()
        }
        if not outliers:
            return []
        layer = max(outliers, key=lambda name: (abs(outliers[name]), outliers[name]))
        norm = norms[layer]
        reference = math.exp(math.log(norm) - outliers[layer])
        return [
            Alert(
                step,
                layer,
                "weight_norm",
                "warning",
                norm,
                reference,
                f"its first weight norm is {norm:.3g}; the same layer of other blocks has {reference:.3g}.",
                kind="initialisation",
                onset_step=step,
                evidence=((step, norm),),
                spread=tuple(name for name in outliers if name != layer),
                remedies=REMEDIES["initialisation"],
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {"is_done": self._is_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        self._is_done = state["is_done"]

    def _outliers(self, group: dict[str, float]) -> dict[str, float]:
        """Layer → log norm over the siblings' median, of those that are out."""
        outliers = {}
        for layer, value in group.items():
            others = sorted(other for name, other in group.items() if name != layer)
            deviation = value - median(others)
            if abs(deviation) >= max(self._ratio, self._num_ranges * (others[-1] - others[0])):
                outliers[layer] = deviation
        return outliers

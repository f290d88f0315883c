"""The few numbers of a step that a person looks at first, and the charts that show them.

They are the series ``overview/…``, and TensorBoard's Custom Scalars page draws them as this module lays them
out. All follow from what is recorded, so :func:`probes.read` leaves them out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from probes.record import ALL_LAYERS, Series

PREFIX = "overview/"
PEAK_TAG = f"{PREFIX}peak_grad_norm"

_NAMES = ("min", "median", "max")
_BANDS = {"attention/entropy": "entropy", "attention/max_logit": "log10_max_logit"}
_SMALLEST_LOGIT = 1e-2  # smaller ones, and negative ones, are drawn as this
_ALERTS = "alert/.+"
_JACOBIAN = "attention/jacobian_frobenius"

_CATEGORY = "Overview"

# Custom Scalars knows no logarithmic axis of its own accord; so the logarithm is the series.
_CHARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "log10 gradient norm: model, worst layer": (
        "Multiline",
        (f"{PREFIX}log10_grad_norm", f"{PREFIX}log10_worst_layer_grad_norm"),
    ),
    "Attention entropy (nats): min, median, max of layers": (
        "Margin",
        tuple(f"{PREFIX}entropy_{name}" for name in ("median", "min", "max")),
    ),
    "log10 largest logit: min, median, max of layers": (
        "Margin",
        tuple(f"{PREFIX}log10_max_logit_{name}" for name in ("median", "min", "max")),
    ),
    "Softmax against sigmoid: Jacobian norm, median": (
        "Multiline",
        (f"{PREFIX}jacobian_frobenius_median",),
    ),
    "Alerts so far (see Text)": ("Multiline", (f"{PREFIX}alerts",)),
    "Alerts by layer: 1 warning, 2 divergence": ("Multiline", (_ALERTS,)),
}


class Overview(NamedTuple):
    """Where the numbers come from in steps with the same series.

    Attributes:
        whole: Index of the whole model's gradient norm, or None.
        skipped: Index of the mark of an update that was left out, or None.
        layers: Indices of the layers' gradient norms.
        bands: Tags and indices of what is shown as a band across layers.
        jacobian: Indices of the layers' Jacobian norms.
    """

    whole: int | None
    skipped: int | None
    layers: np.ndarray
    bands: tuple[tuple[tuple[str, ...], np.ndarray], ...]
    jacobian: np.ndarray

    @classmethod
    def of(cls, series: Sequence[Series]) -> Overview:
        """Finds them."""
        indices: dict[str, list[int]] = {}
        whole = skipped = None
        for index, name in enumerate(series):
            if name == Series(ALL_LAYERS, "grad_norm"):
                whole = index
            elif name == Series(ALL_LAYERS, "skipped_step"):
                skipped = index
            elif name.head is None:
                indices.setdefault(name.quantity, []).append(index)
        bands = tuple(
            (tuple(f"{PREFIX}{short}_{name}" for name in _NAMES), np.array(indices[quantity]))
            for quantity, short in _BANDS.items()
            if quantity in indices
        )
        layers, jacobian = (np.array(indices.get(name, ()), np.intp) for name in ("grad_norm", _JACOBIAN))
        return cls(whole, skipped, layers, bands, jacobian)

    @property
    def tags(self) -> list[str]:
        """Of the numbers, in the order of ``values``."""
        tags = [] if self.whole is None else [f"{PREFIX}log10_grad_norm", PEAK_TAG]
        tags += [f"{PREFIX}log10_worst_layer_grad_norm"] if self.layers.size else []
        tags += [tag for band, _ in self.bands for tag in band]
        tags += [f"{PREFIX}jacobian_frobenius_median"] if self.jacobian.size else []
        return [*tags, f"{PREFIX}alerts"]

    def grad_norm(self, values: np.ndarray) -> float:
        """Of the whole model, infinite where not finite; 0 of an update that was left out, or without one."""
        if self.whole is None or (self.skipped is not None and values[self.skipped] > 0):
            return 0.0
        norm = float(values[self.whole])
        return norm if math.isfinite(norm) else math.inf

    def values(self, values: np.ndarray, peak: float, num_alerts: int) -> list[float]:
        """The numbers.

        Args:
            values: Of the step's series.
            peak: Largest gradient norm so far.
            num_alerts: Alerts so far.
        """
        numbers: list[float] = [] if self.whole is None else [_log10(values[self.whole]), peak]
        if self.layers.size:
            numbers.append(_log10(values[self.layers].max()))
        for tags, indices in self.bands:
            layers = values[indices]
            if "log10" in tags[0]:
                layers = np.log10(np.maximum(layers, _SMALLEST_LOGIT))
            numbers += [layers.min(), np.median(layers), layers.max()]
        if self.jacobian.size:
            numbers.append(float(np.median(values[self.jacobian])))
        return [*numbers, num_alerts]


def layout(tags: Collection[str]) -> dict[str, dict[str, list[Any]]]:
    """The charts that these tags can fill, as ``torch.utils.tensorboard`` takes them."""
    charts: dict[str, list[Any]] = {}
    for title, (kind, shown) in _CHARTS.items():
        if shown[0] in tags or shown[0] == _ALERTS:
            # A multi-line chart's tags are regular expressions.
            is_name = kind == "Margin" or shown[0] == _ALERTS
            charts[title] = [kind, [tag if is_name else f"^{tag}$" for tag in shown]]
    return {_CATEGORY: charts}


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf if value == 0 else math.nan

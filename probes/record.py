"""What is recorded: one number of one quantity of one layer at one optimizer step."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from probes.quantities import QUANTITIES
from stability.attention.summary import Kind
from stability.divergence import ALL_LAYERS, Alert

_HEAD = re.compile(r"(.*)/head_(\d+)", re.DOTALL)
_CALL = re.compile(r"(.*)/call_(\d+)", re.DOTALL)

__all__ = [
    "ALL_LAYERS",
    "Kind",
    "Record",
    "Series",
    "StepRecords",
    "alert_marker",
    "series_of",
    "series_of_each",
]


class Series(NamedTuple):
    """The name of one recorded series: everything of a record but step and value.

    Attributes:
        layer: Qualified module name as in ``model.named_modules()``, "(root)" or "(all)".
        quantity: One of :data:`probes.quantities.QUANTITIES`, or the name given to ``probe.log``.
        head: Attention head, or None for a whole layer.
        call: Which call of the module within one forward pass, from 0 (modules may be shared).
        rank: Process of a distributed run, or None.
        kind: "exact", "estimate" (sampled mean), "lower_bound" (sampled maximum), "upper_bound".

    Example:
        >>> Series("blocks.0", "attention/entropy", head=2).tag
        'attention/entropy/blocks.0/head_2'
    """

    layer: str
    quantity: str
    head: int | None = None
    call: int = 0
    rank: int | None = None
    kind: Kind = "exact"

    @property
    def tag(self) -> str:
        """The TensorBoard tag ``quantity/layer``, with call and head appended where they say something."""
        call = f"/call_{self.call}" if self.call else ""
        head = "" if self.head is None else f"/head_{self.head}"
        return f"{self.quantity}/{self.layer}{call}{head}"

    @classmethod
    def from_tag(cls, tag: str) -> Series:
        """The series of a tag; what a tag does not tell has its default.

        Example:
            >>> Series.from_tag("attention/entropy/blocks.0/head_2")
            Series(layer='blocks.0', quantity='attention/entropy', head=2, call=0, rank=None, kind='exact')
        """
        if tag.endswith(f"/{ALL_LAYERS}"):  # what the script logs may have any name
            return cls(ALL_LAYERS, tag.removesuffix(f"/{ALL_LAYERS}"))
        parts = tag.split("/")
        length = 2 if "/".join(parts[:2]) in QUANTITIES else 1
        quantity, layer = "/".join(parts[:length]), "/".join(parts[length:])
        # Of the layer alone, which may itself be named head_0; and only attention has heads.
        head, call = None, 0
        if quantity.startswith("attention/") and (found := _HEAD.fullmatch(layer)):
            layer, head = found[1], int(found[2])
        if found := _CALL.fullmatch(layer):
            layer, call = found[1], int(found[2])
        return cls(layer, quantity, head, call)


@lru_cache(maxsize=2**16)
def series_of(layer: str, quantity: str, call: int = 0) -> Series:
    """The exact series of a layer; the same object each time, since a step names thousands.

    Example:
        >>> series_of("blocks.0", "grad_norm") is series_of("blocks.0", "grad_norm")
        True
    """
    return Series(layer, quantity, call=call)


@lru_cache(maxsize=2**8)
def series_of_each(layers: tuple[str, ...], quantity: str) -> tuple[Series, ...]:
    """The exact series of several layers; the same tuple each time.

    Example:
        >>> [series.tag for series in series_of_each(("a", "b"), "grad_norm")]
        ['grad_norm/a', 'grad_norm/b']
    """
    return tuple(series_of(layer, quantity) for layer in layers)


def alert_marker(alert: Alert) -> tuple[Series, float]:
    """An alert as one more series, for places that take numbers only: 1 for a warning, 2 for divergence.

    Example:
        >>> alert = Alert(7, "blocks.0", "grad_norm", "warning", 9.0, 1.0, "…", kind="dead")
        >>> series, value = alert_marker(alert)
        >>> series.tag, value
        ('alert/dead/blocks.0', 1.0)
    """
    series = Series(alert.layer, f"alert/{alert.name}")
    return series, 2.0 if alert.severity == "divergence" else 1.0


class Record(NamedTuple):
    """One recorded number.

    Attributes:
        step: Optimizer steps completed before the one recorded, so the first record has step 0.
        layer: See :class:`Series`, like the remaining names.
        quantity: See :class:`Series`.
        value: A Python float; NaN and infinities are kept.
        head: See :class:`Series`.
        call: See :class:`Series`.
        rank: See :class:`Series`.
        kind: See :class:`Series`.
        standard_error: Standard error of a sampled mean, in the value's unit; None otherwise.

    Example:
        >>> Record(0, "blocks.0", "grad_norm", 1.5)._replace(step=1).step
        1
    """

    step: int
    layer: str
    quantity: str
    value: float
    head: int | None = None
    call: int = 0
    rank: int | None = None
    kind: Kind = "exact"
    standard_error: float | None = None

    @property
    def series(self) -> Series:
        """The record's series, that is, all but step, value and standard error."""
        return Series(self.layer, self.quantity, self.head, self.call, self.rank, self.kind)


class StepRecords(NamedTuple):
    """All records of one step as columns; what sinks receive. Iterate :meth:`records` for single ones.

    Attributes:
        step: Optimizer step.
        series: One name per value.
        values: float64 [len(series)].
        standard_errors: float64 [len(series)], NaN where there is none.

    Example:
        >>> series = (Series("blocks.0", "grad_norm"), Series("blocks.1", "grad_norm"))
        >>> step = StepRecords(7, series, np.array([1.5, 0.5]), np.full(2, np.nan))
        >>> [(record.step, record.layer, record.value) for record in step.records()]
        [(7, 'blocks.0', 1.5), (7, 'blocks.1', 0.5)]
    """

    step: int
    series: tuple[Series, ...]
    values: np.ndarray
    standard_errors: np.ndarray

    def without(self, series: Collection[Series]) -> StepRecords:
        """The same step without some of its series."""
        kept = [index for index, name in enumerate(self.series) if name not in series]
        names = tuple(self.series[index] for index in kept)
        return StepRecords(self.step, names, self.values[kept], self.standard_errors[kept])

    def by_tag(self) -> dict[str, float]:
        """Tag → value of whole layers; single heads, which are many, are left out."""
        named = zip(self.series, self.values.tolist(), strict=True)
        return {series.tag: value for series, value in named if series.head is None}

    def records(self) -> Iterator[Record]:
        """Yields the step's records in the order they were measured."""
        for series, value, error in zip(
            self.series, self.values.tolist(), self.standard_errors.tolist(), strict=True
        ):
            layer, quantity, head, call, rank, kind = series
            standard_error = None if error != error else error
            yield Record(self.step, layer, quantity, value, head, call, rank, kind, standard_error)

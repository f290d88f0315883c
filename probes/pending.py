"""The scalars of the step under way, collected on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from probes.record import ALL_LAYERS, Series

# What a GradScaler has multiplied the loss by, and what is therefore divided by it. (Parameters' gradients
# are unscaled when they are measured.)
LOSS_FACTOR = Series(ALL_LAYERS, "_loss_factor")

# How much a number counts where several processes train: one for all entries, one for each, or on the device.
Weight = float | Sequence[float] | Tensor


class Measurement(NamedTuple):
    """A tensor on its way to the host, one name an entry; to be multiplied by the factor there."""

    series: Sequence[Series]
    tensor: Tensor
    factor: float
    is_standard_error: bool
    weight: Weight


class Number(NamedTuple):
    """A number that is on the host already."""

    series: Series
    value: float
    weight: float


class Ratio(NamedTuple):
    """A quantity that is formed on the host from two others once each of them is joined.

    The two are measured, not formed; the result is formed only.
    """

    result: Series
    numerator: Series
    denominator: Series


class Pending:
    """Collects the measurements of the step under way. Nothing here waits for the device.

    Attributes:
        given_up: Measurements that this process has given up, as named in :mod:`probes.guard`.
    """

    def __init__(self) -> None:
        self.given_up: frozenset[str] = frozenset()
        self.measurements: list[Measurement] = []
        self.numbers: list[Number] = []
        self.ratios: list[Ratio] = []

    def __bool__(self) -> bool:
        return bool(self.measurements or self.numbers)

    @property
    def size(self) -> int:
        """How much has been collected: it grows with everything that is added."""
        return len(self.measurements) + len(self.numbers) + len(self.ratios)

    def has(self, quantity: str) -> bool:
        """Whether anything of a quantity has been measured."""
        return any(m.series and m.series[0].quantity == quantity for m in self.measurements)

    def put_in_order(self, quantity: str, place_of: Mapping[str, int]) -> None:
        """Puts the measurements of a quantity into the order of their calls and layers.

        Args:
            quantity: Its name.
            place_of: Places of layers; others come last.
        """
        places = [i for i, m in enumerate(self.measurements) if m.series and m.series[0].quantity == quantity]
        ordered = sorted(
            (self.measurements[i] for i in places),
            key=lambda each: (each.series[0].call, place_of.get(each.series[0].layer, len(place_of))),
        )
        for place, measurement in zip(places, ordered, strict=True):
            self.measurements[place] = measurement

    def take(self) -> Pending:
        """Hands over what was collected and starts afresh."""
        taken = Pending()
        taken.given_up = self.given_up
        taken.measurements, self.measurements = self.measurements, taken.measurements
        taken.numbers, self.numbers = self.numbers, taken.numbers
        taken.ratios, self.ratios = self.ratios, taken.ratios
        return taken

    def add(
        self,
        series: Series,
        value: Tensor,
        standard_error: Tensor | None = None,
        *,
        factor: float = 1.0,
        weight: float | Tensor = 1.0,
    ) -> None:
        """Adds one 0-d measurement; several of one series are joined by their quantity's reduction.

        A series whose quantity begins with an underscore serves ratios only and is not recorded. The factor
        is applied on the host, where it launches no kernel. The weight is for joining what several processes
        measured (:mod:`probes.quantities`); one process does not look at it.
        """
        self.measurements.append(Measurement((series,), value, factor, False, weight))
        if standard_error is not None:
            self.measurements.append(Measurement((series,), standard_error, factor, True, weight))

    def add_each(
        self,
        series: Sequence[Series],
        values: Tensor,
        standard_errors: Tensor | None = None,
        *,
        weight: Weight = 1.0,
    ) -> None:
        """Adds a measurement for each entry of ``values`` [len(series)]."""
        self.measurements.append(Measurement(series, values, 1.0, False, weight))
        if standard_errors is not None:
            self.measurements.append(Measurement(series, standard_errors, 1.0, True, weight))

    def add_some(
        self,
        series: Sequence[Series],
        indices: Sequence[int],
        values: Tensor,
        weights: Sequence[float],
    ) -> None:
        """Adds the values [len(indices)] of some of the series, each of which has its weight.

        The names passed on are the same object at each step, by which it is known how they join.
        """
        if len(indices) < len(series):
            series = _some(tuple(series), tuple(indices))
            weights = [weights[index] for index in indices]
        self.add_each(series, values, weight=weights)

    def add_number(self, series: Series, value: float, *, weight: float = 1.0) -> None:
        """Adds a number that is on the host already."""
        self.numbers.append(Number(series, value, weight))

    def add_ratio(self, result: Series, numerator: Series, denominator: Series) -> None:
        """Adds a ratio of two other series of this step."""
        self.ratios.append(Ratio(result, numerator, denominator))


@lru_cache(maxsize=2**6)
def _some(series: tuple[Series, ...], indices: tuple[int, ...]) -> tuple[Series, ...]:
    return tuple(series[index] for index in indices)

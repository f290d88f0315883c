"""Median and spread of a series' last values, cheap enough for every layer at every step."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

# Of a normal distribution, in standard deviations.
NORMAL_INTERQUARTILE_RANGE = 1.349
_NORMAL_90_PERCENT = 1.282


class RunningRange:
    """Location and scale of the last ``window`` values, both read from one sorted list.

    The median bears half of the values being wild, the interquartile range a quarter. A steady trend widens
    the range as it moves the median: the newest value of a straight line lies 1.35 spreads from it, whatever
    its slope.

    Args:
        window: Values it covers.
        values: The first ones, oldest first.

    Example:
        >>> running = RunningRange(5, [1.0, 2.0, 3.0, 4.0, 1e9])
        >>> running.median(), round(running.spread(), 2)
        (3.0, 1.48)
    """

    def __init__(self, window: int, values: Iterable[float] = ()) -> None:
        self.values: deque[float] = deque()
        self._window = window
        self._sorted: list[float] = []
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self.values)

    def append(self, value: float) -> None:
        """Takes a finite value in; the oldest goes."""
        values, ordered = self.values, self._sorted
        if len(values) == self._window:
            del ordered[bisect_left(ordered, values.popleft())]
        values.append(value)
        insort(ordered, value)

    def median(self) -> float:
        """Of an even number of values the mean of the middle two."""
        ordered = self._sorted
        middle, is_odd = divmod(len(ordered), 2)
        return ordered[middle] if is_odd else (ordered[middle - 1] + ordered[middle]) / 2

    def spread(self) -> float:
        """Interquartile range, as the standard deviation of a normal distribution that has it."""
        return (self._quantile(0.75) - self._quantile(0.25)) / NORMAL_INTERQUARTILE_RANGE

    def upper_spread(self) -> float:
        """The same from median and 90 % quantile: it sees a long tail upwards."""
        return (self._quantile(0.9) - self.median()) / _NORMAL_90_PERCENT

    def largest(self) -> float:
        """Largest value."""
        return self._sorted[-1]

    def _quantile(self, share: float) -> float:
        return self._sorted[round(share * (len(self._sorted) - 1))]

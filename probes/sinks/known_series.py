"""What a sink has worked out from the names of a step's values, for later steps that have the same."""

from __future__ import annotations

from typing import Generic, TypeVar

from probes.record import Series

MAX_SETS = 32  # of series that are remembered

T = TypeVar("T")


class KnownSeries(Generic[T]):
    """Remembers something of up to 32 sets of series, which may take turns: experts, dropped layers.

    Example:
        >>> known = KnownSeries[int]()
        >>> series = (Series("a", "grad_norm"),)
        >>> known.add(series, 7)
        >>> known.get(series), known.get((Series("b", "grad_norm"),))
        (7, None)
    """

    def __init__(self) -> None:
        self._of_length: dict[int, list[tuple[tuple[Series, ...], T]]] = {}
        self._number = 0

    def __len__(self) -> int:
        return self._number

    def get(self, series: tuple[Series, ...]) -> T | None:
        """What was added for the same series; None for others."""
        known = self._of_length.get(len(series), ())
        # Most steps share the tuple with an earlier one. Hashing thousands of names takes longer than to
        # compare them with those of the same number.
        for names, value in known:
            if names is series:
                return value
        return next((value for names, value in known if names == series), None)

    def add(self, series: tuple[Series, ...], value: T) -> None:
        """Remembers it; where there is no room all others are forgotten."""
        if self._number == MAX_SETS:
            self._of_length.clear()
            self._number = 0
        self._of_length.setdefault(len(series), []).append((series, value))
        self._number += 1

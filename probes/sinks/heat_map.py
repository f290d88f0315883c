"""What a heat map layer × step shows of a run, in the same few kilobytes however long it lasts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

MAX_COLUMNS = 240


class HeatMap:
    """Layer × step; each column holds as many recorded steps as are needed for all to fit.

    Of the steps of a column the worst value is kept, so one spike in a million steps is seen.

    Args:
        is_low_worse: Whether the smallest value is the worst, as of entropies, and not the largest.
    """

    def __init__(self, *, is_low_worse: bool = False) -> None:
        self.is_low_worse = is_low_worse
        self.steps: list[int] = []
        self._worse = np.minimum if is_low_worse else np.maximum  # NaN is worse than either
        self._nothing = np.inf if is_low_worse else -np.inf
        self._rows: dict[str, int] = {}
        self._grid = np.full((0, MAX_COLUMNS), self._nothing)
        self._steps_per_column = 1
        self._steps_in_column = 0
        self._last_step = -1

    def rows(self, layers: Sequence[str]) -> np.ndarray:
        """The rows of layers, for ``add``; new layers get one."""
        for layer in layers:
            self._rows.setdefault(layer, len(self._rows))
        missing = len(self._rows) - len(self._grid)
        self._grid = np.vstack([self._grid, np.full((missing, MAX_COLUMNS), self._nothing)])
        return np.array([self._rows[layer] for layer in layers], np.intp)

    def add(self, step: int, rows: np.ndarray, values: np.ndarray) -> None:
        """Takes the values of a step, float64 [len(rows)]; of an earlier one, in place of what follows it."""
        if step < self._last_step:
            self._go_back(step)
        self._last_step = step
        if not self.steps or self._steps_in_column == self._steps_per_column:
            if len(self.steps) == MAX_COLUMNS:
                self._join_columns()
            self.steps.append(step)
            self._steps_in_column = 0
        column = len(self.steps) - 1
        self._grid[rows, column] = self._worse(self._grid[rows, column], values)
        self._steps_in_column += 1

    def shown(self, order: Sequence[str]) -> tuple[list[str], np.ma.MaskedArray]:
        """Layers and their values, float64 [layers, steps], masked where nothing was recorded.

        Layers that were recorded less than half as often as others are left out: blocks are measured at every
        tenth step, all layers at every two hundredth, and rows that are nearly empty say little.

        Args:
            order: The model's layers; others come after them.
        """
        position = {layer: index for index, layer in enumerate(order)}
        grid = self._grid[:, : len(self.steps)]
        values = np.ma.masked_array(grid, grid == self._nothing)
        counts = values.count(axis=1)
        layers = [layer for layer, row in self._rows.items() if counts[row] > counts.max() // 2]
        layers.sort(key=lambda layer: position.get(layer.split("/call_")[0], len(order)))
        return layers, values[[self._rows[layer] for layer in layers]]

    def _go_back(self, step: int) -> None:
        """Empties the columns that begin at a step or later; the next one is a new one."""
        num_kept = bisect_left(self.steps, step)
        self._grid[:, num_kept:] = self._nothing
        del self.steps[num_kept:]
        self._steps_in_column = self._steps_per_column

    def _join_columns(self) -> None:
        half = MAX_COLUMNS // 2
        self._grid[:, :half] = self._worse(self._grid[:, 0::2], self._grid[:, 1::2])
        self._grid[:, half:] = self._nothing
        self.steps = self.steps[::2]
        self._steps_per_column *= 2

"""The recent past of several series side by side, and which of them left its range first.

A step brings a value for each of a model's layers. They are judged together, in numpy: layer by layer in
Python, the detectors would take most of the time that a probe takes of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from stability.divergence.running_range import NORMAL_INTERQUARTILE_RANGE

MAX_EVIDENCE = 16
ROOT = "(root)"  # as probes name the outermost module
# A value this far of the way to the alarm has left its range: where an unbroken run of them starts is the
# onset.
ONSET_SCORE = 0.5
_NEVER = -1


class Track(NamedTuple):
    """What is known of one series.

    Attributes:
        recent: (step, value), oldest first.
        onset: Step since which every score has been at least ``ONSET_SCORE``; None while ordinary.
        score: The newest.
    """

    recent: tuple[tuple[int, float], ...]
    onset: int | None
    score: float


class Tracks:
    """Several series: newest values, ranges of the ordinary ones, and since when they have left those.

    A range is that of the last ``window`` ordinary values, on whatever scale the detector judges them; its
    median and spread are those of ``RunningRange``. Series are addressed by their rows.

    Args:
        window: Ordinary values that a range covers.
        state: What ``state_dict`` gave.

    Example:
        >>> tracks = Tracks(3)
        >>> rows = tracks.rows(["a", "b"])
        >>> for values in [1.0, 5.0], [2.0, 5.0], [6.0, 7.0], [7.0, 7.0]:
        ...     tracks.append(rows, np.array(values))
        >>> tracks.lengths(rows).tolist(), tracks.medians(rows).tolist()
        ([3, 3], [6.0, 7.0])
    """

    def __init__(self, window: int, state: Mapping[str, Any] | None = None) -> None:
        self._window = window
        self._rows: dict[str, int] = {}
        self._last: tuple[list[str], np.ndarray] = [], np.zeros(0, np.intp)
        # Values of the range in the order of their coming, the oldest overwritten; and in their own order.
        self._values = self._sorted = np.zeros((0, window))
        self._num_values = np.zeros(0, np.intp)
        self._recent_steps = np.zeros((0, MAX_EVIDENCE), np.int64)
        self._recent_values = np.zeros((0, MAX_EVIDENCE))
        self._num_recent = np.zeros(0, np.intp)
        self._onsets = np.zeros(0, np.int64)
        self._scores = np.zeros(0)
        rows = self.rows(list(state or ()))
        for row, of_layer in zip(rows, (state or {}).values(), strict=True):
            values, recent, onset = of_layer["range"][-window:], of_layer["recent"], of_layer["onset"]
            self._values[row, : len(values)], self._num_values[row] = values, len(values)
            self._recent_steps[row, : len(recent)] = [step for step, _ in recent]
            self._recent_values[row, : len(recent)] = [value for _, value in recent]
            self._num_recent[row] = len(recent)
            self._onsets[row] = _NEVER if onset is None else onset
            self._scores[row] = of_layer["score"]
        self._sorted = np.sort(self._values, axis=1)

    def __getitem__(self, layer: str) -> Track:
        row = self._rows[layer]
        steps, values, number = self._recent_steps[row], self._recent_values[row], self._num_recent[row]
        recent = zip(_oldest_first(steps, number), _oldest_first(values, number), strict=True)
        onset = int(self._onsets[row])
        return Track(tuple(recent), None if onset == _NEVER else onset, float(self._scores[row]))

    def rows(self, layers: Sequence[str]) -> np.ndarray:
        """The rows of layers; new ones get one."""
        known, rows = self._last
        if layers != known:
            for layer in layers:
                self._rows.setdefault(layer, len(self._rows))
            self._grow(len(self._rows) - len(self._values))
            rows = np.array([self._rows[layer] for layer in layers], np.intp)
            self._last = list(layers), rows
        return rows

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """How many ordinary values the ranges hold."""
        return np.minimum(self._num_values[rows], self._window)

    def medians(self, rows: np.ndarray) -> np.ndarray:
        """Of ranges that hold something."""
        lengths = self.lengths(rows)
        return (self._sorted[rows, (lengths - 1) // 2] + self._sorted[rows, lengths // 2]) / 2

    def spreads(self, rows: np.ndarray) -> np.ndarray:
        """Interquartile ranges, as the standard deviations of normal distributions that have them."""
        return (self._quantiles(rows, 0.75) - self._quantiles(rows, 0.25)) / NORMAL_INTERQUARTILE_RANGE

    def half_widths(self, rows: np.ndarray) -> np.ndarray:
        """Half of the distances from the 5 % to the 95 % quantiles."""
        return (self._quantiles(rows, 0.95) - self._quantiles(rows, 0.05)) / 2

    def append(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Takes finite values into the ranges; the oldest go."""
        self._values[rows, self._num_values[rows] % self._window] = values
        self._num_values[rows] += 1
        self._sorted = np.sort(self._values, axis=1)  # what is not there yet is infinite

    def newest(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the last ``add``; -1 and NaN before the first."""
        at = (self._num_recent[rows] - 1) % MAX_EVIDENCE
        return self._recent_steps[rows, at], self._recent_values[rows, at]

    def add(self, step: int, rows: np.ndarray, values: np.ndarray, scores: np.ndarray) -> None:
        """Takes the next values.

        Args:
            step: Their step.
            rows: Of their series.
            values: As recorded.
            scores: How far they are out of range: 1 is the alarm. Below ``ONSET_SCORE`` a bound is enough.
        """
        at = self._num_recent[rows] % MAX_EVIDENCE
        self._recent_steps[rows, at], self._recent_values[rows, at] = step, values
        self._num_recent[rows] += 1
        self._scores[rows] = scores
        onsets = self._onsets[rows]
        self._onsets[rows] = np.where(scores < ONSET_SCORE, _NEVER, np.where(onsets == _NEVER, step, onsets))

    def are_ordinary(self, rows: np.ndarray) -> bool:
        """Whether none of them has left its range."""
        return bool((self._onsets[rows] == _NEVER).all())

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values, by layer."""
        state = {}
        for layer, row in self._rows.items():
            recent, onset, score = self[layer]
            state[layer] = {
                "range": _oldest_first(self._values[row], self._num_values[row]),
                "recent": [list(point) for point in recent],
                "onset": onset,
                "score": score,
            }
        return state

    def _quantiles(self, rows: np.ndarray, share: float) -> np.ndarray:
        return self._sorted[rows, np.rint(share * (self.lengths(rows) - 1)).astype(np.intp)]

    def _grow(self, number: int) -> None:
        def more(columns: np.ndarray, value: float) -> np.ndarray:
            return np.concatenate([columns, np.full((number, *columns.shape[1:]), value, columns.dtype)])

        self._values, self._sorted = more(self._values, np.inf), more(self._sorted, np.inf)
        self._num_values, self._num_recent = more(self._num_values, 0), more(self._num_recent, 0)
        self._recent_steps, self._recent_values = (
            more(self._recent_steps, -1),
            more(self._recent_values, np.nan),
        )
        self._onsets, self._scores = more(self._onsets, _NEVER), more(self._scores, 0.0)


def logs(values: Iterable[float]) -> np.ndarray:
    """Their natural logarithms. numpy's differ from processor to processor in the last digit."""
    return np.array([math.log(value) for value in values])


def _oldest_first(row: np.ndarray, number: int) -> list[Any]:
    """The last of so many values, in the order of their coming; each has overwritten the oldest."""
    values = row.tolist()
    at = number % len(values)
    return values[at:] + values[:at] if number > len(values) else values[:number]


def innermost(layers: Sequence[str]) -> list[str]:
    """Layers that contain no other of them: a container's name says little of its own parameters.

    Example:
        >>> innermost(["(root)", "blocks.0", "blocks.0.mlp", "blocks.1"])
        ['blocks.0.mlp', 'blocks.1']
    """
    rest = [layer for layer in layers if layer != ROOT]
    # Where all layers break at once, comparing each with each would take seconds in a large model.
    containers = {layer[:end] for layer in rest for end, letter in enumerate(layer) if letter == "."}
    return [layer for layer in rest if layer not in containers] or list(layers)


def origin(
    tracks: Tracks, layers: Iterable[str], ties: Literal["first", "last", "worst"]
) -> tuple[str, tuple[str, ...]]:
    """Where it began: the layer that left its range first, however loud others have become since.

    Args:
        tracks: What is known of them.
        layers: Those of this step, in the order of the forward pass; one at least has an onset.
        ties: Of layers with the same onset, whether the first in the forward pass is the origin (outputs),
            the last (gradients, which the backward pass carries from there), or the one with the highest
            score.

    Returns:
        The layer, and those that followed: in the order of time, then of the forward pass.
    """
    onset_of = {layer: onset for layer in layers if (onset := tracks[layer].onset) is not None}
    out = innermost(list(onset_of))
    earliest = min(onset_of[layer] for layer in out)
    tied = [layer for layer in out if onset_of[layer] == earliest]
    if ties == "worst":
        layer = max(tied, key=lambda name: tracks[name].score)
    else:
        layer = tied[0 if ties == "first" else -1]
    return layer, tuple(sorted((name for name in out if name != layer), key=onset_of.__getitem__))

"""A series' recent past, and which of several series left its range first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from stability.divergence.running_range import RunningRange

MAX_EVIDENCE = 16
ROOT = "(root)"  # as probes name the outermost module
# A value this far of the way to the alarm has left its range: where an unbroken run of them starts is the
# onset.
ONSET_SCORE = 0.5


class Track:
    """One series: its newest values, the range of its ordinary ones, and since when it has left that.

    Args:
        window: Ordinary values that the range covers.

    Attributes:
        range: Of ordinary values, on whatever scale the detector judges them.
        recent: (step, value), oldest first.
        onset: Step since which every score has been at least ``ONSET_SCORE``; None while ordinary.
        score: The newest.
    """

    __slots__ = ("onset", "range", "recent", "score")

    def __init__(self, window: int) -> None:
        self.range = RunningRange(window)
        self.recent: deque[tuple[int, float]] = deque(maxlen=MAX_EVIDENCE)
        self.onset: int | None = None
        self.score = 0.0

    def add(self, step: int, value: float, score: float) -> None:
        """Takes the next value.

        Args:
            step: Its step.
            value: As recorded.
            score: How far it is out of range: 1 is the alarm. Below ``ONSET_SCORE`` a bound is enough.
        """
        self.recent.append((step, value))
        self.score = score
        if score < ONSET_SCORE:
            self.onset = None
        elif self.onset is None:
            self.onset = step

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        return {
            "range": list(self.range.values),
            "recent": [list(point) for point in self.recent],
            "onset": self.onset,
            "score": self.score,
        }

    @classmethod
    def from_state(cls, window: int, state: Mapping[str, Any]) -> Track:
        """Restores what ``state_dict`` gave."""
        track = cls(window)
        track.range = RunningRange(window, state["range"])
        track.recent.extend((step, value) for step, value in state["recent"])
        track.onset, track.score = state["onset"], state["score"]
        return track


def states(tracks: Mapping[str, Track]) -> dict[str, Any]:
    """State of every track, by layer."""
    return {layer: track.state_dict() for layer, track in tracks.items()}


def from_states(window: int, state: Mapping[str, Any]) -> dict[str, Track]:
    """Restores what ``states`` gave."""
    return {layer: Track.from_state(window, of_layer) for layer, of_layer in state.items()}


def innermost(layers: Sequence[str]) -> list[str]:
    """Layers that contain no other of them: a container's name says little of its own parameters.

    Example:
        >>> innermost(["(root)", "blocks.0", "blocks.0.mlp", "blocks.1"])
        ['blocks.0.mlp', 'blocks.1']
    """
    rest = [layer for layer in layers if layer != ROOT]
    inner = [a for a in rest if not any(b.startswith(f"{a}.") for b in rest)]
    return inner or list(layers)


def origin(
    tracks: Mapping[str, Track], layers: Iterable[str], ties: Literal["first", "last", "worst"]
) -> tuple[str, tuple[str, ...]]:
    """Where it began: the layer that left its range first, however loud others have become since.

    Args:
        tracks: By layer.
        layers: Those of this step, in the order of the forward pass; one at least has an onset.
        ties: Of layers with the same onset, whether the first in the forward pass is the origin (outputs),
            the last (gradients, which the backward pass carries from there), or the one with the highest
            score.

    Returns:
        The layer, and those that followed: in the order of time, then of the forward pass.
    """
    out = innermost([layer for layer in layers if tracks[layer].onset is not None])
    onsets = {layer: tracks[layer].onset or 0 for layer in out}
    earliest = min(onsets.values())
    tied = [layer for layer in out if onsets[layer] == earliest]
    if ties == "worst":
        layer = max(tied, key=lambda name: tracks[name].score)
    else:
        layer = tied[0 if ties == "first" else -1]
    return layer, tuple(sorted((name for name in out if name != layer), key=onsets.__getitem__))

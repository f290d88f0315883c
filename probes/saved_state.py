"""Checks of what ``Probe.load_state_dict`` is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_EXPECTED = "`state` must be what Probe.state_dict() returned"
_REMEDY = "Save it in a checkpoint under a key of its own, and give that entry."


def check_state(state: Any, layers: Iterable[str]) -> None:
    """Refuses what is no probe's state, or that of another model.

    Args:
        state: What was given.
        layers: Names of the model's layers.

    Raises:
        TypeError: If it is no dict, or a part of it has the wrong type.
        ValueError: If a part is missing, the step is negative, or the model has none of the state's layers.
    """
    if not isinstance(state, dict):
        raise TypeError(f"{_EXPECTED}; got {type(state).__name__}. {_REMEDY}")
    missing = [key for key in ("step", "detectors", "layers") if key not in state]
    if missing:
        present = ", ".join(map(repr, state)) if state else "no keys"
        raise ValueError(
            f"{_EXPECTED}; {', '.join(map(repr, missing))} missing, got a dict with {present}. {_REMEDY}"
        )
    step = state["step"]
    if not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"{_EXPECTED}; its step must be an integer, got {step!r}. {_REMEDY}")
    if step < 0:
        raise ValueError(f"{_EXPECTED}; its step must not be negative, got {step}. {_REMEDY}")
    for key in ("detectors", "layers"):
        if not isinstance(state[key], list | tuple):
            raise TypeError(f"{_EXPECTED}; its {key} must be a list, got {state[key]!r}. {_REMEDY}")
    names = list(layers)
    if state["layers"] and set(names).isdisjoint(state["layers"]):
        raise ValueError(
            f"`state` must be of this model, whose layers are {', '.join(names[:8])}; it is of one with "
            f"{', '.join(map(str, state['layers'][:8]))}. Load the checkpoint of this model."
        )

"""Sigmoid attention for Hopper (sm_90) in Gluon.

Imported where a CUDA tensor asks for it, never by ``import stability``; and the kernels only where they are
called, so that `can_run` answers whatever Triton is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from stability.attention.hopper.eligibility import can_run, why_only_by_name

__all__ = ["backward", "can_run", "forward", "why_only_by_name"]


def __getattr__(name: str) -> Any:
    if name in ("backward", "forward"):
        function = getattr(import_module(f"{__name__}.sigmoid_{name}"), name)
        globals()[name] = function  # Python asks once
        return function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

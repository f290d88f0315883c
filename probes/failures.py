"""What fails inside a probe is given up with one warning; the training goes on."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch

import stability

_LIBRARIES = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, stability.__file__, torch.__file__))

T = TypeVar("T")
R = TypeVar("R")


class ProbeWarning(UserWarning):
    """Something could not be measured or written; the training goes on without it.

    Example:
        >>> import warnings, torch, probes, probes.sinks
        >>> class FullDisk(probes.sinks.MemorySink):
        ...     def write(self, records):
        ...         raise OSError("no space left")
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always", probes.ProbeWarning)
        ...     with probes.attach(model, optimizer, sinks=[FullDisk()]) as probe:
        ...         model(torch.ones(1, 2)).sum().backward()
        ...         optimizer.step()
        >>> print(caught[0].message)
        FullDisk failed and is dropped; training and recording go on: OSError('no space left')
    """


def call_or_drop(members: list[T], member: T, method: Callable[..., R], *arguments: object) -> R | None:
    """Calls a method of a sink or detector; one that fails leaves ``members`` with a warning."""
    try:
        return method(*arguments)
    except Exception as error:
        members.remove(member)
        with contextlib.suppress(Exception):  # a sink still holds a file, a mapping or a thread
            getattr(member, "close", lambda: None)()
        warnings.warn(
            f"{type(member).__name__} failed and is dropped; training and recording go on: {error!r}",
            ProbeWarning,
            stacklevel=3,
        )
        return None


def stacklevel_of_script() -> int:
    """The ``stacklevel`` by which a warning of the caller names the script's line, not one of a library."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
        level += 1
    return level

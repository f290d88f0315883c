"""Checks of single arguments of ``attach``."""

from __future__ import annotations

import os
from collections.abc import Sequence


def check_count(name: str, value: object, *, minimum: int) -> None:
    """Raises unless it is an integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer; got {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}; got {value}.")


def check_flag(name: str, value: object) -> None:
    """Raises unless it is True or False: a text such as "no" would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False; got {value!r}.")


def check_log_dir(log_dir: object) -> None:
    """Raises unless it is a path that names a directory; an empty one would be the working directory."""
    if not isinstance(log_dir, str | os.PathLike):
        raise TypeError(f"`log_dir` must be a path or None; got {log_dir!r}.")
    if not os.fspath(log_dir):
        raise ValueError(
            '`log_dir` must name a directory; got an empty path. Give "." for the working directory, or '
            "None to keep records in memory only."
        )


def check_members(name: str, members: object, protocol: type, example: str) -> None:
    """Raises unless it is a sequence of objects with the protocol's methods."""
    methods = [method for method in vars(protocol) if not method.startswith("_")]
    expected = f"`{name}` must be a list of objects with {', '.join(methods)}, such as [{example}]"
    if not isinstance(members, Sequence) or isinstance(members, str):
        raise TypeError(f"{expected}; got {type(members).__name__}.")
    for member in members:
        if isinstance(member, type):
            raise TypeError(f"{expected}; got the class {member.__name__} itself.")
        if not all(callable(getattr(member, method, None)) for method in methods):
            raise TypeError(f"{expected}; one of them is {type(member).__name__}.")

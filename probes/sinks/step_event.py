"""One TensorBoard event that holds all scalars of a step, without a Python object for each.

The tags of a step hardly change, so the event is serialised once and from then on only its floats are put in.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

# Keys of protocol buffers, field number << 3 | wire type, of Event, Summary and Summary.Value.
_WALL_TIME, _STEP, _SUMMARY = b"\x09", b"\x10", b"\x2a"
_VALUE = b"\x0a"
_TAG, _SIMPLE_VALUE, _IMAGE = b"\x0a", b"\x15", b"\x22"


class StepEvent:
    """Serialises the events of steps with these tags.

    Args:
        tags: Of the scalars, at least one.
    """

    def __init__(self, tags: Sequence[str]) -> None:
        content = bytearray()
        ends = []
        for tag in tags:
            name = tag.encode(errors="replace")
            value = _TAG + _varint(len(name)) + name + _SIMPLE_VALUE + bytes(4)
            content += _VALUE + _varint(len(value)) + value
            ends.append(len(content))
        self._content = np.frombuffer(content, np.uint8)
        self._floats = np.array(ends)[:, None] + np.arange(-4, 0)

    def serialised(self, wall_time: float, step: int, values: np.ndarray, more: bytes = b"") -> bytes:
        """The event.

        Args:
            wall_time: Seconds since 1970.
            step: Not negative.
            values: float64 [number of tags]; written as float32.
            more: A serialised Summary, whose values come after the scalars.
        """
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite
            floats = values.astype("<f4")
        self._content[self._floats] = floats.view(np.uint8).reshape(-1, 4)
        summary = self._content.tobytes() + more
        head = _WALL_TIME + struct.pack("<d", wall_time) + _STEP + _varint(step)
        return b"".join([head, _SUMMARY, _varint(len(summary)), summary])


def step_of_scalars(event: memoryview) -> int | None:
    """The step of an event that :class:`StepEvent` serialised; None of any other."""
    return _parsed(event, _SIMPLE_VALUE)


def is_image(event: memoryview) -> bool:
    """Whether an event's first value is an image."""
    return _parsed(event, _IMAGE) is not None


def _parsed(event: memoryview, kind: bytes) -> int | None:
    """An event's step if its first value is of that kind."""
    try:
        if event[:1] != _WALL_TIME:
            return None
        step, position = 0, 9
        if event[9:10] == _STEP:  # protocol buffers leave a step of 0 out
            step, position = _read_varint(event, 10)
        for key in (_SUMMARY, _VALUE, _TAG):
            if event[position : position + 1] != key:
                return None
            length, position = _read_varint(event, position + 1)
        return step if event[position + length : position + length + 1] == kind else None
    except IndexError:
        return None


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    """The number and where it ends."""
    number = shift = 0
    while True:
        byte = data[position]
        number |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return number, position

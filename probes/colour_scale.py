"""The colours of heat maps: cividis, whose lightness rises evenly for all colour vision and on grey paper."""

from __future__ import annotations

import numpy as np

NUM_COLOURS = 253
NOT_RECORDED, BLACK, WHITE = 0, 254, 255  # beside the colours 1 to 253

_SCALE = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838"]


def colour(share: float) -> tuple[int, int, int]:
    """Red, green and blue of a value that lies at ``share``, from 0 to 1, of the scale."""
    position = share * (len(_SCALE) - 1)
    index = min(int(position), len(_SCALE) - 2)
    left, right = (bytes.fromhex(colour) for colour in _SCALE[index : index + 2])
    red, green, blue = (round(a + (b - a) * (position - index)) for a, b in zip(left, right, strict=True))
    return red, green, blue


def palette() -> np.ndarray:
    """Red, green, blue of each index of a picture, uint8 [256, 3]; the first is left transparent."""
    colours = [colour(i / (NUM_COLOURS - 1)) for i in range(NUM_COLOURS)]
    return np.array([(0, 0, 0), *colours, (0, 0, 0), (255, 255, 255)], np.uint8)

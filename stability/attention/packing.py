"""Sequences of different lengths packed one behind the other, and their way to the reference and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Where packed sequences lie along the tokens.

    Attributes:
        query_offsets: [sequences + 1] integers on the device: sequence i holds the queries from entry i up to
            entry i + 1.
        key_offsets: Likewise for keys and values.
        max_tokens_q: Queries of the longest sequence, or more. What lies beyond is not computed.
        max_tokens_k: Likewise for keys.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    max_tokens_q: int
    max_tokens_k: int

"""Sequences of different lengths packed one behind the other, and their way to padded ones and back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stability.attention import reference
from stability.attention.validation import LogitTerms, can_be_read


@dataclass(frozen=True, eq=False)
class Packing:
    """Where packed sequences lie along the tokens.

    Attributes:
        query_offsets: [sequences + 1] int64 on the device: sequence i holds the queries from entry i up to
            entry i + 1.
        key_offsets: Likewise for keys and values.
        max_tokens_q: Queries of the longest sequence, or more. What lies beyond is not computed.
        max_tokens_k: Likewise for keys.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    max_tokens_q: int
    max_tokens_k: int

    @property
    def query_lengths(self) -> Tensor:
        """[sequences] int64."""
        return self.query_offsets.diff().clamp(0, self.max_tokens_q)

    @property
    def key_lengths(self) -> Tensor:
        """[sequences] int64."""
        return self.key_offsets.diff().clamp(0, self.max_tokens_k)

    def pad_queries(self, packed: Tensor) -> Tensor:
        """[1, heads, total_tokens, dim] → [sequences, heads, max_tokens_q, dim]; padding holds other rows."""
        return _pad(packed, self.query_offsets, self.max_tokens_q)

    def pad_keys(self, packed: Tensor) -> Tensor:
        """[1, heads, total_tokens, dim] → [sequences, heads, max_tokens_k, dim]."""
        return _pad(packed, self.key_offsets, self.max_tokens_k)

    def unpad_queries(self, padded: Tensor, total_tokens: int) -> Tensor:
        """[sequences, heads, max_tokens_q, dim] → [1, heads, total_tokens, dim]; zeros outside of them."""
        tokens = torch.arange(total_tokens, device=padded.device)
        # Which sequence a token belongs to: as many as have ended at or before it.
        sequence = torch.searchsorted(self.query_offsets[1:].contiguous(), tokens, right=True)
        is_outside = sequence >= padded.shape[0]
        sequence = sequence.clamp(max=padded.shape[0] - 1)
        position = tokens - self.query_offsets[sequence]
        is_outside = is_outside | (position < 0) | (position >= self.max_tokens_q)
        rows = padded.transpose(1, 2)[sequence, position.clamp(0, self.max_tokens_q - 1)]
        return rows.masked_fill(is_outside[:, None, None], 0.0).transpose(0, 1)[None]


def check_offsets(name: str, offsets: Tensor, packed: Tensor) -> Tensor:
    """Checks cumulative lengths, on the CPU their values too; elsewhere they are clamped.

    Args:
        name: The argument's name.
        offsets: [sequences + 1] integers.
        packed: [1, heads, total_tokens, dim], what they cut.

    Returns:
        int64, within 0 and total_tokens.

    Raises:
        TypeError: No integer tensor.
        ValueError: A wrong shape, value or device.
    """
    total_tokens = packed.shape[2]
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        got = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(f"`{name}` must be a tensor of int32 or int64; got {got}.")
    if offsets.ndim != 1 or offsets.shape[0] < 2:
        raise ValueError(f"`{name}` must have shape [sequences + 1]; got {tuple(offsets.shape)}.")
    if offsets.device != packed.device:
        raise ValueError(f"`{name}` must be on the device of `query`, {packed.device}; got {offsets.device}.")
    if can_be_read(offsets):
        if offsets[0] != 0 or offsets[-1] > total_tokens or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"`{name}` must rise from 0 to at most the {total_tokens} tokens there are; "
                f"got {offsets.tolist()}."
            )
        return offsets.long()
    return offsets.long().clamp(0, total_tokens)


def packed_reference(
    query: Tensor, key: Tensor, value: Tensor, terms: LogitTerms, packing: Packing
) -> Tensor:
    """The reference, on padded copies of packed sequences.

    Args:
        query: [1, heads, total_tokens_q, head_dim].
        key: [1, key_heads, total_tokens_k, head_dim].
        value: [1, key_heads, total_tokens_k, value_dim].
        terms: Scale, causal order and biases; `score_bias` is [1, 1, 1, total_tokens_k].
        packing: Where the sequences lie.

    Returns:
        [1, heads, total_tokens_q, value_dim]; zeros outside the sequences.
    """
    score_bias = terms.score_bias
    padded = replace(
        terms,
        key_lengths=packing.key_lengths,
        query_lengths=packing.query_lengths,
        score_bias=None if score_bias is None else packing.pad_keys(score_bias.mT).mT,
    )
    output = reference.sigmoid_attention(
        packing.pad_queries(query), packing.pad_keys(key), packing.pad_keys(value), padded, 0.0
    )
    return packing.unpad_queries(output, query.shape[2])


def _pad(packed: Tensor, offsets: Tensor, max_tokens: int) -> Tensor:
    tokens = offsets[:-1, None] + torch.arange(max_tokens, device=packed.device)
    rows = packed[0].transpose(0, 1)[tokens.clamp(0, packed.shape[2] - 1)]
    return rows.transpose(1, 2)

"""The arguments of an attention call in the one form that operators and kernels take."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stability.attention.packing import Packing
from stability.attention.validation import LogitTerms


class Operands(NamedTuple):
    """The tensors of a call, in the operators' order.

    Attributes:
        query: [batch, heads, tokens_q, head_dim]; packed: batch 1.
        key: [batch, key_heads, tokens_k, head_dim].
        value: [batch, key_heads, tokens_k, value_dim].
        bias: float32 [batch, heads]; packed: [sequences, heads].
        score_bias: float32 [batch or 1, tokens_k].
        key_lengths: int64 [batch].
        query_lengths: int64 [batch].
        query_offsets: int64 [sequences + 1], of packed sequences.
        key_offsets: Likewise.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    score_bias: Tensor | None
    key_lengths: Tensor | None
    query_lengths: Tensor | None
    query_offsets: Tensor | None
    key_offsets: Tensor | None

    @property
    def logit_arguments(self) -> dict[str, Tensor | None]:
        """What decides the logits beside query, key and scale, by the names every implementation takes."""
        return {
            "bias": self.bias,
            "score_bias": self.score_bias,
            "key_lengths": self.key_lengths,
            "query_lengths": self.query_lengths,
        }


def make_operands(
    query: Tensor, key: Tensor, value: Tensor, terms: LogitTerms, packing: Packing | None = None
) -> Operands:
    """Brings checked arguments into the operators' form, differentiably.

    Args:
        query: [batch, heads, tokens_q, head_dim]; packed: batch 1.
        key: [batch, key_heads, tokens_k, head_dim].
        value: [batch, key_heads, tokens_k, value_dim].
        terms: Checked lengths, scale and biases; packed: those of the padded sequences, without lengths.
        packing: Where packed sequences lie.

    Returns:
        The operands.
    """
    bias = terms.bias
    if isinstance(bias, Tensor) and bias.device == query.device:
        bias = bias.float()
    elif isinstance(bias, Tensor):  # 0-d, on the CPU; adding it copies nothing and keeps its gradient
        bias = torch.zeros((), dtype=torch.float32, device=query.device) + bias.float()
    else:
        bias = torch.full((), bias, dtype=torch.float32, device=query.device)
    batch = query.shape[0] if packing is None else packing.query_offsets.shape[0] - 1
    if bias.ndim:
        bias = bias.flatten(-3)  # [heads, 1, 1] or [batch, 1 or heads, 1, 1]
    bias = bias.expand(batch, query.shape[1])
    score_bias = terms.score_bias
    if score_bias is not None:
        score_bias = score_bias[:, 0, 0].float()
        if score_bias.stride(1) != 1:
            score_bias = score_bias.contiguous()
    return Operands(
        query,
        key,
        value,
        bias,
        score_bias,
        terms.key_lengths,
        terms.query_lengths,
        packing.query_offsets if packing is not None else None,
        packing.key_offsets if packing is not None else None,
    )

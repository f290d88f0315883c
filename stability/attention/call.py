"""What one attention call is, for those who only want to look at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Mechanism = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """The arguments of one attention call that decide its weights.

    Value and dropout are left out: they do not enter the row Jacobian ∂weights/∂logits. The fields carry
    the parameter names of :func:`stability.attention_statistics`, so that
    ``attention_statistics(**vars(call), rows=64)`` measures the call. The tensors are the caller's own,
    still attached to the graph: do not keep a call beyond its observer.

    Attributes:
        mechanism: "softmax" or "sigmoid".
        query: [batch, heads, tokens_q, head_dim].
        key: [batch, heads or key_value_heads, tokens_k, head_dim].
        attn_mask: Boolean (True takes part) or added to the logits; broadcastable to
            [batch, heads, tokens_q, tokens_k].
        is_causal: Whether query i sees the keys j ≤ i only (top-left aligned).
        scale: Factor of q·k; None means 1/√head_dim.
        enable_gqa: Whether groups of query heads share a key head.
        key_lengths: [batch] numbers of valid keys.
        query_lengths: [batch] numbers of valid queries.
        bias: Sigmoid only; None means −ln(key_lengths).
        score_bias: Sigmoid only; [tokens_k] or [batch, tokens_k], added to the logits.

    Example:
        >>> import torch, stability
        >>> query = torch.zeros(1, 2, 3, 4)
        >>> call = AttentionCall("softmax", query, key=query, is_causal=True)
        >>> stability.attention_statistics(**vars(call)).entropy[0, 0].exp()  # of 1, 2 and 3 keys
        tensor([1., 2., 3.])
    """

    mechanism: Mechanism
    query: Tensor
    key: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    key_lengths: Tensor | Sequence[int] | None = None
    query_lengths: Tensor | Sequence[int] | None = None
    bias: float | Tensor | None = None
    score_bias: Tensor | None = None

"""From q·k to the logits: masks, causal order, padding, per-key bias."""

from __future__ import annotations

import torch
from torch import Tensor

from stability.attention.validation import LogitTerms

NEGATIVE_INFINITY = float("-inf")


def add_logit_terms_(logits: Tensor, terms: LogitTerms, rows: Tensor) -> Tensor:
    """Adds masks and per-key bias to scaled products q·k, in place; excluded keys become −inf.

    Sigmoid's `bias` is left to the caller. A padded query row excludes every key. Exclusion comes last, so
    that NaN in the padding of a float mask is overwritten and has gradient zero.

    Args:
        logits: [batch, heads, rows, tokens_k], scaled products.
        terms: Their `attn_mask` must already hold the given rows only.
        rows: [batch or 1, rows], the rows' positions among the queries.

    Returns:
        The same tensor.
    """
    position = rows[:, None, :, None]
    keys = torch.arange(logits.shape[-1], device=logits.device)
    mask = terms.attn_mask
    if mask is not None and mask.dtype is not torch.bool:
        logits.add_(mask)
    if terms.score_bias is not None:
        logits.add_(terms.score_bias)
    if mask is not None and mask.dtype is torch.bool:
        logits.masked_fill_(~mask, NEGATIVE_INFINITY)
    if terms.is_causal:
        logits.masked_fill_(keys > position, NEGATIVE_INFINITY)
    if terms.key_lengths is not None:
        logits.masked_fill_(keys >= terms.key_lengths[:, None, None, None], NEGATIVE_INFINITY)
    if terms.query_lengths is not None:
        logits.masked_fill_(position >= terms.query_lengths[:, None, None, None], NEGATIVE_INFINITY)
    return logits

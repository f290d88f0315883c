"""Softmax attention by torch's own fused kernels: which calls they compute, and how padding is given to them.

Dense calls go to `scaled_dot_product_attention`, whose backend (FlashAttention, cuDNN, memory-efficient)
stays torch's choice and obeys `torch.nn.attention.sdpa_kernel`. Calls with lengths go to `varlen_attn`
(FlashAttention), whose cumulative lengths have to cover all tokens: a sequence's padding becomes a few short
sequences behind it, whose results nobody sees. So nothing is packed, nothing waits for the device to know how
much there is to pack, and cost follows the valid tokens but for that rest.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from stability.attention.dispatch import HALF, MAX_HEAD_DIM, is_transformed, why_not_ampere
from stability.attention.validation import LogitTerms, padding_of

# A sequence's padding in eight pieces costs at most an eighth of what it would as one.
PADDING_PIECES = 8


def why_not_fused(
    query: Tensor, key: Tensor, value: Tensor, terms: LogitTerms, dropout_p: float
) -> str | None:
    """Why torch's fused kernels cannot compute a call with the meanings of ours, or None if they can.

    Args:
        query: [batch, heads, tokens_q, head_dim].
        key: [batch, key_heads, tokens_k, head_dim].
        value: [batch, key_heads, tokens_k, value_dim].
        terms: Checked masks, lengths and scale.
        dropout_p: Probability of dropping a weight.

    Returns:
        The first reason, as the part of a sentence.
    """
    if (reason := why_not_ampere(query.device.type, query.device.index)) is not None:
        return reason
    if query.dtype not in HALF:
        return f"fused kernels take float16 and bfloat16, not {query.dtype}"
    if terms.attn_mask is not None:
        return "fused kernels disagree about rows that an `attn_mask` empties"
    if query.shape[3] != value.shape[3] or query.shape[3] > MAX_HEAD_DIM:
        return f"head dimensions must be equal and at most {MAX_HEAD_DIM}"
    if is_transformed():
        return "torch.func transforms and forward-mode differentiation go through the reference"
    if terms.key_lengths is not None or terms.query_lengths is not None:
        return _why_not_varlen(query, key, terms, dropout_p)
    if terms.is_causal and query.shape[2] != key.shape[2]:
        return "fused kernels disagree about causal order between different numbers of queries and keys"
    return None


def attend(query: Tensor, key: Tensor, value: Tensor, terms: LogitTerms, dropout_p: float) -> Tensor:
    """softmax(scale · Q Kᵀ) V of a call that `why_not_fused` has nothing against.

    Args:
        query: [batch, heads, tokens_q, head_dim].
        key: [batch, key_heads, tokens_k, head_dim].
        value: [batch, key_heads, tokens_k, head_dim].
        terms: Checked lengths and scale.
        dropout_p: Probability of dropping a weight.

    Returns:
        [batch, heads, tokens_q, head_dim] in the inputs' dtype.
    """
    if terms.key_lengths is not None or terms.query_lengths is not None:
        return _varlen(query, key, value, terms)
    # The operator itself: torch.nn.functional's name is a stand-in while probes are attached, and this call
    # has been reported.
    return torch.ops.aten.scaled_dot_product_attention(
        query,
        key,
        value,
        None,
        dropout_p,
        terms.is_causal,
        scale=terms.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _why_not_varlen(query: Tensor, key: Tensor, terms: LogitTerms, dropout_p: float) -> str | None:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "lengths need torch 2.10 or newer"
    if terms.is_causal:
        return "FlashAttention aligns causal order at the last token of each sequence, not at the first"
    if dropout_p > 0:
        return "FlashAttention over lengths has no dropout"
    if query.shape[3] % 8:
        return f"FlashAttention over lengths takes head dimensions that 8 divides, not {query.shape[3]}"
    if query.shape[1] != key.shape[1]:
        return "FlashAttention over lengths takes no grouped key heads"
    if not math.isclose(terms.scale, query.shape[3] ** -0.5, rel_tol=1e-6):
        return "FlashAttention over lengths takes no `scale` in every version of torch"
    return None


def _varlen(query: Tensor, key: Tensor, value: Tensor, terms: LogitTerms) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, tokens_q, head_dim = query.shape
    tokens_k = key.shape[2]
    padding = padding_of(query, terms.query_lengths)
    boundaries = _boundaries(terms.query_lengths, batch, tokens_q, query.device)
    if terms.query_lengths is terms.key_lengths:
        key_padding, key_boundaries = padding, boundaries
    else:
        key_padding = padding_of(key, terms.key_lengths)
        key_boundaries = _boundaries(terms.key_lengths, batch, tokens_k, query.device)
    # Cleared first: 0 · NaN would bring the padding's garbage into the gradients.
    query, key, value = _clear(query, padding), _clear(key, key_padding), _clear(value, key_padding)
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    output: Any = varlen_attn(
        query,
        key,
        value,
        boundaries,
        key_boundaries,
        tokens_q,
        tokens_k,
    )
    return _clear(output.view(batch, tokens_q, heads, head_dim).transpose(1, 2), padding)


def _clear(tensor: Tensor, padding: Tensor | None) -> Tensor:
    """Zeros in the padding. Unlike `masked_fill` in one pass, and in the tensor's own order of axes."""
    return tensor if padding is None else torch.where(padding, 0.0, tensor)


def _boundaries(lengths: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    """[batch · (PADDING_PIECES + 1) + 1] int32: where each sequence begins, and each piece of its padding."""
    starts = torch.arange(batch, device=device) * tokens
    ends = starts + (tokens if lengths is None else lengths)
    piece = torch.arange(PADDING_PIECES, device=device)
    padding = (starts + tokens - ends)[:, None] * piece // PADDING_PIECES
    boundaries = torch.cat([starts[:, None], ends[:, None] + padding], dim=1).flatten()
    return torch.cat([boundaries, boundaries.new_full((1,), batch * tokens)]).to(torch.int32)

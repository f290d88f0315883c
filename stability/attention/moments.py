"""Statistics of attention rows with O(tokens) memory: by the streaming kernel or in chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from stability.attention.call import Mechanism
from stability.attention.logits import NEGATIVE_INFINITY, add_logit_terms_
from stability.attention.rows import SelectedRows
from stability.attention.streaming import can_stream, stream_row_statistics
from stability.attention.validation import LogitTerms, logit_dtype
from stability.jacobian import softmax_row_spectral_norm
from stability.row_moments import sigmoid_derivative, softmax_row_entropy, softmax_row_moments

# Logits held at a time: 16 MiB in float32, and about ten temporaries of that size.
_CHUNK_ELEMENTS = 2**22

# A weight above this has a derivative below 0.01 and can hardly move any more. Only the upper end counts:
# with the bias −ln n a healthy weight is about 1/n, so small weights are how sigmoid attention works.
SATURATED_WEIGHT = 0.99


def row_quantities(
    query: Tensor,
    key: Tensor,
    mechanism: Mechanism,
    terms: LogitTerms,
    selected: SelectedRows,
    *,
    exact_spectral: bool,
) -> dict[str, Tensor]:
    """The statistics of the selected rows, by the kernel where it can be used, else in chunks of rows.

    Args:
        query: [batch, heads, tokens_q, head_dim].
        key: [batch, key_value_heads, tokens_k, head_dim].
        mechanism: "softmax" or "sigmoid".
        terms: Checked masks, lengths, scale and biases.
        selected: Rows to measure; a row of weight 0 counts as a row without keys.
        exact_spectral: For softmax, solve the secular equation instead of taking the bound.

    Returns:
        The statistics of `AttentionStatistics` under their names, each [batch, heads, num_rows].
    """
    is_sigmoid = mechanism == "sigmoid"
    if can_stream(query) and (is_sigmoid or not exact_spectral):  # the exact norm rereads the logits
        saturated_weight = SATURATED_WEIGHT if is_sigmoid else None
        return stream_row_statistics(query, key, terms, selected, saturated_weight=saturated_weight)
    chunks = [
        sigmoid_quantities(logits, terms.bias) if is_sigmoid else softmax_quantities(logits, exact_spectral)
        for logits in _logit_chunks(query, key, terms, selected)
    ]
    if len(chunks) == 1:
        return chunks[0]
    return {name: torch.cat([chunk[name] for chunk in chunks], dim=2) for name in chunks[0]}


def softmax_quantities(logits: Tensor, exact_spectral: bool) -> dict[str, Tensor]:
    """Statistics [...] of softmax rows [..., keys]; −inf marks an excluded key."""
    moments = softmax_row_moments(logits)
    return {
        "max_logit": moments.max_logit,
        "log_sum_exp": moments.log_sum_exp,
        "entropy": moments.entropy,
        "jacobian_frobenius": moments.frobenius,
        "jacobian_spectral": softmax_row_spectral_norm(logits, moments)
        if exact_spectral
        else moments.spectral_upper_bound,
        "off_diagonal_share": moments.off_diagonal_share,
        "trace": moments.trace,
        "derivative_max": moments.derivative_max,
    }


def sigmoid_quantities(logits: Tensor, bias: float | Tensor) -> dict[str, Tensor]:
    """Statistics [...] of sigmoid rows [..., keys] of logits without the bias, which broadcasts."""
    max_logit = logits.amax(dim=-1)
    num_keys = (logits != NEGATIVE_INFINITY).sum(dim=-1)
    logits = logits + bias
    weights = logits.sigmoid()
    derivative = sigmoid_derivative(logits)
    derivative_max = derivative.amax(dim=-1)
    # In units of the largest: squares of a saturated row's derivatives would underflow.
    unit = torch.where(derivative_max > 0, derivative_max, torch.ones_like(derivative_max))
    return {
        "max_logit": max_logit,
        # s/Σs is the softmax of ln s, whose entropy stays accurate when one weight holds nearly everything.
        "entropy": softmax_row_entropy(functional.logsigmoid(logits)),
        "jacobian_frobenius": unit * torch.linalg.vector_norm(derivative / unit.unsqueeze(-1), dim=-1),
        "jacobian_spectral": derivative_max,
        "off_diagonal_share": torch.zeros_like(derivative_max),
        "trace": derivative.sum(dim=-1),
        "derivative_max": derivative_max,
        "row_sum": weights.sum(dim=-1),
        "saturated_share": (weights > SATURATED_WEIGHT).sum(dim=-1) / num_keys.clamp(min=1),
    }


def _logit_chunks(query: Tensor, key: Tensor, terms: LogitTerms, selected: SelectedRows) -> Iterator[Tensor]:
    """Logits [batch, heads, chunk, tokens_k] of the selected rows, without sigmoid's bias.

    The products are taken in float64 and rounded once. No setting for reduced-precision float32 products
    (TF32, bfloat16) reaches them, and none has to be switched for the rest of the process.
    """
    batch, heads, tokens_q, _ = query.shape
    key_heads, tokens_k = key.shape[1], key.shape[2]
    product_dtype = torch.float32 if query.device.type == "mps" else torch.float64
    key = key.to(product_dtype).mT
    chunk = max(1, _CHUNK_ELEMENTS // (batch * heads * tokens_k))
    for rows, weights in zip(
        selected.rows.split(chunk, dim=1), selected.weights.split(chunk, dim=1), strict=True
    ):
        index = rows[:, None, :, None]
        chosen = query.gather(2, index.expand(-1, heads, -1, query.shape[3])).to(product_dtype) * terms.scale
        # The query heads of a group are more rows for the key head they share.
        products = chosen.reshape(batch, key_heads, -1, query.shape[3]) @ key
        logits = products.view(batch, heads, -1, tokens_k).to(logit_dtype(query.dtype))
        mask = terms.attn_mask
        if mask is not None and mask.shape[2] == tokens_q:
            mask = mask.expand(batch, -1, -1, -1)
            mask = mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[3]))
        add_logit_terms_(logits, replace(terms, attn_mask=mask), rows)
        if mask is not None and mask.dtype is not torch.bool:
            # Many models mask with the most negative number instead of −inf.
            logits.masked_fill_(logits < torch.finfo(mask.dtype).min / 2, NEGATIVE_INFINITY)
        yield logits.masked_fill_((weights == 0)[:, None, :, None], NEGATIVE_INFINITY)

"""What attention rows are reduced to, with O(tokens) memory: by the streaming kernel or in chunks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from stability.attention.logits import NEGATIVE_INFINITY, add_logit_terms_
from stability.attention.rows import SelectedRows
from stability.attention.streaming import can_stream, stream_row_moments
from stability.attention.validation import LogitTerms, logit_dtype
from stability.jacobian import softmax_row_spectral_norm
from stability.row_moments import SoftmaxRowMoments, sigmoid_derivative, softmax_row_moments

# Logits held at a time: 16 MiB in float32, and about ten temporaries of that size.
_CHUNK_ELEMENTS = 2**22

# A weight above this has a derivative below 0.01 and can hardly move any more. Only the upper end counts:
# with the bias −ln n a healthy weight is about 1/n, so small weights are how sigmoid attention works.
SATURATED_WEIGHT = 0.99


class SigmoidRowMoments(NamedTuple):
    """Sums over one row of sigmoid logits; each field is [batch, heads, num_rows].

    Attributes:
        max_logit: Largest logit without the bias, so that it compares with softmax; −inf without a key.
        entropy: Entropy in nats of the weights divided by their sum.
        row_sum: Σ s.
        saturated_share: Share of the allowed keys with s above 0.99.
        derivative_max: max s(1 − s).
        derivative_sum: Σ s(1 − s).
        derivative_norm: √Σ (s(1 − s))².
    """

    max_logit: Tensor
    entropy: Tensor
    row_sum: Tensor
    saturated_share: Tensor
    derivative_max: Tensor
    derivative_sum: Tensor
    derivative_norm: Tensor


def softmax_moments(
    query: Tensor, key: Tensor, terms: LogitTerms, selected: SelectedRows, *, exact_spectral: bool
) -> tuple[SoftmaxRowMoments, Tensor]:
    """Moments of the selected softmax rows, and the spectral norms of their Jacobians.

    Args:
        query: [batch, heads, tokens_q, head_dim].
        key: [batch, key_value_heads, tokens_k, head_dim].
        terms: Checked masks, lengths and scale.
        selected: Rows to measure; a row of weight 0 counts as a row without keys.
        exact_spectral: Solve the secular equation instead of taking the bound the moments give.

    Returns:
        Moments and spectral norms, each [batch, heads, num_rows].
    """
    if can_stream(query) and not exact_spectral:  # the exact norm rereads the logits
        streamed, _ = stream_row_moments(query, key, terms, selected, saturated_weight=None)
        return streamed, streamed.spectral_upper_bound
    moments, spectral = [], []
    for logits in _logit_chunks(query, key, terms, selected):
        moments.append(softmax_row_moments(logits))
        if exact_spectral:
            spectral.append(softmax_row_spectral_norm(logits, moments[-1]))
        else:
            spectral.append(moments[-1].spectral_upper_bound)
    return SoftmaxRowMoments(*_concatenate(moments)), torch.cat(spectral, dim=2)


def sigmoid_moments(
    query: Tensor, key: Tensor, terms: LogitTerms, selected: SelectedRows
) -> SigmoidRowMoments:
    """Moments of the selected sigmoid rows.

    Args:
        query: [batch, heads, tokens_q, head_dim].
        key: [batch, key_value_heads, tokens_k, head_dim].
        terms: Checked masks, lengths, scale and biases.
        selected: Rows to measure; a row of weight 0 counts as a row without keys.

    Returns:
        Moments, each [batch, heads, num_rows].
    """
    if can_stream(query):
        normalised, sums = stream_row_moments(query, key, terms, selected, saturated_weight=SATURATED_WEIGHT)
        max_logit, *rest = sums
        max_logit = torch.where(normalised.entropy.isnan(), normalised.entropy, max_logit)
        return SigmoidRowMoments(max_logit, normalised.entropy, *rest)
    return SigmoidRowMoments(
        *_concatenate(
            [
                _sigmoid_row_moments(logits, terms.bias)
                for logits in _logit_chunks(query, key, terms, selected)
            ]
        )
    )


def _sigmoid_row_moments(logits: Tensor, bias: float | Tensor) -> SigmoidRowMoments:
    max_logit = logits.amax(dim=-1)
    num_keys = (logits != NEGATIVE_INFINITY).sum(dim=-1)
    logits = logits + bias
    weights = logits.sigmoid()
    derivative = sigmoid_derivative(logits)
    derivative_max = derivative.amax(dim=-1)
    # In units of the largest: squares of a saturated row's derivatives would underflow.
    unit = torch.where(derivative_max > 0, derivative_max, torch.ones_like(derivative_max))
    return SigmoidRowMoments(
        max_logit=max_logit,
        # s/Σs is the softmax of ln s, whose moments stay accurate when one weight holds nearly everything.
        entropy=softmax_row_moments(functional.logsigmoid(logits)).entropy,
        row_sum=weights.sum(dim=-1),
        saturated_share=(weights > SATURATED_WEIGHT).sum(dim=-1) / num_keys.clamp(min=1),
        derivative_max=derivative_max,
        derivative_sum=derivative.sum(dim=-1),
        derivative_norm=unit * torch.linalg.vector_norm(derivative / unit.unsqueeze(-1), dim=-1),
    )


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


def _concatenate(chunks: list) -> list[Tensor]:
    return [torch.cat(field, dim=2) for field in zip(*chunks, strict=True)]

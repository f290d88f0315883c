"""Both mechanisms in plain PyTorch: every combination of arguments, every device, twice differentiable.

This is the oracle that kernels are tested against. Time and memory are O(tokens_q · tokens_k); what a call
keeps for the backward pass is one weight matrix, float32 for half-precision inputs, plus boolean masks.

Padding is cleared *before* the products: a weight of zero does not silence it, since 0 · NaN = NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, softmax  # by name: attention written by hand is observed where it calls softmax
from torch.nn import functional

from stability.attention.logits import NEGATIVE_INFINITY, add_logit_terms_
from stability.attention.validation import LogitTerms, logit_dtype, padding_of


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, terms: LogitTerms, dropout_p: float
) -> Tensor:
    """softmax(scale · Q Kᵀ + masks) V; a row without an allowed key gives zeros.

    Args:
        query: [batch, heads, tokens_q, head_dim].
        key: [batch, key_value_heads, tokens_k, head_dim].
        value: [batch, key_value_heads, tokens_k, value_dim].
        terms: Checked masks, lengths and scale.
        dropout_p: Probability of dropping a weight.

    Returns:
        [batch, heads, tokens_q, value_dim] in the inputs' dtype.
    """
    query, key, value = _clear_padding(query, key, value, terms)
    logits = _logits(query, key, terms)
    # Causal order alone leaves every row its own key, so only masks and padding can empty a row.
    if terms.attn_mask is None and terms.key_lengths is None and terms.query_lengths is None:
        return _weighted_sum(softmax(logits, dim=-1), value, dropout_p)
    is_empty = logits.detach().amax(dim=-1, keepdim=True) == NEGATIVE_INFINITY
    # The softmax of an empty row is 0/0, whose NaN would reach the gradients of key and value.
    weights = softmax(logits.masked_fill_(is_empty, 0.0), dim=-1)
    return _weighted_sum(weights, value, dropout_p).masked_fill(is_empty, 0.0)


def sigmoid_attention(
    query: Tensor, key: Tensor, value: Tensor, terms: LogitTerms, dropout_p: float
) -> Tensor:
    """σ(scale · Q Kᵀ + masks + bias) V.

    Args:
        query: [batch, heads, tokens_q, head_dim].
        key: [batch, key_value_heads, tokens_k, head_dim].
        value: [batch, key_value_heads, tokens_k, value_dim].
        terms: Checked masks, lengths, scale and biases.
        dropout_p: Probability of dropping a weight.

    Returns:
        [batch, heads, tokens_q, value_dim] in the inputs' dtype.
    """
    query, key, value = _clear_padding(query, key, value, terms)
    output = _weighted_sum(_logits(query, key, terms).add_(terms.bias).sigmoid_(), value, dropout_p)
    is_padding = padding_of(query, terms.query_lengths)
    return output if is_padding is None else output.masked_fill(is_padding, 0.0)


def _clear_padding(
    query: Tensor, key: Tensor, value: Tensor, terms: LogitTerms
) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros in place of padding, and key and value heads repeated to the number of query heads."""
    if (is_padding := padding_of(query, terms.query_lengths)) is not None:
        query = query.masked_fill(is_padding, 0.0)
    if (is_padding := padding_of(key, terms.key_lengths)) is not None:
        key = key.masked_fill(is_padding, 0.0)
        value = value.masked_fill(is_padding, 0.0)
    if (group := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    return query, key, value


def _logits(query: Tensor, key: Tensor, terms: LogitTerms) -> Tensor:
    """Logits without sigmoid's bias; the scale goes into the query to save a pass over the n × n products."""
    dtype = logit_dtype(query.dtype)
    rows = torch.arange(query.shape[2], device=query.device)[None]
    products = (query.to(dtype) * terms.scale) @ key.to(dtype).mT
    if torch._C._are_functorch_transforms_active():
        products = _mapped_over(products, terms)
    return add_logit_terms_(products, terms, rows)


def _mapped_over(products: Tensor, terms: LogitTerms) -> Tensor:
    """The same, mapped over by torch.func.vmap wherever a term is: only then can that be added in place."""
    lengths = (x[:, None, None, None] for x in (terms.key_lengths, terms.query_lengths) if x is not None)
    for term in (terms.attn_mask, terms.score_bias, terms.bias, *lengths):
        if isinstance(term, Tensor):
            products = products.masked_fill(torch.zeros_like(term, dtype=torch.bool), 0.0)
    return products


def _weighted_sum(weights: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    if dropout_p > 0:
        weights = functional.dropout(weights, dropout_p)
    if weights.dtype == value.dtype:
        return weights @ value
    return _RoundedProduct.apply(weights, value)


class _RoundedProduct(torch.autograd.Function):
    """weights.to(value.dtype) @ value that keeps the weights unrounded.

    Softmax and sigmoid keep their float32 output anyway. The plain expression would keep the rounded copy as
    well, half as much memory again: 26 GB over 12 layers of 16 heads and 8,192 tokens.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, value: Tensor) -> Tensor:
        return weights.to(value.dtype) @ value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weights, value = ctx.saved_tensors
        return (grad @ value.mT).to(weights.dtype), weights.to(value.dtype).mT @ grad

    @staticmethod
    def jvp(ctx: Any, weights_tangent: Tensor, value_tangent: Tensor) -> Tensor:
        weights, value = ctx.saved_tensors
        return weights_tangent.to(value.dtype) @ value + weights.to(value.dtype) @ value_tangent

"""Second derivatives of sigmoid attention, which no kernel computes: the reference, differentiated twice."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from stability.attention import reference
from stability.attention.operands import Operands
from stability.attention.packing import Packing, packed_reference
from stability.attention.validation import LogitTerms


def differentiate_twice(
    inputs: Sequence[Tensor | None],
    grads_of_gradients: Sequence[Tensor],
    needs: Sequence[bool],
    options: dict[str, Any],
) -> tuple[Tensor | None, ...]:
    """Gradients of Σ ⟨gradients, grads_of_gradients⟩ with respect to what the gradients were computed from.

    By torch.func, whose results can be differentiated again and mapped over by ``torch.vmap``.

    Args:
        inputs: The output's gradient and the operands, in the backward operator's order.
        grads_of_gradients: Of query, key, value, bias and score_bias; empty for a gradient nobody asked for.
        needs: Which inputs need a gradient.
        options: `scale`, `is_causal`, `max_tokens_q` and `max_tokens_k` of the call.

    Returns:
        As many gradients as there are inputs, None where none is needed.
    """
    _warn_of_the_cost()
    grad_output, *tensors = inputs
    at = [i for i, tensor in enumerate(tensors) if tensor is not None and tensor.is_floating_point()]
    primals: list[Any] = [grad_output, *(tensors[i] for i in at)]

    def output(*operands: Tensor) -> Tensor:
        placed: list[Any] = list(tensors)
        for i, operand in zip(at, operands, strict=True):
            placed[i] = operand
        return _reference(Operands(*placed), options)

    def gradients(grad_output: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(output, *operands)[1](grad_output)

    # Empty where nobody asked for a gradient.
    weights = tuple(
        grads_of_gradients[i] if grads_of_gradients[i].numel() else torch.zeros_like(tensor)
        for i, tensor in zip(at, primals[1:], strict=True)
    )
    second = dict(
        zip([0, *(i + 1 for i in at)], torch.func.vjp(gradients, *primals)[1](weights), strict=True)
    )
    return tuple(second[i] if is_needed else None for i, is_needed in enumerate(needs))


@cache
def _warn_of_the_cost() -> None:
    warnings.warn(
        "Second derivatives of sigmoid_attention go through the reference. Their time and "
        "memory are those of the tokens_q × tokens_k matrix, several times over. This is said once.",
        stacklevel=2,
    )


def _reference(operands: Operands, options: dict[str, Any]) -> Tensor:
    """What the operator computes, in plain PyTorch."""
    score_bias = operands.score_bias
    terms = LogitTerms(
        scale=options["scale"],
        is_causal=options["is_causal"],
        attn_mask=None,
        key_lengths=operands.key_lengths,
        query_lengths=operands.query_lengths,
        bias=operands.bias[:, :, None, None],
        score_bias=None if score_bias is None else score_bias[:, None, None],
    )
    query, key, value = operands[:3]
    if operands.query_offsets is None or operands.key_offsets is None:
        return reference.sigmoid_attention(query, key, value, terms, 0.0)
    packing = Packing(
        operands.query_offsets, operands.key_offsets, options["max_tokens_q"], options["max_tokens_k"]
    )
    return packed_reference(query, key, value, terms, packing)

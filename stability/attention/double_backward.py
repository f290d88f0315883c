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

    Args:
        inputs: The output's gradient and the operands, in the backward operator's order.
        grads_of_gradients: Of query, key, value, bias and score_bias; empty for a gradient nobody asked for.
        needs: Which inputs need a gradient.
        options: `scale`, `is_causal`, `max_tokens_q` and `max_tokens_k` of the call.

    Returns:
        As many gradients as there are inputs, None where none is needed.
    """
    _warn_of_the_cost()
    with torch.enable_grad():
        copies = [
            tensor.detach().requires_grad_(tensor.is_floating_point()) if tensor is not None else None
            for tensor in inputs
        ]
        grad_output, operands = copies[0], Operands(*copies[1:])  # type: ignore[arg-type]
        # The gradients that were asked for, beside the weight each has in the sum.
        pairs = [
            (tensor, weight)
            for tensor, weight in zip(operands, grads_of_gradients, strict=False)
            if tensor is not None and weight.numel()
        ]
        output = _reference(operands, options)
        gradients = torch.autograd.grad(
            output, [tensor for tensor, _ in pairs], grad_output, create_graph=True
        )
        total = torch.stack(
            [(gradient * weight).sum() for gradient, (_, weight) in zip(gradients, pairs, strict=True)]
        ).sum()
        needed = [tensor for tensor, is_needed in zip(copies, needs, strict=True) if is_needed]
        second = iter(torch.autograd.grad(total, needed, allow_unused=True))  # type: ignore[arg-type]
    return tuple(next(second) if is_needed else None for is_needed in needs)


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

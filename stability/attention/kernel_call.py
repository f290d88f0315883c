"""What the operators of sigmoid attention do on real memory: choose a kernel and call it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stability.attention.dispatch import refuse, why_not_hopper
from stability.attention.operands import Operands
from stability.attention.packing import Packing


def choose_kernel(
    operands: Operands,
    implementation: str,
    *,
    scale: float,
    is_causal: bool,
    is_fast: bool,
    needs_statistics: bool,
) -> tuple[str, dict[str, str]]:
    """The second half of the rule in `stability.attention.dispatch`: "hopper" or "triton", on real memory.

    Args:
        operands: The tensors.
        implementation: "auto", "hopper" or "triton".
        scale: Factor of q·k.
        is_causal: Whether query i sees the keys j ≤ i only.
        is_fast: Whether σ may come from tanh.approx.
        needs_statistics: Whether statistics of the rows are asked for.

    Returns:
        The implementation's name, and the reason against "hopper" if "auto" passed over it.

    Raises:
        ValueError: "hopper" was asked for by name and cannot compute this.
    """
    if implementation == "triton":
        return "triton", {}
    reason = why_not_hopper(
        operands.query,
        operands.key,
        operands.value,
        is_packed=operands.query_offsets is not None,
        needs_statistics=needs_statistics,
        scale=scale,
        **operands.logit_arguments,
        is_causal=is_causal,
        is_fast=is_fast,
    )
    if reason is None and implementation == "auto":
        from stability.attention import hopper

        reason = hopper.why_only_by_name()
    if reason is None:
        return "hopper", {}
    if implementation == "hopper":
        raise refuse({"hopper": reason})
    return "triton", {"hopper": reason}


def compute_forward(*tensors: Any, needs_statistics: bool, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `stability::sigmoid_attention`: the operator's arguments, and its results.

    Returns:
        Output [batch, heads, tokens_q, value_dim] in the query's dtype, and the statistics of the rows.

    Raises:
        ValueError: "hopper" was asked for by name and cannot compute this.
    """
    operands, (row_sum, derivative_max) = Operands(*tensors), empty_statistics(tensors[0], needs_statistics)
    module, arguments = _prepare(operands, needs_statistics=needs_statistics, **options)
    if needs_statistics:
        arguments["statistics"] = row_sum, derivative_max
    with torch.cuda.device_of(operands.query):  # Triton launches on the current device
        output = module.forward(operands.query, operands.key, operands.value, **arguments)
    return output, row_sum, derivative_max


def compute_backward(
    grad_output: Tensor,
    *tensors: Any,
    needs_bias_grad: bool,
    needs_score_bias_grad: bool,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Computes `stability::sigmoid_attention_backward`: the operator's arguments, and its results.

    Returns:
        Gradients of query, key, value, bias and score_bias, each like its tensor; of the last two empty where
        not needed.

    Raises:
        ValueError: "hopper" was asked for by name and cannot compute this.
    """
    operands = Operands(*tensors)
    module, arguments = _prepare(operands, needs_statistics=False, **options)
    with torch.cuda.device_of(operands.query):
        gradients = module.backward(
            grad_output,
            operands.query,
            operands.key,
            operands.value,
            **arguments,
            is_deterministic=torch.are_deterministic_algorithms_enabled(),
            needs_bias_grad=needs_bias_grad,
            needs_score_bias_grad=needs_score_bias_grad,
        )
    return tuple(operands.bias.new_empty(0) if grad is None else grad for grad in gradients)


def _prepare(
    operands: Operands,
    *,
    max_tokens_q: int,
    max_tokens_k: int,
    scale: float,
    is_causal: bool,
    is_fast: bool,
    implementation: str,
    needs_statistics: bool,
) -> tuple[ModuleType, dict[str, Any]]:
    """The implementation's module, and what its functions take beside query, key and value."""
    chosen, _ = choose_kernel(
        operands,
        implementation,
        scale=scale,
        is_causal=is_causal,
        is_fast=is_fast,
        needs_statistics=needs_statistics,
    )
    arguments: dict[str, Any] = {
        "scale": scale,
        **operands.logit_arguments,
        "is_causal": is_causal,
        "is_fast": is_fast,
    }
    if chosen == "hopper":
        from stability.attention import hopper

        return hopper, arguments
    from stability.attention.triton import sigmoid

    if operands.query_offsets is not None and operands.key_offsets is not None:
        arguments["packing"] = Packing(
            operands.query_offsets, operands.key_offsets, max_tokens_q, max_tokens_k
        )
    return sigmoid, arguments


def empty_statistics(query: Tensor, needs_statistics: bool) -> tuple[Tensor, Tensor]:
    """Where the statistics of the rows go: zeros float32 [batch, heads, tokens_q], or empty if unasked."""
    make, shape = (query.new_zeros, query.shape[:3]) if needs_statistics else (query.new_empty, (0,))
    return make(shape, dtype=torch.float32), make(shape, dtype=torch.float32)

"""Sigmoid attention by a kernel, as torch operators: ``stability::sigmoid_attention`` and its backward.

An operator has a fake kernel, so torch.compile traces through it without running it, and a registered
derivative. The backward operator has one as well: second derivatives are computed by the reference, which
holds the n × n weights, and this is said once.

Statistics of the rows. An implementation asked for statistics also fills, for every query row,

    row_sum          Σⱼ σ(xᵢⱼ)                    float32 [batch, heads, tokens_q]
    derivative_max   maxⱼ σ(xᵢⱼ)(1 − σ(xᵢⱼ))      float32 [batch, heads, tokens_q]

over the keys the row sees, from the unrounded weights; 0 in padding and for rows that see no key. They come
from the pass that computes the output and have no gradient. Unasked, both come back empty.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stability.attention.dispatch import refuse, why_not_hopper
from stability.attention.double_backward import differentiate_twice
from stability.attention.layout import empty_like_tokens
from stability.attention.operands import Operands
from stability.attention.packing import Packing

Gradients = tuple[Tensor | None, ...]

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor bias, Tensor? score_bias, Tensor? key_lengths, "
    "Tensor? query_lengths, Tensor? query_offsets, Tensor? key_offsets"
)
_OPTIONS = (
    "SymInt max_tokens_q, SymInt max_tokens_k, float scale, bool is_causal, bool is_fast, str implementation"
)


def attend(
    operands: Operands,
    *,
    scale: float,
    is_causal: bool,
    is_fast: bool,
    implementation: str,
    needs_statistics: bool = False,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls the operator.

    Args:
        operands: The tensors.
        scale: Factor of q·k.
        is_causal: Whether query i sees the keys j ≤ i only.
        is_fast: Whether σ may come from tanh.approx.
        implementation: "hopper", "triton", or "auto" for the first of them that can.
        needs_statistics: Whether to fill the statistics of the rows.
        packing: Where packed sequences lie.

    Returns:
        Output, row_sum and derivative_max; see the module's docstring.
    """
    query, key = operands.query, operands.key
    return _forward(
        *operands,
        max_tokens_q=packing.max_tokens_q if packing is not None else query.shape[2],
        max_tokens_k=packing.max_tokens_k if packing is not None else key.shape[2],
        scale=scale,
        is_causal=is_causal,
        is_fast=is_fast,
        implementation=implementation,
        needs_statistics=needs_statistics,
    )


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


@torch.library.custom_op(
    "stability::sigmoid_attention",
    mutates_args=(),
    schema=f"({_TENSORS}, *, {_OPTIONS}, bool needs_statistics) -> (Tensor, Tensor, Tensor)",
)
def _forward(*tensors: Any, needs_statistics: bool, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, (row_sum, derivative_max) = Operands(*tensors), _empty_statistics(tensors[0], needs_statistics)
    module, arguments = _prepare(operands, needs_statistics=needs_statistics, **options)
    if needs_statistics:
        arguments["statistics"] = row_sum, derivative_max
    with torch.cuda.device_of(operands.query):  # Triton launches on the current device
        output = module.forward(operands.query, operands.key, operands.value, **arguments)
    return output, row_sum, derivative_max


@_forward.register_fake
def _(*tensors: Any, needs_statistics: bool, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands = Operands(*tensors)
    output = empty_like_tokens(operands.query, operands.value.shape[3])
    return output, *_empty_statistics(operands.query, needs_statistics)


@torch.library.custom_op(
    "stability::sigmoid_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, {_TENSORS}, *, {_OPTIONS}, bool needs_bias_grad, "
    "bool needs_score_bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    grad_output: Tensor,
    *tensors: Any,
    needs_bias_grad: bool,
    needs_score_bias_grad: bool,
    **options: Any,
) -> tuple[Tensor, ...]:
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


@_backward.register_fake
def _(
    grad_output: Tensor,
    *tensors: Any,
    needs_bias_grad: bool,
    needs_score_bias_grad: bool,
    **options: Any,
) -> tuple[Tensor, ...]:
    operands = Operands(*tensors)
    bias, score_bias = operands.bias, operands.score_bias
    return (
        *(empty_like_tokens(tensor, tensor.shape[3]) for tensor in operands[:3]),
        bias.new_empty(bias.shape if needs_bias_grad else 0),
        bias.new_empty(score_bias.shape if score_bias is not None and needs_score_bias_grad else 0),
    )


def _keep_for_backward(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs)
    ctx.options = {name: option for name, option in keyword_only_inputs.items() if name != "needs_statistics"}


def _differentiate(ctx: Any, grad_output: Tensor, *_: Tensor) -> Gradients:
    needs = ctx.needs_input_grad
    grads = _backward(
        grad_output,
        *ctx.saved_tensors,
        **ctx.options,
        needs_bias_grad=needs[3],
        needs_score_bias_grad=needs[4],
    )
    kept = (grad if is_needed else None for grad, is_needed in zip(grads, needs, strict=False))
    return *kept, None, None, None, None


def _keep_for_double_backward(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    unasked = [
        grad
        for grad, name in zip(output[3:], ("needs_bias_grad", "needs_score_bias_grad"), strict=True)
        if not keyword_only_inputs[name]
    ]
    ctx.mark_non_differentiable(*unasked)
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _differentiate_twice(ctx: Any, *grads_of_grads: Tensor) -> Gradients:
    needs = ctx.needs_input_grad
    return differentiate_twice(ctx.saved_tensors, grads_of_grads, needs, ctx.options)


_forward.register_autograd(_differentiate, setup_context=_keep_for_backward)
_backward.register_autograd(_differentiate_twice, setup_context=_keep_for_double_backward)


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


def _empty_statistics(query: Tensor, needs_statistics: bool) -> tuple[Tensor, Tensor]:
    make, shape = (query.new_zeros, query.shape[:3]) if needs_statistics else (query.new_empty, (0,))
    return make(shape, dtype=torch.float32), make(shape, dtype=torch.float32)

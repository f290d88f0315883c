"""Sigmoid attention by a kernel, as torch operators: ``stability::sigmoid_attention`` and its backward.

An operator has a fake kernel, so torch.compile traces through it without running it, and a derivative. The
backward operator has one as well: second derivatives are computed by the reference, which holds the n × n
weights, and this is said once.

Registered with the dispatcher directly: of the host's time for a layer, `torch.library.custom_op` and
`register_autograd` would take a third, and a short training step waits for its host.

Statistics of the rows. An implementation asked for statistics also fills, for every query row,

    row_sum          Σⱼ σ(xᵢⱼ)                    float32 [batch, heads, tokens_q]
    derivative_max   maxⱼ σ(xᵢⱼ)(1 − σ(xᵢⱼ))      float32 [batch, heads, tokens_q]

over the keys the row sees, from the unrounded weights; 0 in padding and for rows that see no key. They come
from the pass that computes the output and have no gradient. Unasked, both come back empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKeySet
from torch._library.custom_ops import get_library_allowing_overwrite
from torch._ops import OpOverload

from stability.attention.double_backward import differentiate_twice
from stability.attention.kernel_call import compute_backward, compute_forward, empty_statistics
from stability.attention.layout import empty_like_tokens
from stability.attention.operands import Operands
from stability.attention.packing import Packing

Gradients = tuple[Tensor | None, ...]
Kernel = Callable[..., tuple[Tensor, ...]]

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


# What custom_op takes, too: this module can be imported once more, which a plain Library would refuse.
_LIBRARY = get_library_allowing_overwrite("stability", "sigmoid_attention")
_LIBRARY.define(
    f"sigmoid_attention({_TENSORS}, *, {_OPTIONS}, bool needs_statistics) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    f"sigmoid_attention_backward(Tensor grad_output, {_TENSORS}, *, {_OPTIONS}, bool needs_bias_grad, "
    "bool needs_score_bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_forward = torch.ops.stability.sigmoid_attention.default
_backward = torch.ops.stability.sigmoid_attention_backward.default


@torch.library.register_fake(_forward, lib=_LIBRARY)
def _(*tensors: Any, needs_statistics: bool, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands = Operands(*tensors)
    output = empty_like_tokens(operands.query, operands.value.shape[3])
    return output, *empty_statistics(operands.query, needs_statistics)


@torch.library.register_fake(_backward, lib=_LIBRARY)
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


class _SigmoidAttention(torch.autograd.Function):
    """The output with its gradients by `_backward`.

    Profiles, anomaly mode and `output.grad_fn` show the name of the class.
    """

    @staticmethod
    def forward(
        ctx: Any, keyset: DispatchKeySet, options: dict[str, Any], *tensors: Any
    ) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = _below_autograd(_forward, keyset, tensors, options)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)  # of statistics, zeros would be made
        ctx.save_for_backward(*tensors)
        ctx.options = {name: option for name, option in options.items() if name != "needs_statistics"}
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> Gradients:
        needs = ctx.needs_input_grad[2:]
        if grad_output is None:
            return (None,) * (2 + len(needs))
        grads = _backward(
            grad_output,
            *ctx.saved_tensors,
            **ctx.options,
            needs_bias_grad=needs[3],
            needs_score_bias_grad=needs[4],
        )
        kept = (grad if is_needed else None for grad, is_needed in zip(grads, needs, strict=False))
        return None, None, *kept, None, None, None, None


class _SigmoidAttentionGradients(torch.autograd.Function):
    """The gradients with theirs by the reference."""

    @staticmethod
    def forward(
        ctx: Any, keyset: DispatchKeySet, options: dict[str, Any], *tensors: Any
    ) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = _below_autograd(_backward, keyset, tensors, options)
        needs = options["needs_bias_grad"], options["needs_score_bias_grad"]
        ctx.mark_non_differentiable(
            *(grad for grad, is_needed in zip(gradients[3:], needs, strict=True) if not is_needed)
        )
        ctx.save_for_backward(*tensors)
        ctx.options = options
        return gradients

    @staticmethod
    def backward(ctx: Any, *grads_of_grads: Tensor) -> Gradients:
        needs = ctx.needs_input_grad[2:]
        return None, None, *differentiate_twice(ctx.saved_tensors, grads_of_grads, needs, ctx.options)


def _below_autograd(
    operator: OpOverload, keyset: DispatchKeySet, tensors: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Calls what computes an operator, fakes it or records it."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *tensors, **options)


def _register(operator: OpOverload, compute: Kernel, function: type[torch.autograd.Function]) -> None:
    """Registers what computes an operator, whatever the device, and how it is differentiated."""

    @torch._disable_dynamo  # called by the dispatcher, below what dynamo traces
    def differentiate(keyset: DispatchKeySet, *tensors: Any, **options: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
            return function.apply(keyset, options, *tensors)
        return _below_autograd(operator, keyset, tensors, options)

    _LIBRARY.impl(operator, torch._disable_dynamo(compute), "CompositeExplicitAutograd")
    _LIBRARY.impl(operator, differentiate, "Autograd", with_keyset=True)


_register(_forward, compute_forward, _SigmoidAttention)
_register(_backward, compute_backward, _SigmoidAttentionGradients)

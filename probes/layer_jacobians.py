"""Norms of the Jacobian ∂output/∂input of whole attention layers, at the step's own inputs and weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probes.activations import floating_tensors
from probes.pending import Pending
from probes.record import Series
from stability.layer_jacobian import layer_jacobian_norms


def measure_layer_jacobian(
    pending: Pending, layer: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> None:
    """Adds ``layer_jacobian/spectral`` (a lower bound) and ``layer_jacobian/frobenius`` of one module call.

    The module runs again, several times, on the input it just had. Nothing of that is left behind: its
    weights are detached, its buffers copied, and the random state is put back.

    The derivative is taken with respect to the first floating-point input; where the same tensor is passed
    more than once (self-attention's query, key and value), with respect to all its places together.
    """
    inputs = next(floating_tensors((args, kwargs)), None)
    if inputs is None or inputs.numel() == 0:
        return
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def function(x: Tensor) -> Tensor:
        positional = tuple(x if argument is inputs else argument for argument in args)
        named = {name: x if argument is inputs else argument for name, argument in kwargs.items()}
        output = torch.func.functional_call(module, {**weights, **buffers}, positional, named)
        return next(floating_tensors(output))

    norms = layer_jacobian_norms(function, inputs)
    pending.add(Series(layer, "layer_jacobian/spectral", kind="lower_bound"), norms.spectral)
    pending.add(
        Series(layer, "layer_jacobian/frobenius", kind="estimate"),
        norms.frobenius,
        norms.frobenius_standard_error,
    )

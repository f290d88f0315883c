"""Gradient norms per layer, taken from the gradients the optimizer is about to use."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from probes.pending import Pending
from probes.record import Series
from stability.norms import max_abs, tensor_norms


@torch.no_grad()
def measure_gradients(pending: Pending, layer_of: dict[Tensor, str], parameters: Iterable[Tensor]) -> None:
    """Adds ``grad_norm``, ``grad_max_abs`` and ``nonfinite_count`` of every layer with a gradient.

    Called from the optimizer's step pre-hook: under a ``GradScaler`` the gradients are unscaled by then, and
    accumulated ones are complete. Clipping, if the training script does any, has already happened.

    Args:
        pending: Receives the scalars.
        layer_of: Layer of each watched parameter.
        parameters: The parameters of the optimizer that is about to step.
    """
    layers, gradients = [], []
    for parameter in parameters:
        if parameter.grad is not None and parameter in layer_of:
            layers.append(layer_of[parameter])
            gradients.append(_dense_values(parameter.grad))
    for layer, gradient, norm in zip(layers, gradients, tensor_norms(gradients), strict=True):
        pending.add(Series(layer, "grad_norm"), norm)
        pending.add(Series(layer, "grad_max_abs"), max_abs(gradient))
        pending.add(Series(layer, "nonfinite_count"), _nonfinite_count(gradient, norm))


def _dense_values(gradient: Tensor) -> Tensor:
    """The entries of a gradient; those that a sparse one does not store are zero and change no norm."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _nonfinite_count(gradient: Tensor, norm: Tensor) -> Tensor:
    # On a CPU reading the norm is free and spares the pass; a finite norm has only finite parts.
    if norm.device.type == "cpu" and torch.isfinite(norm):
        return torch.zeros((), dtype=torch.float64)
    return gradient.isfinite().logical_not().sum().double()

"""Norms per layer of the gradients that the optimizer is about to use, and of the weights it will change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from probes.pending import Pending
from probes.record import Series
from stability.norms import max_abs, tensor_norms


@torch.no_grad()
def measure_gradients(
    pending: Pending,
    layer_of: dict[Tensor, str],
    selected: set[str],
    parameters: Iterable[Tensor],
    grad_scale: Tensor | None = None,
    *,
    is_detailed: bool,
) -> None:
    """Adds ``grad_norm``, and in detail ``grad_max_abs`` and ``nonfinite_count``, of every selected layer.

    Called from the optimizer's step pre-hook: accumulated gradients are complete by then, and clipping, if
    the training script does any, has already happened. The other layers enter the whole model's norm only.

    Args:
        pending: Receives the scalars.
        layer_of: Layer of each of the model's parameters.
        selected: Layers that are recorded.
        parameters: The parameters of the optimizer that is about to step.
        grad_scale: What a ``GradScaler`` has multiplied the gradients by, where the optimizer takes it out
            itself (fused ones do); None where they are unscaled.
        is_detailed: Whether to measure more than norms.
    """
    layers, gradients = [], []
    for parameter in parameters:
        if parameter.grad is not None and parameter in layer_of:
            layers.append(layer_of[parameter])
            gradients.append(_dense_values(parameter.grad))
    norms = tensor_norms(gradients)
    names = [_series(layer, "grad_norm" if layer in selected else "_other_grad_norm") for layer in layers]
    _add_norms(pending, names, norms, grad_scale)
    if not is_detailed:
        return
    for layer, gradient, norm in zip(layers, gradients, norms, strict=True):
        if layer not in selected:
            continue
        largest = max_abs(gradient)
        pending.add(
            Series(layer, "grad_max_abs"),
            largest if grad_scale is None else largest / grad_scale.to(largest.device, non_blocking=True),
        )
        pending.add(Series(layer, "nonfinite_count"), _nonfinite_count(gradient, norm))


@torch.no_grad()
def measure_weights(
    pending: Pending,
    layer_of: dict[Tensor, str],
    selected: set[str],
    parameters: Iterable[Tensor],
    *,
    has_closure: bool,
) -> None:
    """Adds ``weight_norm`` of every selected layer, of the parameters that the step is about to change.

    Args:
        pending: Receives the scalars.
        layer_of: Layer of each of the model's parameters.
        selected: Layers that are recorded.
        parameters: The parameters of the optimizer that is about to step.
        has_closure: Whether the step computes the gradients itself, so that there are none to see yet.
    """
    weights = [
        parameter
        for parameter in parameters
        if layer_of.get(parameter) in selected and (has_closure or parameter.grad is not None)
    ]
    names = [_series(layer_of[parameter], "weight_norm") for parameter in weights]
    _add_norms(pending, names, tensor_norms(weights))


def _add_norms(
    pending: Pending, names: Sequence[Series], norms: Sequence[Tensor], scale: Tensor | None = None
) -> None:
    """Adds one norm a name, device by device, divided by a scale."""
    by_device: dict[torch.device, list[int]] = {}
    for index, norm in enumerate(norms):
        by_device.setdefault(norm.device, []).append(index)
    for device, indices in by_device.items():
        together = torch.stack([norms[index] for index in indices])
        if scale is not None:
            together /= scale.to(device, non_blocking=True)
        pending.add_each([names[index] for index in indices], together)


@lru_cache(maxsize=2**14)
def _series(layer: str, quantity: str) -> Series:
    return Series(layer, quantity)


def _dense_values(gradient: Tensor) -> Tensor:
    """The entries of a gradient; those that a sparse one does not store are zero and change no norm."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _nonfinite_count(gradient: Tensor, norm: Tensor) -> Tensor:
    # On a CPU reading the norm is free and spares the pass; a finite norm has only finite parts.
    if norm.device.type == "cpu" and torch.isfinite(norm):
        return torch.zeros((), dtype=torch.float64)
    return torch.count_nonzero(gradient - gradient)  # NaN where it is not finite; three launches

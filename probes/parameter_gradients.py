"""Norms per layer of the gradients that the optimizer is about to use, and of the weights it will change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from probes.pending import Pending
from probes.record import Series, series_of
from probes.sharding import Sharding
from stability.norms import count_nonfinite, largest_entries, tensor_norms


@torch.no_grad()
def measure_gradients(
    pending: Pending,
    layer_of: dict[Tensor, str],
    selected: set[str],
    gradients: Mapping[Tensor, Tensor],
    grad_scale: Tensor | None = None,
    *,
    sharding: Sharding,
    is_detailed: bool,
) -> None:
    """Adds ``grad_norm``, and in detail ``grad_max_abs`` and ``nonfinite_count``, of every selected layer.

    Called from the optimizer's step pre-hook: accumulated gradients are complete by then, and clipping, if
    the training script does any, has already happened. The other layers enter the whole model's norm only.

    Args:
        pending: Receives the scalars.
        layer_of: Layer of each of the model's parameters.
        selected: Layers that are recorded.
        gradients: By parameter of the optimizer that is about to step, what is here of its gradient.
        grad_scale: What a ``GradScaler`` has multiplied the gradients by, where the optimizer takes it out
            itself (fused ones do); None where they are unscaled.
        sharding: How many ranks hold the same part.
        is_detailed: Whether to measure more than norms.
    """
    layers = [layer_of[parameter] for parameter in gradients]
    parts = [_dense_values(gradient) for gradient in gradients.values()]
    weights = sharding.weights([p.grad for p in gradients if p.grad is not None])
    norms = tensor_norms(parts)
    names = [series_of(layer, "grad_norm" if layer in selected else "_other_grad_norm") for layer in layers]
    _add_values(pending, names, norms, weights, grad_scale)
    if not is_detailed:
        return
    detailed = [index for index, layer in enumerate(layers) if layer in selected]
    layers = [layers[index] for index in detailed]
    parts = [parts[index] for index in detailed]
    weights = [weights[index] for index in detailed]
    largest = largest_entries(parts)
    names = [series_of(layer, "grad_max_abs") for layer in layers]
    _add_values(pending, names, largest, weights, grad_scale)
    counts = count_nonfinite(parts, [norms[index] for index in detailed])
    _add_values(pending, [series_of(layer, "nonfinite_count") for layer in layers], counts, weights)


@torch.no_grad()
def measure_weights(
    pending: Pending,
    layer_of: dict[Tensor, str],
    selected: set[str],
    parameters: Iterable[Tensor],
    *,
    sharding: Sharding,
    has_closure: bool,
) -> None:
    """Adds ``weight_norm`` of every selected layer, of the parameters that the step is about to change.

    Args:
        pending: Receives the scalars.
        layer_of: Layer of each of the model's parameters.
        selected: Layers that are recorded.
        parameters: The parameters of the optimizer that is about to step.
        sharding: Which part of a weight is here.
        has_closure: Whether the step computes the gradients itself, so that there are none to see yet.
    """
    watched = [
        parameter
        for parameter in parameters
        if layer_of.get(parameter) in selected and (has_closure or parameter.grad is not None)
    ]
    names = [series_of(layer_of[parameter], "weight_norm") for parameter in watched]
    _add_values(pending, names, tensor_norms(sharding.parts(watched)), sharding.weights(watched))


def _add_values(
    pending: Pending,
    names: Sequence[Series],
    values: Sequence[Tensor],
    weights: Sequence[float],
    scale: Tensor | None = None,
) -> None:
    """Adds one 0-d value and weight a name, together for each device and dtype, divided by a scale."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, value in enumerate(values):
        alike.setdefault((value.device, value.dtype), []).append(index)
    for (device, dtype), indices in alike.items():
        together = torch.stack([values[index] for index in indices])
        if scale is not None:
            together = together.to(torch.promote_types(dtype, torch.float32))
            together /= scale.to(device, non_blocking=True)
        pending.add_each(
            [names[index] for index in indices], together, weight=[weights[index] for index in indices]
        )


def _dense_values(gradient: Tensor) -> Tensor:
    """The entries of a gradient; those that a sparse one does not store are zero and change no norm.

    To coalesce a sparse one on CUDA waits for the device, since only there is known how many entries remain;
    SparseAdam and Adagrad do it in their own step too.
    """
    return gradient.coalesce().values() if gradient.is_sparse else gradient

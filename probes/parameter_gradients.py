"""Norms per layer of the gradients that the optimizer is about to use, and of the weights it will change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.pending import Pending
from probes.record import Series, series_of, series_of_each
from probes.sharding import Sharding
from stability.norms import by_device, count_nonfinite, largest_entries, tensor_norms_by_device

_MAX_KNOWN = 16


class Watched(NamedTuple):
    """Parameters that a step changes, and the names of what is measured of them.

    Attributes:
        parameters: Those of the model.
        layers: The layer of each.
        gradients: Name of each gradient's norm. Layers that are not selected enter the whole model's only.
        selected: Indices of those in selected layers.
        selected_layers: The layers of these.
    """

    parameters: tuple[Tensor, ...]
    layers: tuple[str, ...]
    gradients: tuple[Series, ...]
    selected: tuple[int, ...]
    selected_layers: tuple[str, ...]


class WatchedParameters:
    """Finds the names of parameters once, not at every step: a step has no time for hundreds of lookups.

    Parameters are known again by identity, which is safe: ``layer_of`` keeps the model's alive, and of
    others only that they are not the model's is remembered.

    Args:
        layer_of: Layer of each of the model's parameters; does not change.
        selected: Layers that are recorded.
    """

    def __init__(self, layer_of: Mapping[Tensor, str], selected: set[str]) -> None:
        self._layer_of = layer_of
        self._selected = selected
        self._known: dict[tuple[int, ...], Watched] = {}

    def among(self, parameters: Sequence[Tensor]) -> Watched:
        """Those that are the model's, in the order given."""
        key = tuple(map(id, parameters))  # tensors hash in Python
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MAX_KNOWN:  # experts, of which every step trains others
                self._known.clear()
            known = self._known[key] = self._watched(parameters)
        return known

    def _watched(self, parameters: Sequence[Tensor]) -> Watched:
        # An optimizer may list a shared weight twice.
        mine = tuple(dict.fromkeys(parameter for parameter in parameters if parameter in self._layer_of))
        layers = tuple(self._layer_of[parameter] for parameter in mine)
        selected = tuple(index for index, layer in enumerate(layers) if layer in self._selected)
        return Watched(
            mine,
            layers,
            tuple(
                series_of(layer, "grad_norm" if layer in self._selected else "_other_grad_norm")
                for layer in layers
            ),
            selected,
            tuple(layers[index] for index in selected),
        )


def as_real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, complex ones as pairs of real numbers: so optimizers update them."""
    return [torch.view_as_real(each.resolve_conj()) if each.is_complex() else each for each in tensors]


@torch.no_grad()
def measure_gradients(
    pending: Pending,
    watched: Watched,
    parts: Sequence[Tensor],
    weights: Sequence[float],
    grad_scale: Tensor | None = None,
    *,
    is_detailed: bool,
) -> None:
    """Adds ``grad_norm``, and in detail ``grad_max_abs`` and ``nonfinite_count``, of every selected layer.

    Called from the optimizer's step pre-hook: accumulated gradients are complete by then, and clipping, if
    the training script does any, has already happened.

    Args:
        pending: Receives the scalars.
        watched: Parameters with a gradient.
        parts: What is here of each gradient.
        weights: How much each counts where several ranks have the same part.
        grad_scale: What a ``GradScaler`` has multiplied the gradients by, where the optimizer takes it out
            itself (fused ones do); None where they are unscaled.
        is_detailed: Whether to measure more than norms.
    """
    # What a sparse one does not store is zero and changes no norm. To coalesce it on CUDA waits for the
    # device, since only there is known how many entries remain; SparseAdam and Adagrad do so in their step.
    parts = as_real([part.coalesce().values() if part.is_sparse else part for part in parts])
    for indices, norms in tensor_norms_by_device(parts):
        pending.add_some(watched.gradients, indices, _unscaled(norms, grad_scale), weights)
    if not is_detailed:
        return
    parts = [parts[index] for index in watched.selected]
    weights = [weights[index] for index in watched.selected]
    for indices in by_device(parts):
        of_device = [parts[index] for index in indices]
        largest = largest_entries(of_device)
        counts = count_nonfinite(of_device, largest)
        for quantity, values in ("grad_max_abs", _unscaled(largest, grad_scale)), ("nonfinite_count", counts):
            names = series_of_each(watched.selected_layers, quantity)
            pending.add_some(names, indices, values, weights)


@torch.no_grad()
def measure_weights(pending: Pending, watched: Watched, sharding: Sharding) -> None:
    """Adds ``weight_norm`` of every selected layer, of the parameters that the step is about to change.

    Args:
        pending: Receives the scalars.
        watched: The parameters.
        sharding: Which part of a weight is here.
    """
    parts, weights = sharding.parts_and_weights([watched.parameters[index] for index in watched.selected])
    names = series_of_each(watched.selected_layers, "weight_norm")
    for indices, norms in tensor_norms_by_device(as_real(parts)):
        pending.add_some(names, indices, norms, weights)


def _unscaled(values: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return values
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values / scale.to(values.device, non_blocking=True)

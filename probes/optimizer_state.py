"""Change of the weights in a step, and Adam's update size, measured around the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from probes.parameter_gradients import Watched, as_real
from probes.pending import Pending, Ratio
from probes.record import series_of, series_of_each
from probes.sharding import Sharding
from stability.norms import tensor_norms_by_device


class OptimizerState:
    """Measures one optimizer's step from both sides.

    ``before`` copies the watched weights (once their size in memory, until ``after``), because the size of a
    step is its difference: no formula per optimizer, and it holds for schedules, decay and clipping alike.
    Fused operations throughout: a launch per parameter would cost more than the arithmetic.

    Args:
        sharding: Which part of a parameter and its state is here.
    """

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        self._watched: list[Tensor] = []
        self._layers: tuple[str, ...] = ()
        self._weights_before: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def before(self, watched: Watched) -> None:
        """Keeps the weights that a step may change for ``after``."""
        self._watched = [watched.parameters[index] for index in watched.selected]
        self._layers = watched.selected_layers
        parts = as_real(self._sharding.parts(self._watched))
        self._weights_before = torch._foreach_mul(parts, 1) if parts else ()

    @torch.no_grad()
    def after(self, pending: Pending, optimizer: Optimizer, gradients: Mapping[Tensor, Tensor]) -> None:
        """Adds ``update_ratio`` and, for optimizers with Adam's second moment, ``adam_update_rms``.

        Args:
            pending: Receives the scalars.
            optimizer: Has stepped.
            gradients: By parameter, what is here of its gradient.
        """
        parameters, self._watched = self._watched, []
        layers, self._layers = self._layers, ()
        changes, self._weights_before = self._weights_before, ()
        if not changes:  # nothing watched, or an optimizer that steps within this one has been measured
            return
        values, weights = self._sharding.parts_and_weights(parameters)
        torch._foreach_sub_(changes, as_real(values))
        names = series_of_each(layers, "_update_norm")
        for indices, norms in tensor_norms_by_device(changes):
            pending.add_some(names, indices, norms, weights)
        del changes  # before the next temporaries of the weights' size
        pending.ratios += _ratios(layers, "update_ratio", "_update_norm", "weight_norm")
        self._add_adam_update_rms(pending, optimizer, gradients, parameters, layers)

    def _add_adam_update_rms(
        self,
        pending: Pending,
        optimizer: Optimizer,
        gradients: Mapping[Tensor, Tensor],
        watched: Sequence[Tensor],
        layers_of_watched: Sequence[str],
    ) -> None:
        group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        parameters, layers, moments, steps, betas, floors = [], [], [], [], [], []
        for parameter, layer in zip(watched, layers_of_watched, strict=True):
            group, state = group_of[id(parameter)], optimizer.state.get(parameter, {})
            if (
                not _has_second_moment(parameter, state, group)
                or parameter.grad is None
                or parameter.grad.is_sparse
            ):
                continue
            parameters.append(parameter)
            layers.append(layer)
            moments.append(state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"])
            steps.append(state["step"])
            betas.append(group["betas"][1])
            # ε² keeps entries that have never had a gradient (g = v = 0, as in embeddings) at 0.
            floors.append(group["eps"] ** 2)
        if not parameters:
            return
        weights = self._sharding.parts_and_weights(parameters)[1]
        # In float16 ε² would be 0 itself.
        moments = [
            moment.float() if moment.dtype in (torch.float16, torch.bfloat16) else moment
            for moment in as_real(self._sharding.parts(moments))
        ]
        # The floor is compared with v̂ = v/c: the tensors are new ones from here on.
        moments = list(torch._foreach_div(moments, _bias_corrections(steps, betas)))
        torch._foreach_clamp_min_(moments, floors)
        torch._foreach_sqrt_(moments)
        ratios = torch._foreach_div(as_real([gradients[parameter] for parameter in parameters]), moments)
        names = series_of_each(tuple(layers), "_adam_update_norm")
        for indices, norms in tensor_norms_by_device(ratios):
            pending.add_some(names, indices, norms, weights)
        size_of: dict[str, float] = {}  # over all ranks these add up to the layer's size
        for layer, weight, ratio in zip(layers, weights, ratios, strict=True):
            size_of[layer] = size_of.get(layer, 0.0) + weight * ratio.numel()
        for layer, size in size_of.items():
            pending.add_number(series_of(layer, "_root_size"), math.sqrt(size))
        pending.ratios += _ratios(tuple(size_of), "adam_update_rms", "_adam_update_norm", "_root_size")


@lru_cache(maxsize=2**8)
def _ratios(layers: tuple[str, ...], result: str, numerator: str, denominator: str) -> tuple[Ratio, ...]:
    """A ratio of two quantities in each layer."""
    return tuple(
        Ratio(series_of(layer, result), series_of(layer, numerator), series_of(layer, denominator))
        for layer in dict.fromkeys(layers)
    )


def _has_second_moment(parameter: Tensor, state: dict, group: dict) -> bool:
    if not ("exp_avg_sq" in state and "betas" in group and "eps" in group and "step" in state):
        return False
    return state["exp_avg_sq"].shape == parameter.shape  # not that of a projected gradient (GaLore)


def _bias_corrections(steps: Sequence[Tensor | float], betas: Sequence[float]) -> list[float] | list[Tensor]:
    """The c = 1 − β₂ᵗ of Adam's bias-corrected second moments v̂ = v/c; numbers if the steps are on the host.

    Source: Kingma & Ba 2015, Algorithm 1; g²/v̂ as the signal: Wortsman et al. 2304.13013 §3.
    """
    on_device: dict[tuple[torch.device, float], list[int]] = {}
    corrections: dict[int, float | Tensor] = {}  # tensors where β₂ is one
    for index, (step, beta) in enumerate(zip(steps, betas, strict=True)):
        if isinstance(step, Tensor) and step.device.type != "cpu":
            on_device.setdefault((step.device, beta), []).append(index)
        else:
            corrections[index] = 1 - beta ** float(step)
    numbers = [correction for correction in corrections.values() if not isinstance(correction, Tensor)]
    if len(numbers) == len(steps):
        return numbers
    tensors = {
        index: torch.as_tensor(correction, dtype=torch.float32, device="cpu")
        for index, correction in corrections.items()
    }
    for (_, beta), indices in on_device.items():
        together = torch.stack([torch.as_tensor(steps[index]) for index in indices]).to(torch.float32)
        tensors.update(zip(indices, (1 - beta**together).unbind(), strict=True))
    return [tensors[index] for index in range(len(steps))]

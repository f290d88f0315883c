"""Change of the weights in a step, and Adam's update size, measured around the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from probes.pending import Pending
from probes.record import series_of, series_of_each
from probes.sharding import Sharding
from stability.norms import tensor_norms_by_device


class OptimizerState:
    """Measures one optimizer's step from both sides.

    ``before`` copies the watched weights (once their size in memory, until ``after``), because the size of a
    step is its difference: no formula per optimizer, and it holds for schedules, decay and clipping alike.

    Args:
        layer_of: Layer of each watched parameter.
        sharding: Which part of a parameter and its state is here.
    """

    def __init__(self, layer_of: dict[Tensor, str], sharding: Sharding) -> None:
        self._layer_of = layer_of
        self._sharding = sharding
        self._weights_before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def before(self, optimizer: Optimizer, *, has_closure: bool) -> None:
        """Keeps the weights for ``after``.

        Args:
            optimizer: About to step.
            has_closure: Whether the step computes the gradients itself, so that there are none to see yet.
        """
        watched = [
            parameter
            for parameter, _ in self._watched(optimizer)
            if has_closure or parameter.grad is not None
        ]
        # Fused operations here and below: a launch per parameter would cost more than the arithmetic.
        copies = torch._foreach_mul(self._sharding.parts(watched), 1) if watched else ()
        self._weights_before = list(zip(watched, copies, strict=True))

    @torch.no_grad()
    def after(self, pending: Pending, optimizer: Optimizer, gradients: Mapping[Tensor, Tensor]) -> None:
        """Adds ``update_ratio`` and, for optimizers with Adam's second moment, ``adam_update_rms``.

        Args:
            pending: Receives the scalars.
            optimizer: Has stepped.
            gradients: By parameter, what is here of its gradient.
        """
        stepped = [parameter for parameter, _ in self._weights_before]
        layers = tuple(self._layer_of[parameter] for parameter in stepped)
        changes = [before for _, before in self._weights_before]
        values, weights = self._sharding.parts_and_weights(stepped)
        if changes:
            torch._foreach_sub_(changes, values)
        self._weights_before = []
        names = series_of_each(layers, "_update_norm")
        for indices, norms in tensor_norms_by_device(changes):
            pending.add_some(names, indices, norms, weights)
        del changes  # before the next temporaries of the weights' size
        for layer in dict.fromkeys(layers):
            pending.add_ratio(
                series_of(layer, "update_ratio"),
                series_of(layer, "_update_norm"),
                series_of(layer, "weight_norm"),
            )
        self._add_adam_update_rms(pending, optimizer, gradients)

    def _add_adam_update_rms(
        self, pending: Pending, optimizer: Optimizer, gradients: Mapping[Tensor, Tensor]
    ) -> None:
        layers, weights, parts, moments, corrections, floors = [], [], [], [], [], []
        for parameter, group in self._watched(optimizer):
            state = optimizer.state.get(parameter, {})
            if not _has_second_moment(state, group) or parameter.grad is None or parameter.grad.is_sparse:
                continue
            layers.append(self._layer_of[parameter])
            weights += self._sharding.parts_and_weights([parameter])[1]
            parts.append(gradients[parameter])
            name = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
            moment = self._sharding.part(state[name])
            # ε² keeps entries that have never had a gradient (g = v = 0, as in embeddings) at 0; in float16
            # it would be 0 itself.
            moments.append(moment.to(torch.promote_types(moment.dtype, torch.float32)))
            corrections.append(_bias_correction(state["step"], group["betas"][1]))
            floors.append(group["eps"] ** 2)
        if not layers:
            return
        # The floor is compared with v̂ = v/c: the tensors are new ones from here on.
        on_host = [correction for correction in corrections if isinstance(correction, float)]
        if len(on_host) == len(corrections):
            moments = list(torch._foreach_div(moments, on_host))
        else:  # steps are counted on the device
            moments = [moment / c for moment, c in zip(moments, corrections, strict=True)]
        torch._foreach_clamp_min_(moments, floors)
        torch._foreach_sqrt_(moments)
        ratios = torch._foreach_div(parts, moments)
        names = series_of_each(tuple(layers), "_adam_update_norm")
        for indices, norms in tensor_norms_by_device(ratios):
            pending.add_some(names, indices, norms, weights)
        size_of: dict[str, float] = {}  # over all ranks these add up to the layer's size
        for layer, weight, ratio in zip(layers, weights, ratios, strict=True):
            size_of[layer] = size_of.get(layer, 0.0) + weight * ratio.numel()
        for layer, size in size_of.items():
            pending.add_number(series_of(layer, "_root_size"), math.sqrt(size))
            pending.add_ratio(
                series_of(layer, "adam_update_rms"),
                series_of(layer, "_adam_update_norm"),
                series_of(layer, "_root_size"),
            )

    def _watched(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, dict]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._layer_of:
                    yield parameter, group


def _has_second_moment(state: dict, group: dict) -> bool:
    return "exp_avg_sq" in state and "betas" in group and "eps" in group and "step" in state


def _bias_correction(step: Tensor | float, beta2: float) -> Tensor | float:
    """The c = 1 − β₂ᵗ of Adam's bias-corrected second moment v̂ = v/c; a number if the step is on the host.

    Source: Kingma & Ba 2015, Algorithm 1; g²/v̂ as the signal: Wortsman et al. 2304.13013 §3.
    """
    if isinstance(step, Tensor) and step.device.type != "cpu":
        return 1 - beta2 ** step.to(torch.float32)
    return 1 - beta2 ** float(step)

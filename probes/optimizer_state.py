"""Weights, their change in the step, and Adam's update size, measured around the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from probes.pending import Pending
from probes.record import Series
from stability.norms import tensor_norms


class OptimizerState:
    """Measures one optimizer's step from both sides.

    ``before`` copies the watched weights (once their size in memory, until ``after``), because the size of a
    step is its difference: no formula per optimizer, and it holds for schedules, decay and clipping alike.

    Args:
        layer_of: Layer of each watched parameter.
    """

    def __init__(self, layer_of: dict[Tensor, str]) -> None:
        self._layer_of = layer_of
        self._weights_before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def before(self, pending: Pending, optimizer: Optimizer, *, has_closure: bool) -> None:
        """Adds ``weight_norm`` and keeps the weights for ``after``.

        Args:
            pending: Receives the scalars.
            optimizer: About to step.
            has_closure: Whether the step computes the gradients itself, so that there are none to see yet.
        """
        watched = [
            parameter
            for parameter, _ in self._watched(optimizer)
            if has_closure or parameter.grad is not None
        ]
        for parameter, norm in zip(watched, tensor_norms(watched), strict=True):
            pending.add(Series(self._layer_of[parameter], "weight_norm"), norm)
        self._weights_before = [(parameter, parameter.detach().clone()) for parameter in watched]

    @torch.no_grad()
    def after(self, pending: Pending, optimizer: Optimizer) -> None:
        """Adds ``update_ratio`` and, for optimizers with Adam's second moment, ``adam_update_rms``."""
        layers = [self._layer_of[parameter] for parameter, _ in self._weights_before]
        changes = [before.sub_(parameter.detach()) for parameter, before in self._weights_before]
        self._weights_before = []
        for layer, norm in zip(layers, tensor_norms(changes), strict=True):
            pending.add(Series(layer, "_update_norm"), norm)
        del changes  # before the next temporaries of the weights' size
        for layer in dict.fromkeys(layers):
            pending.add_ratio(
                Series(layer, "update_ratio"), Series(layer, "_update_norm"), Series(layer, "weight_norm")
            )
        self._add_adam_update_rms(pending, optimizer)

    def _add_adam_update_rms(self, pending: Pending, optimizer: Optimizer) -> None:
        layers, sizes, ratios = [], [], []
        for parameter, group in self._watched(optimizer):
            second_moment = _second_moment(optimizer.state.get(parameter, {}), group)
            if second_moment is None or parameter.grad is None or parameter.grad.is_sparse:
                continue
            layers.append(self._layer_of[parameter])
            sizes.append(parameter.numel())
            # ε² keeps entries that have never had a gradient (g = v = 0, as in embeddings) at 0; in float16
            # it would be 0 itself.
            wide = torch.promote_types(second_moment.dtype, torch.float32)
            ratios.append(parameter.grad / second_moment.to(wide).clamp(min=group["eps"] ** 2).sqrt())
        size_of: dict[str, int] = {}
        for layer, size, norm in zip(layers, sizes, tensor_norms(ratios), strict=True):
            pending.add(Series(layer, "_adam_update_norm"), norm)
            size_of[layer] = size_of.get(layer, 0) + size
        for layer, size in size_of.items():
            pending.add_number(Series(layer, "_root_size"), math.sqrt(size))
            pending.add_ratio(
                Series(layer, "adam_update_rms"),
                Series(layer, "_adam_update_norm"),
                Series(layer, "_root_size"),
            )

    def _watched(self, optimizer: Optimizer) -> Iterator[tuple[Tensor, dict]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._layer_of:
                    yield parameter, group


def _second_moment(state: dict, group: dict) -> Tensor | None:
    """Adam's bias-corrected second moment v̂ = v/(1 − β₂ᵗ), or None for another optimizer.

    Source: Kingma & Ba 2015, Algorithm 1; g²/v̂ as the signal: Wortsman et al. 2304.13013 §3.
    """
    if "exp_avg_sq" not in state or "betas" not in group or "eps" not in group or "step" not in state:
        return None
    second_moment = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    if not isinstance(state["step"], Tensor):
        return second_moment / (1 - group["betas"][1] ** state["step"])
    return second_moment / (1 - group["betas"][1] ** state["step"].to(torch.float32))

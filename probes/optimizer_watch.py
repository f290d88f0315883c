"""What is measured around the optimizers' steps, and when a step of the training has ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.optim import Optimizer

from probes.grad_scaler import observe_grad_scaler
from probes.guard import GRADIENTS, UPDATES, WEIGHTS, Guard
from probes.optimizer_state import OptimizerState
from probes.parameter_gradients import Watched, WatchedParameters, measure_gradients, measure_weights
from probes.pending import LOSS_FACTOR, Pending
from probes.record import ALL_LAYERS, Series
from probes.replaced_optimizer import ReplacedOptimizer
from probes.sharding import Sharding

SKIPPED_STEP = Series(ALL_LAYERS, "skipped_step")


class OptimizerWatch:
    """Measures gradients and weights before an optimizer steps, and their change after it.

    Args:
        pending: Receives the scalars.
        guard: Runs measurements.
        optimizers: Those whose steps end a step of the training.
        layer_of: Layer of each of the model's parameters.
        selected: Layers that are watched.
        sharding: Which part of the model is here.
        new_parameters: Gives the parameters that the model has got since the probe was attached.
        before_step_ends: Called before the last optimizer steps; after it, if a closure makes the forward
            pass within the step. May raise.
        end_step: Called when the last optimizer has stepped.
    """

    def __init__(
        self,
        pending: Pending,
        guard: Guard,
        optimizers: Sequence[Optimizer],
        layer_of: Mapping[Tensor, str],
        selected: set[str],
        sharding: Sharding,
        new_parameters: Callable[[], Collection[Tensor]],
        before_step_ends: Callable[[], None],
        end_step: Callable[[], None],
    ) -> None:
        self._pending = pending
        self._guard = guard
        self._optimizers = tuple(optimizers)
        self._layer_of = dict(layer_of)
        self._parameters = WatchedParameters(self._layer_of, selected)
        self._sharding = sharding
        self._before_step_ends = before_step_ends
        self._end_step = end_step
        self._optimizer_state = OptimizerState(sharding)
        self._replaced = ReplacedOptimizer(self._optimizers, guard, new_parameters, self._tell_replaced)
        self._begun: set[Optimizer] = set()
        self._stepped: set[Optimizer] = set()
        self._scaled_optimizer: Optimizer | None = None  # which a GradScaler is about to step, or not

    def install(self, handles: ExitStack) -> None:
        """Hooks the optimizers; ends when ``handles`` closes."""
        handles.enter_context(observe_grad_scaler(self._before_scaler_step, self._after_scaler_step))
        self._replaced.install(handles)
        for optimizer in self._optimizers:
            handles.callback(optimizer.register_step_pre_hook(self._before_optimizer).remove)
            handles.callback(optimizer.register_step_post_hook(self._after_optimizer).remove)

    def begin_step(self, *, is_recorded: bool, is_detailed: bool, has_activations: bool) -> None:
        """Says what the step that begins now records.

        Args:
            is_recorded: Gradients and weights.
            is_detailed: Everything.
            has_activations: Gradients at activations, which a GradScaler has multiplied.
        """
        self._is_recorded = is_recorded
        self._is_detailed = is_detailed
        self._has_activations = has_activations
        self._begun.clear()
        self._stepped.clear()

    def measure_gradients(self) -> None:
        """Measures gradients and weights of all parameters, where no optimizer says when."""
        if self._is_recorded or self._is_detailed:
            watched = self._parameters.among(_with_gradients(self._layer_of))
            self._measure_gradients(watched, None)
            self._guard(WEIGHTS, measure_weights, self._pending, watched, self._sharding)

    def _before_scaler_step(self, optimizer: Optimizer, factor: Tensor) -> None:
        if optimizer not in self._optimizers:
            return
        self._scaled_optimizer = optimizer
        if self._has_activations and not self._pending.has(LOSS_FACTOR.quantity):
            weight = self._sharding.copy_weight
            self._pending.add(LOSS_FACTOR, factor.clone().reshape(()), weight=weight)

    def _after_scaler_step(self, optimizer: Optimizer) -> None:
        if self._scaled_optimizer is not optimizer:
            return  # its own hook has seen the step, or it is somebody else's
        self._scaled_optimizer = None
        if self._is_measured(optimizer):
            self._measure_gradients(self._about_to_change(optimizer), None)
        self._pending.add_number(SKIPPED_STEP, 1.0)
        self._finish(optimizer)

    @torch._disable_dynamo  # of an optimizer whose step is compiled: all the rest of a step would be traced
    def _before_optimizer(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if optimizer in self._begun:
            return  # a subclass whose step calls super().step(), both with hooks; or one that failed half-way
        is_scaled, self._scaled_optimizer = self._scaled_optimizer is optimizer, None
        has_closure = _has_closure(args, kwargs)
        if not has_closure:
            self._check_before_end(optimizer)
        self._begun.add(optimizer)
        if not self._is_measured(optimizer):
            return
        if is_scaled:
            # A fused optimizer is called in any case, and told on the device whether to step.
            found_inf = getattr(optimizer, "found_inf", None)
            if found_inf is None:
                self._pending.add_number(SKIPPED_STEP, 0.0)
            else:
                self._pending.add(SKIPPED_STEP, (found_inf > 0).double())
        if has_closure:  # which computes the gradients: there are none to see yet
            watched = self._parameters.among(_parameters(optimizer))
        else:
            watched = self._about_to_change(optimizer)
            # A GradScaler leaves unscaling to optimizers that are fused.
            self._measure_gradients(watched, getattr(optimizer, "grad_scale", None))
        self._guard(WEIGHTS, measure_weights, self._pending, watched, self._sharding)
        if self._is_detailed:
            self._guard(UPDATES, self._optimizer_state.before, watched)

    @torch._disable_dynamo
    def _after_optimizer(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if optimizer not in self._begun:
            return
        self._begun.discard(optimizer)
        has_closure = _has_closure(args, kwargs)
        if has_closure:
            self._check_before_end(optimizer)
        if self._is_measured(optimizer) and (has_closure or self._is_detailed):
            watched = self._about_to_change(optimizer)
            if has_closure:  # which has just computed the gradients
                self._measure_gradients(watched, None)
            if self._is_detailed:
                parts = self._sharding.parts(_gradients(watched))
                gradients = dict(zip(watched.parameters, parts, strict=True))
                self._guard(UPDATES, self._optimizer_state.after, self._pending, optimizer, gradients)
        self._finish(optimizer)

    def _check_before_end(self, optimizer: Optimizer) -> None:
        if len(self._stepped | {optimizer}) == len(self._optimizers):
            self._before_step_ends()

    def _finish(self, optimizer: Optimizer) -> None:
        self._replaced.see_step(optimizer)
        self._stepped.add(optimizer)
        if len(self._stepped) == len(self._optimizers):
            self._end_step()

    def _tell_replaced(self, watched: Optimizer, other: Optimizer) -> None:
        if watched in self._begun:  # it steps by the other's steps
            return
        is_shared = any(parameter in self._layer_of for parameter in _parameters(other))
        over = "the same parameters" if is_shared else "parameters that the model has got since"
        self._guard.warn_once(
            "a replaced optimizer",
            f"step {self._guard.step} does not end: the {type(watched).__name__} given to `attach` has not "
            f"stepped, while another optimizer, {type(other).__name__}, steps over {over}. "
            "Nothing is recorded until it does. If it is in use no more, close the probe and attach with the "
            "new one.",
        )

    def _about_to_change(self, optimizer: Optimizer) -> Watched:
        return self._parameters.among(_with_gradients(_parameters(optimizer)))

    def _measure_gradients(self, watched: Watched, grad_scale: Tensor | None) -> None:
        # Ranks may communicate here: no failure keeps one from it.
        parts, weights = self._sharding.parts_and_weights(_gradients(watched))
        self._guard(
            GRADIENTS,
            measure_gradients,
            self._pending,
            watched,
            parts,
            weights,
            grad_scale,
            is_detailed=self._is_detailed,
        )

    def _is_measured(self, optimizer: Optimizer) -> bool:
        """Of an optimizer that steps several times before the others do (a critic), the first step counts."""
        return (self._is_recorded or self._is_detailed) and optimizer not in self._stepped


def _has_closure(args: tuple, kwargs: dict) -> bool:
    """Whether ``optimizer.step(closure)`` was called; ``args`` begins with the optimizer itself."""
    return any(callable(argument) for argument in (*args[1:], *kwargs.values()))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _with_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.grad is not None]


def _gradients(watched: Watched) -> list[Tensor]:
    return [parameter.grad for parameter in watched.parameters if parameter.grad is not None]

"""What is measured, and when: every hook of one probe, and its clock, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from probes.activations import Activations
from probes.attention_calls import AttentionCalls
from probes.compiled_layers import CompiledLayers, What
from probes.grad_scaler import observe_grad_scaler
from probes.guard import GRADIENTS, UPDATES, WEIGHTS, Guard, outputs_of
from probes.layer_jacobians import measure_layer_jacobian
from probes.layers import activation_layers, outermost_blocks, parameter_layers
from probes.optimizer_state import OptimizerState
from probes.parameter_gradients import measure_gradients, measure_weights
from probes.pending import LOSS_FACTOR, Pending
from probes.rank_witness import FIRST_GRADIENT_NORM, RankWitness
from probes.record import ALL_LAYERS, Series
from probes.schedule import Schedule, is_due
from probes.sharding import Sharding
from stability.module_calls import ModuleCalls, in_backward

SKIPPED_STEP = Series(ALL_LAYERS, "skipped_step")


class Watch:
    """Measures a model's training steps.

    Args:
        names: Name of every module, the model first.
        optimizers: Those whose steps end a step; without any, ``end_step`` is called from outside.
        selected: Layers that are watched.
        schedule: When.
        attention_rows: Query rows sampled per sequence, or None for all.
        sharding: Which part of the model and the batch is here.
        has_ranks: Whether other ranks train the model too.
        before_step_ends: Called before the last optimizer steps; after it, if a closure makes the forward
            pass within the step. May raise.
        after_step: Called with a step that has ended and its measurements; may raise.

    Attributes:
        attention: The attention calls.
        pending: Measurements of the step under way.
    """

    def __init__(
        self,
        names: dict[nn.Module, str],
        optimizers: Sequence[Optimizer],
        *,
        selected: set[str],
        schedule: Schedule,
        attention_rows: int | None,
        sharding: Sharding,
        has_ranks: bool,
        before_step_ends: Callable[[], None],
        after_step: Callable[[int, Pending], None],
    ) -> None:
        self.pending = Pending()
        self._guard = Guard(self.pending)
        self._optimizers = tuple(optimizers)
        self._schedule = schedule
        self._before_step_ends = before_step_ends
        self._after_step = after_step
        self._selected = selected
        self._layer_of = parameter_layers(names)
        self._layers = activation_layers(names, selected)
        blocks = outermost_blocks(next(iter(names)))
        self._blocks = {names[module] for module in blocks} & selected
        first_block = next(module for module in names if module in blocks)
        self._witness = RankWitness(first_block, self._see_first_gradient) if has_ranks else None
        self._measured_layers: set[str] = set()
        self._is_forward_seen = False
        self._sharding = sharding
        self._activations = Activations(self.pending, self._guard, sharding)
        self._optimizer_state = OptimizerState(
            {parameter: layer for parameter, layer in self._layer_of.items() if layer in selected}, sharding
        )
        self._module_calls = ModuleCalls(names, self._before_module, self._after_module)
        self.attention = AttentionCalls(
            self.pending, self._module_calls, selected, attention_rows, self._guard, sharding
        )
        self._compiled_layers = CompiledLayers(self._layers | self._blocks, self._see_compiled)
        self._sees_attention = bool(schedule.attention or schedule.layer_jacobians)
        self._module_calls.tracers = (
            (self._compiled_layers, self.attention) if self._sees_attention else (self._compiled_layers,)
        )
        self._stepped: set[Optimizer] = set()
        self._scaled_optimizer: Optimizer | None = None  # which a GradScaler is about to step, or not
        self._jacobians_measured: set[str] = set()
        self._is_measuring_jacobian = False
        self._module_hooks = ExitStack()
        self._are_modules_hooked = False
        self._is_released = False

    @property
    def step(self) -> int:
        """Steps that have ended."""
        return self._guard.step

    def install(self, handles: ExitStack) -> None:
        """Hooks everything; ends when ``handles`` closes."""
        handles.callback(self._let_go)
        handles.callback(self._compiled_layers.close)
        if self._sees_attention:
            self.attention.install(handles)
        if self._witness is not None:
            self._witness.install(handles)
        handles.enter_context(observe_grad_scaler(self._before_scaler_step, self._after_scaler_step))
        for optimizer in self._optimizers:
            handles.callback(optimizer.register_step_pre_hook(self._before_optimizer).remove)
            handles.callback(optimizer.register_step_post_hook(self._after_optimizer).remove)
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Decides what the step that begins now records."""
        self._guard.step = step
        schedule = self._schedule
        self._is_recorded = is_due(step, schedule.gradients)
        self._is_detailed = is_due(step, schedule.details)
        self._activations.is_detailed = self._is_detailed
        self._measured_layers = set()
        if self._is_detailed:
            self._measured_layers = self._layers | self._blocks
        elif is_due(step, schedule.activations):
            self._measured_layers = self._blocks
        self._is_jacobian_due = is_due(step, schedule.layer_jacobians)
        self.attention.step = step if is_due(step, schedule.attention) else None
        self._jacobians_measured.clear()
        self._stepped.clear()
        self._hook_modules(
            bool(self._measured_layers) or self._is_jacobian_due or self.attention.step is not None
        )

    def end_step(self) -> None:
        """Hands the step's measurements over and begins the next."""
        self._say_what_was_missed()
        self._is_forward_seen = False
        self._activations.end_step()
        step, pending = self.step, self.pending.take()
        self.begin_step(step + 1)
        self._after_step(step, pending)  # last, since it may raise what the user asked it to

    def measure_gradients(self) -> None:
        """Measures gradients and weights of all parameters, where no optimizer says when."""
        if self._is_recorded or self._is_detailed:
            self._measure_gradients(self._layer_of, None)
            self._guard(WEIGHTS, self._measure_weights, self._layer_of, has_closure=False)

    def _say_what_was_missed(self) -> None:
        if self._measured_layers and self.pending.has("grad_norm") and not self._is_forward_seen:
            self._guard.warn_once(
                "forward passes",
                f"no forward pass of the model was seen in step {self.step}. A model that is called by its "
                "`forward` method, or compiled by a torch before 2.13, shows gradients and weights only; "
                "call the model itself.",
            )
        if self._is_jacobian_due and self.attention.is_compiled and not self._jacobians_measured:
            self._guard.warn_once(
                "layer Jacobians",
                "layer Jacobians are not measured in compiled code: torch.func cannot run a layer that is "
                "part of a graph. Leave `layer_jacobian_every` out, or the model uncompiled.",
            )

    def _let_go(self) -> None:
        self._is_released = True
        self._module_hooks.close()
        self._activations.end_step()

    def _hook_modules(self, is_needed: bool) -> None:
        """Hooks or unhooks modules: following them costs more than a step that measures none of them may.

        In compiled code the hooks stay, or there would be a second graph without them.
        """
        if self._is_released:
            return
        is_needed = is_needed or self.attention.is_compiled or self._compiled_layers.is_compiled
        if is_needed and not self._are_modules_hooked:
            self._module_calls.install(self._module_hooks)
        elif not is_needed:
            self._module_hooks.close()
        self._are_modules_hooked = is_needed

    def _before_module(self, module: nn.Module, name: str, args: tuple) -> None:
        if self._is_measuring_jacobian or not torch.is_grad_enabled():  # validation is not recorded
            return
        if len(self._module_calls.running) == 1 and not in_backward():  # the outermost call, whatever it is
            self._is_forward_seen = True
            self._activations.start_forward()
            self.attention.start_forward()
        if name in self._measured_layers:
            self._guard(f"inputs of {name}", self._activations.see_input, name, args)

    def _after_module(self, module: nn.Module, name: str, args: tuple, kwargs: dict, output: object) -> None:
        if self._is_measuring_jacobian or not torch.is_grad_enabled() or output is None:
            return
        if name in self._measured_layers:
            self._guard(outputs_of(name), self._activations.see_output, name, output)
        if self._sees_attention:
            self.attention.end_module(name)
        if (
            self._is_jacobian_due
            and (name, 0) in self.attention.sites
            and name not in self._jacobians_measured
        ):
            self._jacobians_measured.add(name)
            self._is_measuring_jacobian = self.attention.is_paused = True
            try:
                self._guard(
                    "layer Jacobians", measure_layer_jacobian, self.pending, name, module, args, kwargs
                )
            finally:
                self._is_measuring_jacobian = self.attention.is_paused = False

    def _see_first_gradient(self, gradient: Tensor) -> None:
        if self._is_recorded:
            self._activations.measure_gradient(gradient, [FIRST_GRADIENT_NORM])

    def _see_compiled(self, what: What, layer: str, call: int, tensor: Tensor) -> None:
        self._is_forward_seen = True
        if layer not in self._measured_layers:
            return
        if what != "output":
            self._measure_compiled_gradient(what, layer, call, tensor)
        elif not in_backward():  # activation checkpointing runs the layer again
            self._activations.measure_output(layer, call, tensor)

    def _measure_compiled_gradient(self, what: What, layer: str, call: int, gradient: Tensor) -> None:
        if what == "gradient at input":
            series = [Series(layer, "_input_grad_norm", call=call)]
        else:
            has_input = what == "gradient at output, with input"
            series = self._activations.output_gradient_series(layer, call, has_input=has_input)
        self._activations.measure_gradient(gradient, series)

    def _before_scaler_step(self, optimizer: Optimizer, factor: Tensor) -> None:
        if optimizer not in self._optimizers:
            return
        self._scaled_optimizer = optimizer
        if self._measured_layers and not self.pending.has(LOSS_FACTOR.quantity):
            weight = self._sharding.copy_weight
            self.pending.add(LOSS_FACTOR, factor.clone().reshape(()), weight=weight)

    def _after_scaler_step(self, optimizer: Optimizer) -> None:
        if self._scaled_optimizer is not optimizer:
            return  # its own hook has seen the step, or it is somebody else's
        self._scaled_optimizer = None
        if self._is_measured(optimizer):
            self._measure_gradients(_parameters(optimizer), None)
        self.pending.add_number(SKIPPED_STEP, 1.0)
        self._finish(optimizer)

    def _before_optimizer(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        is_scaled, self._scaled_optimizer = self._scaled_optimizer is optimizer, None
        has_closure = _has_closure(args, kwargs)
        if not has_closure:
            self._check_before_end(optimizer)
        if not self._is_measured(optimizer):
            return
        if is_scaled:
            # A fused optimizer is called in any case, and told on the device whether to step.
            found_inf = getattr(optimizer, "found_inf", None)
            if found_inf is None:
                self.pending.add_number(SKIPPED_STEP, 0.0)
            else:
                self.pending.add(SKIPPED_STEP, (found_inf > 0).double())
        if not has_closure:
            # A GradScaler leaves unscaling to optimizers that are fused.
            grad_scale = getattr(optimizer, "grad_scale", None)
            self._measure_gradients(_parameters(optimizer), grad_scale)
        self._guard(WEIGHTS, self._measure_weights, _parameters(optimizer), has_closure=has_closure)
        if self._is_detailed:
            self._guard(UPDATES, self._optimizer_state.before, optimizer, has_closure=has_closure)

    def _after_optimizer(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        has_closure = _has_closure(args, kwargs)
        if has_closure:
            self._check_before_end(optimizer)
        if self._is_measured(optimizer):
            if has_closure:  # the closure has just computed the gradients
                self._measure_gradients(_parameters(optimizer), None)
            if self._is_detailed:
                gradients = self._parts_of_gradients(_parameters(optimizer))
                self._guard(UPDATES, self._optimizer_state.after, self.pending, optimizer, gradients)
        self._finish(optimizer)

    def _check_before_end(self, optimizer: Optimizer) -> None:
        if len(self._stepped | {optimizer}) == len(self._optimizers):
            self._before_step_ends()

    def _finish(self, optimizer: Optimizer) -> None:
        self._stepped.add(optimizer)
        if len(self._stepped) == len(self._optimizers):
            self.end_step()

    def _measure_gradients(self, parameters: Iterable[Tensor], grad_scale: Tensor | None) -> None:
        self._guard(
            GRADIENTS,
            measure_gradients,
            self.pending,
            self._layer_of,
            self._selected,
            self._parts_of_gradients(parameters),
            grad_scale,
            sharding=self._sharding,
            is_detailed=self._is_detailed,
        )

    @torch.no_grad()
    def _parts_of_gradients(self, parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """This rank's part of each gradient. Ranks may communicate here: no failure keeps one from it."""
        return {
            parameter: self._sharding.part(parameter.grad)
            for parameter in parameters
            if parameter.grad is not None and parameter in self._layer_of
        }

    def _measure_weights(self, parameters: Iterable[Tensor], *, has_closure: bool) -> None:
        measure_weights(
            self.pending,
            self._layer_of,
            self._selected,
            parameters,
            sharding=self._sharding,
            has_closure=has_closure,
        )

    def _is_measured(self, optimizer: Optimizer) -> bool:
        """Of an optimizer that steps several times before the others do (a critic), the first step counts."""
        return (self._is_recorded or self._is_detailed) and optimizer not in self._stepped


def _has_closure(args: tuple, kwargs: dict) -> bool:
    """Whether ``optimizer.step(closure)`` was called; ``args`` begins with the optimizer itself."""
    return any(callable(argument) for argument in (*args[1:], *kwargs.values()))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]

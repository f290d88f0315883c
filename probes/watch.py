"""What is measured, and when: every hook of one probe, and its clock, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from probes.activations import Activations
from probes.attention_calls import AttentionCalls
from probes.compiled_layers import CompiledLayers, What
from probes.guard import JACOBIANS, Guard, inputs_of, outputs_of
from probes.layer_jacobians import measure_layer_jacobian
from probes.layers import activation_layers, outermost_blocks, parameter_layers
from probes.optimizer_watch import OptimizerWatch
from probes.pending import Pending
from probes.rank_witness import FIRST_GRADIENT_NORM, RankWitness
from probes.record import Series
from probes.schedule import Schedule, is_due
from probes.sharding import Sharding
from stability.module_calls import ModuleCalls, in_backward, is_mapped

# Calls of modules in a step; forward passes beyond are not measured. Otherwise a training whose optimizer is
# another one by now would fill the memory. Not measurements: ranks have to stop at the same call.
MAX_CALLS = 2**18


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
        self._schedule = schedule
        self._tell_before_end = before_step_ends
        self._after_step = after_step
        self._model = next(iter(names))
        self._layers = activation_layers(names, selected)
        blocks = outermost_blocks(self._model)
        self._blocks = {names[module] for module in blocks} & selected
        first_block = next(module for module in names if module in blocks)
        self._witness = RankWitness(first_block, self._see_first_gradient) if has_ranks else None
        self._measured_layers: set[str] = set()
        self._is_forward_seen = False
        self._num_calls = 0
        self._activations = Activations(self.pending, self._guard, sharding)
        self._layer_of = parameter_layers(names)
        self._optimizer_watch = OptimizerWatch(
            self.pending,
            self._guard,
            optimizers,
            self._layer_of,
            selected,
            sharding,
            lambda: self._new_parameters().values(),
            self._before_step_ends,
            self.end_step,
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
        self._optimizer_watch.install(handles)
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """Decides what the step that begins now records."""
        self._guard.step = step
        self._num_calls = 0
        schedule = self._schedule
        self._is_recorded = is_due(step, schedule.gradients)
        is_detailed = is_due(step, schedule.details)
        self._activations.is_detailed = is_detailed
        self._measured_layers = set()
        if is_detailed:
            self._measured_layers = self._layers | self._blocks
        elif is_due(step, schedule.activations):
            self._measured_layers = self._blocks
        self._is_jacobian_due = is_due(step, schedule.layer_jacobians)
        self.attention.begin_step(step if is_due(step, schedule.attention) else None)
        self._jacobians_measured.clear()
        self._optimizer_watch.begin_step(
            is_recorded=self._is_recorded,
            is_detailed=is_detailed,
            has_activations=bool(self._measured_layers),
        )
        self._hook_modules(
            bool(self._measured_layers) or self._is_jacobian_due or self.attention.step is not None
        )

    def end_step(self) -> None:
        """Hands the step's measurements over and begins the next."""
        self._say_what_was_missed()
        self._is_forward_seen = False
        self._module_calls.end_step()
        self._activations.put_in_order()
        self._activations.end_step()
        self.attention.summarize()
        step, pending = self.step, self.pending.take()
        self.begin_step(step + 1)
        self._after_step(step, pending)  # last, since it may raise what the user asked it to

    def measure_gradients(self) -> None:
        """Measures gradients and weights of all parameters, where no optimizer says when."""
        self._optimizer_watch.measure_gradients()

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
        if self._activations.is_detailed and (new := list(self._new_parameters())):
            self._guard.warn_once(
                "new parameters",
                f"the model has parameters that it did not have when the probe was attached: {new[0]}"
                f"{f' and {len(new) - 1} more' if new[1:] else ''}. They are not recorded; attach when the "
                "model is complete.",
            )

    def _new_parameters(self) -> dict[str, nn.Parameter]:
        """By name, those that the model has got since the probe was attached."""
        named = self._model.named_parameters()
        return {name: parameter for name, parameter in named if parameter not in self._layer_of}

    def _before_step_ends(self) -> None:
        self.attention.summarize()  # verdicts may be asked for before the update
        self._activations.put_in_order()
        self._tell_before_end()

    def _let_go(self) -> None:
        self._is_released = True
        self._module_hooks.close()
        self.attention.summarize()
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
        if is_mapped():
            self._say_it_is_mapped()
            return
        self._num_calls += 1
        if len(self._module_calls.running) == 1:  # the outermost call, whatever it is
            self._is_forward_seen = True
            if self._num_calls > MAX_CALLS:
                self._stop_following()
            if not in_backward():
                self._activations.start_forward()
                self.attention.start_forward()
        if name in self._measured_layers:
            self._guard(inputs_of(name), self._activations.see_input, name, args)

    def _after_module(self, module: nn.Module, name: str, args: tuple, kwargs: dict, output: object) -> None:
        if self._is_measuring_jacobian or output is None:
            return
        if name in self._measured_layers:
            self._activations.note_place(name)
        if not torch.is_grad_enabled() or is_mapped():
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
                self._guard(JACOBIANS, measure_layer_jacobian, self.pending, name, module, args, kwargs)
            finally:
                self._is_measuring_jacobian = self.attention.is_paused = False

    def _say_it_is_mapped(self) -> None:
        self._is_forward_seen = True
        self._guard.warn_once(
            "mapped forward passes",
            "the model runs under torch.vmap, where outputs and attention cannot be measured: such forward "
            "passes are left out. All others, the gradients that the optimizer receives, weights and updates "
            "are recorded.",
        )

    def _stop_following(self) -> None:
        """Measures no further forward pass of the step under way."""
        self.attention.summarize()
        self.attention.begin_step(None)
        self._measured_layers = set()
        self._is_jacobian_due = False
        self._guard.warn_once(
            "more forward passes",
            f"step {self.step} has not ended after {self._num_calls:,} calls of modules; no further forward "
            "pass of it is measured. If the optimizer given to `attach` is in use no more, close the probe "
            "and attach with the new one; put evaluation under torch.no_grad().",
        )

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

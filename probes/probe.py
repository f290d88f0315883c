"""One object that watches one model: it owns every hook, and its clock is the optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from numbers import Real
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from probes.activations import Activations
from probes.attention_calls import AttentionCalls, AttentionSite
from probes.compiled_layers import CompiledLayers, What
from probes.delivery import Delivery, ProbeWarning
from probes.grad_scaler import observe_grad_scaler
from probes.layer_jacobians import measure_layer_jacobian
from probes.layers import activation_layers, outermost_blocks, parameter_layers
from probes.optimizer_state import OptimizerState
from probes.parameter_gradients import measure_gradients
from probes.pending import Pending
from probes.quantities import QUANTITIES
from probes.record import ALL_LAYERS, Record, Series
from stability.divergence import Alert
from stability.module_calls import ModuleCalls, in_backward


class Probe:
    """Watches a model while it trains. Made by :func:`probes.attach`, which explains the arguments.

    The numbers of a step are written, and verdicts on them given, when the next recorded step ends.
    """

    def __init__(
        self,
        names: dict[nn.Module, str],
        optimizers: Sequence[Optimizer],
        delivery: Delivery,
        *,
        selected: set[str],
        every: int,
        details_every: int,
        attention_every: int,
        attention_rows: int | None,
        is_attention_required: bool,
        layer_jacobian_every: int,
    ) -> None:
        self._optimizers = tuple(optimizers)
        self._delivery = delivery
        self._every = every
        self._details_every = details_every
        self._attention_every = attention_every
        self._is_attention_required = is_attention_required
        self._layer_jacobian_every = layer_jacobian_every

        self._layer_of = parameter_layers(names)
        self._selected = selected
        self._detailed_layers = activation_layers(names, selected)
        blocks = outermost_blocks(next(iter(names)))
        self._blocks = {names[module] for module in blocks} & self._detailed_layers
        self._activation_layers: set[str] = set()
        self._pending = Pending()
        self._activations = Activations(self._pending, self._guard)
        self._optimizer_state = OptimizerState(
            {parameter: layer for parameter, layer in self._layer_of.items() if layer in selected}
        )
        self._compiled_layers = CompiledLayers(self._detailed_layers if every else set(), self._see_compiled)
        self._module_calls = ModuleCalls(names, self._before_module, self._after_module)
        self._attention = AttentionCalls(
            self._pending, self._module_calls, selected, attention_rows, self._guard
        )
        self._module_calls.tracers = (self._compiled_layers, self._attention)

        self._step = 0
        self._in_scaler_step = False
        self._is_optimizer_called = False
        self._stepped: set[Optimizer] = set()
        self._jacobians_measured: set[str] = set()
        self._is_measuring_jacobian = False
        self._failed: set[str] = set()
        self._is_closed = False
        self._handles = ExitStack()
        with ExitStack() as on_failure:  # an attach that fails half-way leaves no hook
            on_failure.callback(self._handles.close)
            self._install()
            on_failure.pop_all()

    @property
    def is_closed(self) -> bool:
        """Whether the probe has let go of the model."""
        return self._is_closed

    @property
    def records(self) -> list[Record]:
        """The records in memory, oldest first: the newest two million; the running step comes later."""
        return list(self._delivery.memory)

    @property
    def alerts(self) -> list[Alert]:
        """Every alert so far."""
        return list(self._delivery.memory.alerts)

    @property
    def attention_sites(self) -> list[AttentionSite]:
        """Where the model computes attention, as far as its forward passes have shown."""
        return [*self._attention.sites.values(), *self._attention.unseen.values()]

    def log(self, **values: float | Tensor) -> None:
        """Records numbers of the training script, such as the loss, with the step under way.

        Call it before the optimizer's step. Tensors stay on their device until the step's one copy; several
        values of one name in a step (gradient accumulation) are averaged.

        Args:
            **values: Numbers, or tensors with one element, by name.

        Raises:
            RuntimeError: After ``close``.
            TypeError: For anything that is not a number.
            ValueError: For a tensor with several elements or a complex one, or a name of the probe's own.
        """
        self._check_open("log")
        for name, value in values.items():
            series = Series(ALL_LAYERS, name)
            if name in QUANTITIES or name.startswith("_"):
                raise ValueError(f"`{name}` is a name of the probe's own; log under another one.")
            if isinstance(value, Tensor):
                if value.numel() != 1 or value.is_complex():
                    raise ValueError(
                        f"`{name}` must have one real element; got shape {tuple(value.shape)} of "
                        f"{value.dtype}. Log its mean, say."
                    )
                # A copy: the script may go on adding to a running loss.
                self._pending.add(series, value.detach().reshape(()).clone())
            elif isinstance(value, Real):
                self._pending.add_number(series, float(value))
            else:
                raise TypeError(f"`{name}` must be a number or a tensor; got {type(value).__name__}.")

    def step(self) -> None:
        """Ends a step when ``attach`` was given no optimizer; call it after the backward pass.

        Raises:
            RuntimeError: After ``close``, or if an optimizer was given: its own step is the clock then.
            DivergenceError: If the step before shows divergence and ``on_divergence="raise"``.
        """
        self._check_open("step")
        if self._optimizers:
            raise RuntimeError(
                "probe.step() is for probes without an optimizer; this one's steps end with "
                "optimizer.step(). Remove the call."
            )
        self._check_attention_seen()
        if self._is_recorded:
            self._guard(
                "gradients",
                measure_gradients,
                self._pending,
                self._layer_of,
                self._selected,
                self._layer_of,
                is_detailed=self._is_detailed,
            )
        self._end_step()

    def close(self) -> None:
        """Detaches from the model and brings all that was recorded to the sinks. Safe to call twice.

        Raises:
            DivergenceError: If the last step shows divergence and ``on_divergence="raise"``.
        """
        self._close(silently=False)

    def state_dict(self) -> dict[str, Any]:
        """Step count and detector state, to be saved with a checkpoint. Waits for the last step's numbers.

        Raises:
            DivergenceError: If they show divergence and ``on_divergence="raise"``.
        """
        self._delivery.flush()
        return {"step": self._step, "detectors": self._delivery.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state_dict`` was taken.

        Raises:
            ValueError: If the detectors are not the ones the state was saved from.
        """
        self._delivery.load_state_dict(state["detectors"])
        self._step = state["step"]
        self._begin_step()

    def on_close(self, callback: Callable[[], object]) -> None:
        """Registers a function to be called when the probe lets go of the model."""
        self._handles.callback(callback)

    def __enter__(self) -> Probe:
        """Returns the probe; leaving the block closes it, also on an exception."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the probe; a verdict does not take the place of an exception under way."""
        self._close(silently=error is not None)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "attached"
        num_records = len(self._delivery.memory)
        return f"<Probe {state}: step {self._step}, {num_records} records, {len(self.alerts)} alerts>"

    def _install(self) -> None:
        self._handles.callback(self._compiled_layers.close)
        if self._every or self._attention_every or self._layer_jacobian_every:
            self._module_calls.install(self._handles)
            self._attention.install(self._handles)
        self._handles.enter_context(
            observe_grad_scaler(self._after_scaling, self._before_scaler_step, self._after_scaler_step)
        )
        for optimizer in self._optimizers:
            self._handles.callback(optimizer.register_step_pre_hook(self._before_optimizer).remove)
            self._handles.callback(optimizer.register_step_post_hook(self._after_optimizer).remove)
        self._begin_step()

    def _begin_step(self) -> None:
        """Decides what the step that begins now records."""
        self._is_recorded = _is_due(self._step, self._every)
        self._is_detailed = self._is_recorded and _is_due(self._step, self._details_every)
        self._activations.is_detailed = self._is_detailed
        self._activation_layers = self._detailed_layers if self._is_detailed else self._blocks
        self._is_jacobian_due = _is_due(self._step, self._layer_jacobian_every)
        self._attention.step = self._step if _is_due(self._step, self._attention_every) else None
        self._jacobians_measured.clear()
        self._stepped.clear()

    def _end_step(self) -> None:
        self._activations.end_step()
        step, pending = self._step, self._pending.take()
        self._step += 1
        self._begin_step()
        self._delivery.send(step, pending)  # last, since it may raise what the user asked it to

    def _before_module(self, module: nn.Module, name: str, args: tuple) -> None:
        if self._is_measuring_jacobian or not torch.is_grad_enabled():  # validation is not recorded
            return
        if len(self._module_calls.running) == 1 and not in_backward():  # the outermost call, whatever it is
            self._activations.start_forward()
            self._attention.start_forward()
        if self._is_recorded and name in self._activation_layers:
            self._guard(f"inputs of {name}", self._activations.see_input, name, args)

    def _after_module(self, module: nn.Module, name: str, args: tuple, kwargs: dict, output: object) -> None:
        if self._is_measuring_jacobian or not torch.is_grad_enabled() or output is None:
            return
        if self._is_recorded and name in self._activation_layers:
            self._guard(f"outputs of {name}", self._activations.see_output, name, output)
        self._attention.end_module(name)
        if (
            self._is_jacobian_due
            and (name, 0) in self._attention.sites
            and name not in self._jacobians_measured
        ):
            self._jacobians_measured.add(name)
            self._is_measuring_jacobian = self._attention.is_paused = True
            try:
                self._guard(
                    "layer Jacobians", measure_layer_jacobian, self._pending, name, module, args, kwargs
                )
            finally:
                self._is_measuring_jacobian = self._attention.is_paused = False

    def _see_compiled(self, what: What, layer: str, call: int, tensor: Tensor) -> None:
        if not self._is_recorded or layer not in self._activation_layers:
            return
        if what != "output":
            self._guard("gradients", self._measure_compiled_gradient, what, layer, call, tensor)
        elif not in_backward():  # activation checkpointing runs the layer again
            self._guard(f"outputs of {layer}", self._activations.measure_output, layer, call, tensor)

    def _measure_compiled_gradient(self, what: What, layer: str, call: int, gradient: Tensor) -> None:
        if what == "gradient at input":
            series = [Series(layer, "_input_grad_norm", call=call)]
        else:
            has_input = what == "gradient at output, with input"
            series = self._activations.output_gradient_series(layer, call, has_input=has_input)
        self._activations.measure_gradient(gradient, series)

    def _after_scaling(self, factor: Tensor) -> None:
        self._activations.loss_factor = factor

    def _before_scaler_step(self, optimizer: Optimizer) -> None:
        self._in_scaler_step, self._is_optimizer_called = True, False

    def _after_scaler_step(self, optimizer: Optimizer) -> None:
        self._in_scaler_step = False
        if optimizer not in self._optimizers or self._is_optimizer_called:
            return
        if self._is_measured(optimizer):
            self._guard("gradients", self._measure_gradients, optimizer)
        self._pending.add_number(SKIPPED_STEP, 1.0)
        self._stepped.add(optimizer)
        if len(self._stepped) == len(self._optimizers):
            self._end_step()

    def _before_optimizer(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._is_optimizer_called = True
        if len(self._stepped | {optimizer}) == len(self._optimizers):  # the step is complete otherwise
            self._check_attention_seen()
        if self._is_measured(optimizer):
            has_closure = _has_closure(args, kwargs)
            if self._in_scaler_step:
                # A fused optimizer is called in any case, and told on the device whether to step.
                found_inf = getattr(optimizer, "found_inf", None)
                if found_inf is None:
                    self._pending.add_number(SKIPPED_STEP, 0.0)
                else:
                    self._pending.add(SKIPPED_STEP, (found_inf > 0).double())
            if not has_closure:
                self._guard("gradients", self._measure_gradients, optimizer)
            if self._is_detailed:
                self._guard("weights", self._measure_weights, optimizer, has_closure)

    def _after_optimizer(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if self._is_measured(optimizer):
            if _has_closure(args, kwargs):  # the closure has just computed the gradients
                self._guard("gradients", self._measure_gradients, optimizer)
            if self._is_detailed:
                self._guard("updates", self._optimizer_state.after, self._pending, optimizer)
        self._stepped.add(optimizer)
        if len(self._stepped) == len(self._optimizers):
            self._end_step()

    def _measure_gradients(self, optimizer: Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        grad_scale = getattr(optimizer, "grad_scale", None)  # a GradScaler leaves unscaling to fused steps
        measure_gradients(
            self._pending,
            self._layer_of,
            self._selected,
            parameters,
            grad_scale,
            is_detailed=self._is_detailed,
        )

    def _measure_weights(self, optimizer: Optimizer, has_closure: bool) -> None:
        self._optimizer_state.before(self._pending, optimizer, has_closure=has_closure)

    def _is_measured(self, optimizer: Optimizer) -> bool:
        """Of an optimizer that steps several times before the others do (a critic), the first step counts."""
        return self._is_recorded and optimizer not in self._stepped

    def _guard(self, what: str, measure: Callable[..., None], *arguments: object, **options: object) -> None:
        """Runs a measurement; one that fails is given up with a warning, the training goes on."""
        if what in self._failed:
            return
        try:
            measure(*arguments, **options)
        except Exception as error:
            self._failed.add(what)
            warnings.warn(
                f"measuring {what} failed at step {self._step} and is given up; training goes on: {error!r}",
                ProbeWarning,
                stacklevel=2,
            )

    def _close(self, *, silently: bool) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._handles.close()
        self._activations.end_step()
        try:
            if self._pending:  # a step that an exception or an interrupt cut short
                self._delivery.send(self._step, self._pending.take())
        finally:
            self._delivery.close(silently=silently)

    def _check_open(self, method: str) -> None:
        if self._is_closed:
            raise RuntimeError(f"probe.{method}() after close(); attach a new probe to go on recording.")

    def _check_attention_seen(self) -> None:
        if self._is_attention_required and self._attention.step is not None and not self._attention.sites:
            raise ValueError(
                "`attention_every` was given, but the model made no attention call that can be seen. Declare "
                "attention that is written by hand with stability.attention.report_attention, or leave "
                "`attention_every` out for a model without attention."
            )


SKIPPED_STEP = Series(ALL_LAYERS, "skipped_step")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _has_closure(args: tuple, kwargs: dict) -> bool:
    """Whether ``optimizer.step(closure)`` was called; ``args`` begins with the optimizer itself."""
    return any(callable(argument) for argument in (*args[1:], *kwargs.values()))

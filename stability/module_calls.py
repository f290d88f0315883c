"""Follows which module of the model is running, without leaving anything on the model.

The hooks are PyTorch's process-wide module hooks, filtered by a dictionary look-up: the watched model carries
no hook of its own, so its ``state_dict()``, ``copy.deepcopy`` and ``torch.save`` are what they were, and a
copy of it is not watched.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

# Torch warns that process-wide hooks see its compiled wrapper too; these look for the model's modules only.
_OF_COMPILED_WRAPPER = "Using `torch.compile\\(module\\)` when there are global hooks"

# What belongs to the outermost module itself, whose own name is empty.
ROOT_LAYER = "(root)"


Before = Callable[[nn.Module, str, tuple], None]
After = Callable[[nn.Module, str, tuple, dict, object], None]


class ModuleTracer(Protocol):
    """Follows the modules of a forward pass, with gradients, that ``torch.compile`` traces. Traced itself."""

    def trace_start(self, layer: str, args: tuple) -> None:
        """A module starts."""
        ...

    def trace_return(self, layer: str, output: object) -> None:
        """A module has returned."""
        ...

    def trace_end(self) -> None:
        """What is compiled has been traced: nothing may be left that other graphs would be guarded by."""
        ...


class ModuleCalls:
    """Names the innermost running module, and tells observers when modules of the model start and end.

    Forward passes of other models are not reported.

    Args:
        names: Name of every module of the model.
        before: Called with (module, name, args) when a module starts.
        after: Called with (module, name, args, kwargs, output) when it has returned. Where it raised, torch
            leaves out the keyword arguments and gives None as the output.

    Attributes:
        names: As given.
        tracers: Who follows the modules that ``torch.compile`` traces.
    """

    def __init__(self, names: dict[nn.Module, str], before: Before, after: After) -> None:
        self.names = names
        self.tracers: tuple[ModuleTracer, ...] = ()
        self._before = before
        self._after = after
        self._thread = _Thread()
        self._traced: list[str] = []  # no part of the thread's: dynamo does not trace those everywhere

    @property
    def running(self) -> list[str]:
        """Names of the modules that run on this thread, or that are being traced, outermost first."""
        return self._traced if torch.compiler.is_compiling() else self._thread.running

    @property
    def current_layer(self) -> str | None:
        """Name of the innermost running module, or None outside the model's forward pass."""
        running = self.running
        return running[-1] if running else None

    @property
    def num_others(self) -> int:
        """How many modules of other models are running."""
        return self._thread.num_others

    def install(self, handles: ExitStack) -> None:
        """Registers the hooks; they go when ``handles`` closes."""
        handles.callback(register_module_forward_pre_hook(self._start).remove)
        # Once: each new filter makes Python show again what it has shown once of every place.
        if not any(getattr(entry[1], "pattern", None) == _OF_COMPILED_WRAPPER for entry in warnings.filters):
            warnings.filterwarnings("ignore", _OF_COMPILED_WRAPPER)
        # always_call: a module that raises must not stay on the stack.
        handles.callback(register_module_forward_hook(self._end, with_kwargs=True, always_call=True).remove)

    def end_step(self) -> None:
        """Forgets submodules, called without the model, that a KeyboardInterrupt has left on the stack."""
        if self._thread.running[:1] != [ROOT_LAYER]:
            self._thread.running.clear()

    def _start(self, module: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling():
            self._trace_start(module, args)
            return
        if torch.jit.is_tracing():
            return
        name = self.names.get(module)
        if name is None:
            self._thread.num_others += 1
            return
        if name == ROOT_LAYER:
            self._thread.running.clear()  # a KeyboardInterrupt skips always_call hooks
            self._traced.clear()
        self._thread.running.append(name)
        self._before(module, name, args)

    def _end(self, module: nn.Module, args: tuple, *kwargs_and_output: Any) -> None:
        kwargs, output = kwargs_and_output if len(kwargs_and_output) == 2 else ({}, None)
        if torch.compiler.is_compiling():
            self._trace_end(module, output)
            return
        name = self.names.get(module)
        if name is None:
            self._thread.num_others = max(0, self._thread.num_others - 1)
        if name not in self._thread.running:
            return
        while self._thread.running.pop() != name:
            pass
        self._after(module, name, args, kwargs, output)

    def _trace_start(self, module: nn.Module, args: tuple) -> None:
        name = self.names.get(module)
        if name is None or not self.tracers or torch.compiler.is_exporting():
            return
        self._traced.append(name)
        if torch.is_grad_enabled():
            for tracer in self.tracers:
                tracer.trace_start(name, args)

    def _trace_end(self, module: nn.Module, output: object) -> None:
        name = self.names.get(module)
        if name not in self._traced:
            return
        while self._traced.pop() != name:
            pass
        if output is not None and torch.is_grad_enabled():
            for tracer in self.tracers:
                tracer.trace_return(name, output)
        if not self._traced:
            for tracer in self.tracers:
                tracer.trace_end()


class _Thread(threading.local):
    def __init__(self) -> None:
        self.running: list[str] = []
        self.num_others = 0


def layer_names(model: nn.Module) -> dict[nn.Module, str]:
    """Name of every module, in model order; a module registered twice keeps its first name."""
    return {module: name or ROOT_LAYER for name, module in model.named_modules()}


def in_backward() -> bool:
    """Whether autograd is running the backward pass on this thread."""
    return torch._C._current_graph_task_id() != -1


def is_compiled(module: nn.Module) -> bool:
    """Whether calling the module runs compiled code."""
    return "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


def is_mapped() -> bool:
    """Whether the forward pass runs under ``torch.vmap``, where a tensor is one sample's and no number."""
    if not torch._C._are_functorch_transforms_active():
        return False
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return any(each.key() == torch._C._functorch.TransformType.Vmap for each in transforms)


def is_being_traced() -> bool:
    """Whether the forward pass is recorded for a compiler or an export."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()

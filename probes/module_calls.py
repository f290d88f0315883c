"""Follows which module of the model is running, without leaving anything on the model.

The hooks are PyTorch's process-wide module hooks, filtered by a dictionary look-up: the watched model carries
no hook of its own, so its ``state_dict()``, ``copy.deepcopy`` and ``torch.save`` are what they were, and a
copy of it is not watched.
"""

from __future__ import annotations

import threading
import warnings
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from probes.record import ROOT_LAYER


class Follower(Protocol):
    """Who is told when modules of the model start and end."""

    def before_module(self, module: nn.Module, name: str, args: tuple) -> None:
        """A module starts."""
        ...

    def after_module(self, module: nn.Module, name: str, args: tuple, kwargs: dict, output: object) -> None:
        """A module has returned."""
        ...

    def trace_before_module(self, name: str, args: tuple) -> None:
        """Where ``torch.compile`` traces a module, in the stead of ``before_module``; traced itself."""
        ...

    def trace_after_module(self, name: str, output: object) -> None:
        """The same of ``after_module``."""
        ...

    def trace_end(self) -> None:
        """The outermost module that is traced has returned."""
        ...


class ModuleCalls(threading.local):
    """Names the innermost running module, and tells a follower when modules of the model start and end.

    Forward passes under ``torch.no_grad`` (validation) and those of other models are not reported.

    Args:
        names: Name of every module of the model.
        follower: Who is told.

    Attributes:
        names: As given.
        running: Names of the running modules, outermost first.
    """

    def __init__(self, names: dict[nn.Module, str], follower: Follower) -> None:
        self.names = names
        self.running: list[str] = []
        self._traced: list[str] = []  # those of them that torch.compile is tracing
        self._follower = follower

    @property
    def current_layer(self) -> str | None:
        """Name of the innermost running module, or None outside the model's forward pass."""
        return self.running[-1] if self.running else None

    def install(self, handles: ExitStack) -> None:
        """Registers the hooks; they go when ``handles`` closes."""
        handles.callback(register_module_forward_pre_hook(self._start).remove)
        # Torch warns that such hooks see its compiled wrapper too; these look for the model's modules only.
        warnings.filterwarnings("ignore", "Using `torch.compile\\(module\\)` when there are global hooks")
        # always_call: a module that raises must not stay on the stack.
        handles.callback(register_module_forward_hook(self._end, with_kwargs=True, always_call=True).remove)

    def _start(self, module: nn.Module, args: tuple) -> None:
        name = self.names.get(module)
        if name is None or torch.jit.is_tracing() or torch.compiler.is_exporting():
            return
        if name == ROOT_LAYER:
            self.running.clear()  # a KeyboardInterrupt skips always_call hooks
        self.running.append(name)
        if torch.compiler.is_compiling():
            self._traced.append(name)
            if torch.is_grad_enabled():
                self._follower.trace_before_module(name, args)
        elif torch.is_grad_enabled():
            self._follower.before_module(module, name, args)

    def _end(self, module: nn.Module, args: tuple, *kwargs_and_output: Any) -> None:
        # Where the module raised, torch leaves out the keyword arguments and gives None as the output.
        kwargs, output = kwargs_and_output if len(kwargs_and_output) == 2 else ({}, None)
        name = self.names.get(module)
        if name is None or name not in self.running:
            return
        while self.running.pop() != name:
            pass
        is_seen = output is not None and torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            self._traced.pop()
            if is_seen:
                self._follower.trace_after_module(name, output)
                if not self._traced:
                    self._follower.trace_end()
        elif is_seen:
            self._follower.after_module(module, name, args, kwargs, output)

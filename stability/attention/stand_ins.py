"""Attention functions replaced, wherever modules hold them, by stand-ins that report each call."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

# Given the arguments of a call, what to compute in its place, or None to leave it.
Report = Callable[..., Callable[[], Any] | None]

# Torch's own modules look the public functions up when they call; what else they hold must stay as it is
# (operator tables, compiled code), and this package must not report itself.
_UNTOUCHED = ("torch", "stability")


class Target(NamedTuple):
    """A function to be watched.

    Attributes:
        module: Where it lives. Modules that are not imported are left alone.
        name: Its name there: an attribute, or that of a class and its method ("Tensor.softmax").
        report: Called with the arguments of a call before it is made; what it returns is called instead.
        trace: The same where ``torch.compile`` traces the call, traced itself; it returns nothing.
        untouched: Modules that keep the original.
    """

    module: str
    name: str
    report: Report
    trace: Callable[..., None]
    untouched: tuple[str, ...] = ()


class StandIns:
    """Puts stand-ins in the place of functions, and the functions back.

    A stand-in calls `report` and then the original, with the arguments it was given, or what `report` gives
    in its place. Reports are not nested: what a watched function calls in turn, and what reporting itself
    calls, is not reported.

    Args:
        targets: What to watch.
        namespaces: Gives dictionaries, beside those of modules, that may hold the functions.
        opaque: Functions of torch (module, name) that call targets, and that ``torch.compile`` would not
            trace into.
    """

    def __init__(
        self,
        targets: Iterable[Target],
        namespaces: Callable[[], Iterable[dict[str, Any]]],
        opaque: Iterable[tuple[str, str]] = (),
    ) -> None:
        self._targets = tuple(targets)
        self._namespaces = namespaces
        self._opaque = tuple(opaque)
        self._is_installed = False
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """Replaces every function of a package that is imported, also where it was imported by name."""
        # torch.compile knows torch's functions as they are when it is first imported, and it must know the
        # originals. Every optimizer imports it when it is made.
        importlib.import_module("torch._dynamo")
        self._allow_bookkeeping_when_checkpointed()
        self._is_installed = True
        found: dict[int, tuple[Target, Any]] = {}
        for target in self._targets:
            module = sys.modules.get(target.module)
            if module is None:
                continue
            if "." in target.name:
                self._replace_method(module, target)
                continue
            original = _namespace(module).get(target.name)
            if original is not None:
                found[id(original)] = (target, self._stand_in(original, target))
                self._replace(_namespace(module), target.name, found[id(original)][1])
        for module_name, name in self._opaque:
            namespace = _namespace(sys.modules[module_name])
            self._replace(namespace, name, _transparent(namespace[name]))
        for module_name, namespace in self._searched():
            for name, value in list(namespace.items()):
                # A module-level `torch.compile(function)` is a function that refers to the original.
                is_compiled = type(value) is FunctionType and "_torchdynamo_orig_callable" in value.__dict__
                original = value.__dict__["_torchdynamo_orig_callable"] if is_compiled else value
                if id(original) not in found:
                    continue
                target, stand_in = found[id(original)]
                if module_name not in target.untouched:
                    if is_compiled:
                        stand_in = self._stand_in(value, target)
                    self._replace(namespace, name, stand_in)

    def remove(self) -> None:
        """Puts the originals back, save where somebody else has replaced ours since."""
        self._is_installed = False
        while self._undo:
            self._undo.pop()()

    def _allow_bookkeeping_when_checkpointed(self) -> None:
        """What watchers note while a checkpointed function is traced need not be noted when it runs again."""
        config, name = torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"
        # Not by config.patch, which is undone on the thread and in the asyncio task alone that it began in.
        prior = getattr(config, name)
        setattr(config, name, True)
        self._undo.append(lambda: setattr(config, name, prior))

    def _searched(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, module in list(sys.modules.items()):
            if module is not None and name.partition(".")[0] not in _UNTOUCHED:
                yield name, _namespace(module)
        for namespace in self._namespaces():
            yield "", namespace

    def _replace(self, namespace: dict[str, Any], name: str, stand_in: Any) -> None:
        original = namespace[name]
        namespace[name] = stand_in

        def undo() -> None:
            if namespace.get(name) is stand_in:
                namespace[name] = original

        self._undo.append(undo)

    def _replace_method(self, module: ModuleType, target: Target) -> None:
        class_name, _, method = target.name.partition(".")
        owner = getattr(module, class_name)
        is_own = method in vars(owner)
        original = getattr(owner, method)
        stand_in = self._stand_in(original, target)
        setattr(owner, method, stand_in)

        def undo() -> None:
            if vars(owner).get(method) is not stand_in:
                return
            if is_own:
                setattr(owner, method, original)
            else:
                delattr(owner, method)

        self._undo.append(undo)

    def _stand_in(self, original: Any, target: Target) -> Any:
        report, trace = target.report, target.trace

        @functools.wraps(original)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                trace(*args, **kwargs)
                return original(*args, **kwargs)
            if torch.compiler.is_compiling():  # what dynamo has traced goes through later passes
                return original(*args, **kwargs)
            if not self._is_installed or _thread.is_inside:
                return original(*args, **kwargs)
            _thread.is_inside = True
            try:
                instead = report(*args, **kwargs)
                return original(*args, **kwargs) if instead is None else instead()
            finally:
                _thread.is_inside = False

        return stand_in


def _transparent(function: FunctionType) -> Any:
    """The function, for ``torch.compile`` as a copy: it knows the original, and would not look inside."""
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__

    @functools.wraps(function)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return (copy if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return stand_in


class _Thread(threading.local):
    is_inside = False


_thread = _Thread()


def _namespace(module: object) -> dict[str, Any]:
    """The attributes a module has, without asking it: lazy modules import things when they are asked."""
    if not issubclass(type(module), ModuleType):
        return {}
    return object.__getattribute__(module, "__dict__")

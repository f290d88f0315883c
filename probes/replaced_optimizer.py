"""Whether another optimizer has taken the place of one whose steps are waited for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from probes.guard import OTHER_OPTIMIZERS, Guard


class ReplacedOptimizer:
    """Tells of an optimizer that steps twice over parameters of a watched one that does not step meanwhile.

    Once is not enough: two optimizers over the same parameters may take turns, and one may wrap the other.
    One over parameters that the model has got since (adapters, a new head) counts as one over the first
    watched optimizer's.

    Args:
        optimizers: Those that are watched.
        guard: Runs what is done at other optimizers' steps.
        new_parameters: Gives the parameters that the model has got since the probe was attached.
        tell: Called with the watched optimizer and the other one.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        guard: Guard,
        new_parameters: Callable[[], Collection[Tensor]],
        tell: Callable[[Optimizer, Optimizer], None],
    ) -> None:
        self._guard = guard
        self._new_parameters = new_parameters
        self._tell = tell
        self._watched = {
            parameter: optimizer
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        # Of every optimizer in the process the watched one that it shares parameters with; looked for once.
        self._shares_with: WeakKeyDictionary[Optimizer, Optimizer | None] = WeakKeyDictionary()
        self._shares_with.update({optimizer: None for optimizer in optimizers})
        self._since: WeakKeyDictionary[Optimizer, WeakSet[Optimizer]] = WeakKeyDictionary()
        self._within: Optimizer | None = None

    def install(self, handles: ExitStack) -> None:
        """Hooks every optimizer's step; ends when ``handles`` closes."""
        if self._watched:
            handles.callback(register_optimizer_step_pre_hook(self._before).remove)
            handles.callback(register_optimizer_step_post_hook(self._after).remove)

    def see_step(self, optimizer: Optimizer) -> None:
        """Takes note of a watched optimizer's step."""
        self._since.pop(optimizer, None)

    @torch._disable_dynamo  # of another model's optimizer, which may be compiled
    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        # A subclass whose step calls super().step() has hooks around both.
        is_nested, self._within = self._within is optimizer, optimizer
        if not is_nested:
            self._guard(OTHER_OPTIMIZERS, self._see, optimizer)

    @torch._disable_dynamo
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._within = None

    def _see(self, optimizer: Optimizer) -> None:
        if optimizer not in self._shares_with:
            self._shares_with[optimizer] = self._sharing(optimizer)
        watched = self._shares_with[optimizer]
        if watched is None:
            return
        since = self._since.setdefault(watched, WeakSet())
        if optimizer in since:
            self._tell(watched, optimizer)
        since.add(optimizer)

    def _sharing(self, optimizer: Optimizer) -> Optimizer | None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        watched = next((self._watched[one] for one in parameters if one in self._watched), None)
        if watched is not None:
            return watched
        return (
            None if set(self._new_parameters()).isdisjoint(parameters) else next(iter(self._watched.values()))
        )

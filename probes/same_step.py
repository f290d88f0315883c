"""Verdicts before the optimizer steps, and updates that are left out because of them."""

from __future__ import annotations

import warnings
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.optim import Optimizer

from probes.alerts import DivergenceError
from probes.delivery import Delivery
from probes.failures import ProbeWarning
from probes.optimizer_watch import SKIPPED_STEP
from probes.pending import Pending
from probes.snapshots import Snapshots
from probes.watch import Watch
from stability.divergence import Alert

MAX_LEFT_OUT = 10


class SameStep:
    """Waits, before each update, for what the step has measured, and lets the detectors judge it.

    That is one synchronisation of the device at every recorded step. An update is left out by taking the
    gradients away while the optimizer runs: a parameter without one is passed over, so that neither weights
    nor moments, step counts nor weight decay change. The script finds its gradients as they were. For the
    detectors the step never was: their state goes back too, and the next step is judged afresh.

    Args:
        optimizer: The one whose updates are judged.
        watch: Measures; its hooks are installed already, since they have to run first.
        delivery: Judges.
        snapshots: Where to go back to, if that is asked for.
    """

    def __init__(
        self, optimizer: Optimizer, watch: Watch, delivery: Delivery, snapshots: Snapshots | None
    ) -> None:
        self._optimizer = optimizer
        self._watch = watch
        self._delivery = delivery
        self._snapshots = snapshots
        self._taken_away: list[tuple[Tensor, Tensor]] = []
        self._num_left_out = 0
        self._is_stepping = False
        self._has_warned = False

    def install(self, handles: ExitStack) -> None:
        """Hooks the optimizer; ends when ``handles`` closes."""
        handles.callback(self._optimizer.register_step_pre_hook(self._before).remove)
        handles.callback(self._optimizer.register_step_post_hook(self._after).remove)

    @torch._disable_dynamo  # as those that measure
    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if any(callable(argument) for argument in (*args[1:], *kwargs.values())):
            self._warn_of_closure()
            return
        if self._is_stepping:
            return  # a subclass whose step calls super().step(), both with hooks
        step, pending = self._watch.step, self._watch.pending
        if not self._delivery.takes(step, pending):
            return
        try:
            alert = self._judge(step, pending)
        except Exception:  # what the user asked for; a script that goes on does this step again
            pending.take()
            self._watch.begin_step(step)
            raise
        self._is_stepping = True
        if alert is None:
            if self._snapshots is not None:
                self._snapshots.take_if_due(step)
            return
        pending.add_number(SKIPPED_STEP, 1.0)
        if self._snapshots is not None:
            self._snapshots.restore(alert.step if alert.onset_step is None else alert.onset_step)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._taken_away.append((parameter, parameter.grad))
                    parameter.grad = None

    def _judge(self, step: int, pending: Pending) -> Alert | None:
        """The divergence because of which the update is left out; raises after too many of them."""
        alert = self._delivery.judge(step, pending)
        self._num_left_out = 0 if alert is None else self._num_left_out + 1
        if alert is not None and self._num_left_out > MAX_LEFT_OUT:
            raise DivergenceError(
                alert, f" ({MAX_LEFT_OUT} updates in a row were left out, and it has not passed)"
            )
        return alert

    @torch._disable_dynamo
    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self._is_stepping = False
        for parameter, gradient in self._taken_away:
            parameter.grad = gradient
        self._taken_away = []

    def _warn_of_closure(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "same_step has no effect with optimizer.step(closure), whose gradients come within the step; "
                "verdicts come one recorded step late.",
                ProbeWarning,
                stacklevel=3,
            )

"""Copies of weights, optimizer state and what the detectors remember, to go back to."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from probes.detection import Detection, Memory


class _Snapshot(NamedTuple):
    step: int
    tensors: list[Tensor]
    state: dict[Tensor, dict[str, Any]]
    memory: Memory


class Snapshots:
    """Keeps the last two snapshots of parameters, buffers and the optimizer's state, on their devices.

    Two, because a fault may have begun before the newest was taken. With AdamW in one precision that is six
    times the size of the parameters. Copies are made on the device's own stream; nothing waits.

    The detectors go back with the weights: held against the steps in between, those of an earlier step would
    be a fault.

    Args:
        model: Its parameters and buffers are kept.
        optimizer: Its parameters and state are kept; not its learning rates, which belong to the schedule.
        every: Steps between snapshots.
        detection: The detectors.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, every: int, detection: Detection) -> None:
        self._model = model
        self._optimizer = optimizer
        self._every = every
        self._detection = detection
        self._kept: deque[_Snapshot] = deque(maxlen=2)

    @torch.no_grad()
    def take_if_due(self, step: int) -> None:
        """Copies everything as it is before the update of ``step``, if the newest snapshot is old enough."""
        if self._kept and step - self._kept[-1].step < self._every:
            return
        if len(self._kept) == self._kept.maxlen:
            self._kept.popleft()  # first, so that there are never three
        tensors = [tensor.detach().clone() for tensor in self._tensors()]
        state = {
            parameter: {name: _copied(value) for name, value in entries.items()}
            for parameter, entries in self._optimizer.state.items()
        }
        self._kept.append(_Snapshot(step, tensors, state, self._detection.memory()))

    @torch.no_grad()
    def restore(self, onset_step: int) -> int | None:
        """Goes back to the newest snapshot that is older than a fault, else to the oldest.

        Args:
            onset_step: The first step at which the fault showed.

        Returns:
            The snapshot's step, or None if there is no snapshot yet.
        """
        while len(self._kept) > 1 and self._kept[-1].step >= onset_step:
            self._kept.pop()
        if not self._kept:
            return None
        snapshot = self._kept[-1]
        for tensor, kept in zip(self._tensors(), snapshot.tensors, strict=True):
            tensor.detach().copy_(kept)
        state = self._optimizer.state
        for parameter in list(state):
            if parameter not in snapshot.state:
                del state[parameter]  # it had no state yet
        for parameter, kept_entries in snapshot.state.items():
            entries = state[parameter]
            for name, value in kept_entries.items():
                if isinstance(value, Tensor) and isinstance(entries.get(name), Tensor):
                    entries[name].copy_(value)
                else:
                    entries[name] = _copied(value)
        self._detection.go_back(snapshot.memory)
        return snapshot.step

    def _tensors(self) -> list[Tensor]:
        stepped = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        tensors = [*self._model.parameters(), *self._model.buffers(), *stepped]
        return list({id(tensor): tensor for tensor in tensors}.values())


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value

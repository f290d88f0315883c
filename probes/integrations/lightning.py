"""Probes in the Trainer of Lightning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import probes
from probes.record import StepRecords, alert_marker
from probes.schedule import is_due
from stability.divergence import Alert

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "probes.integrations.lightning needs the package lightning: "
        'pip install "stability-probes[lightning]".'
    ) from error


class ProbeCallback(Callback):
    """Watches a LightningModule while it is fitted, with automatic and with manual optimization.

    The loss of each optimizer step is recorded as ``loss``: what goes backward in it, summed; nothing waits
    for the device. With several optimizers a step ends when the last of them has stepped, and no loss is
    recorded, since only the module knows whose it is: ``probe.log``. The Trainer's loggers are given the
    records of whole layers at every ``log_every_n_steps``-th step, and every alert as ``alert/kind/layer``, 1
    for a warning and 2 for divergence. Checkpoints carry the probe's state. The probe closes when fitting
    ends, also by an exception or Ctrl-C.

    Args:
        **options: Those of :func:`probes.attach`, which is called when training begins.

    Attributes:
        probe: The probe of the last training, or of the one under way; None before.

    Raises:
        ValueError: With ``same_step``, since Lightning computes the gradients within the optimizer's step.
    """

    def __init__(self, **options: Any) -> None:
        if options.get("same_step"):
            raise ValueError(
                "`same_step` judges gradients before the optimizer's step; Lightning computes them within. "
                'Leave it out: on_divergence="raise" stops one step later.'
            )
        self.probe: probes.Probe | None = None
        self._options = options
        self._loss: Tensor | None = None
        self._loaded: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what a checkpoint brought that was only validated or tested."""
        self._loaded = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches; goes on where the checkpoint ends, if the fit does."""
        sinks = (*self._options.get("sinks", ()), _Loggers(trainer))
        self.probe = probes.attach(pl_module, trainer.optimizers, **{**self._options, "sinks": sinks})
        self._loss = None
        step = trainer.global_step // len(trainer.optimizers)  # which counts every optimizer's steps
        self.probe.load_state_dict({**self.probe.state_dict(), "step": step, **self._loaded})
        self._loaded = {}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Adds to the loss of the step under way."""
        if len(trainer.optimizers) > 1:
            return
        loss = loss.detach()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # it has scaled the loss already
            loss = loss / scaler.scale(torch.ones_like(loss))
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Records the loss of the step under way."""
        if self.probe is not None and self._loss is not None:
            self.probe.log(loss=self._loss)
        self._loss = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the probe.

        Raises:
            DivergenceError: If the last step shows divergence and ``on_divergence="raise"``.
        """
        if self.probe is not None:
            self.probe.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the probe, and lets an incident tell of the exception."""
        if self.probe is not None:
            self.probe.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        """The probe's state, for Lightning's checkpoints."""
        return self._loaded if self.probe is None else self.probe.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training begins."""
        self._loaded = state_dict


class _Loggers:
    """Hands records and alerts to the Trainer's loggers, which know themselves on which rank to write."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer  # has log_every_n_steps, and does not declare it

    def write(self, records: StepRecords) -> None:
        if is_due(records.step, self._trainer.log_every_n_steps):
            self._log(records.step, records.by_tag())

    def write_alert(self, alert: Alert) -> None:
        series, value = alert_marker(alert)
        self._log(alert.step, {series.tag: value})

    def close(self) -> None:
        pass

    def _log(self, step: int, values: dict[str, float]) -> None:
        for logger in self._trainer.loggers:
            logger.log_metrics(values, step=step)

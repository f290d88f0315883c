"""Probes in the Trainer of Hugging Face transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

import probes
from probes.record import StepRecords, alert_marker
from stability.divergence import Alert

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        "probes.integrations.huggingface needs transformers and accelerate: "
        'pip install "stability-probes[huggingface]".'
    ) from error

T = TypeVar("T")


class ProbeCallback(TrainerCallback, ExportableState):
    """Watches the model of a Trainer from the first step to the last.

    The loss of each optimizer step is recorded as ``loss``: what ``training_step`` gives, summed over the
    batches that are accumulated; nothing waits for the device. An alert is logged by the Trainer, so that it
    reaches ``report_to`` and ``log_history``: ``alert/kind/layer``, 1 for a warning and 2 for divergence.
    Checkpoints carry the probe's state, and a training resumed from one goes on with it. The probe closes
    when training ends, also by an exception or Ctrl-C.

    Args:
        trainer: The Trainer that the callback is added to. A callback is told neither the loss nor of
            exceptions nor whom to log to; those are taken from ``training_step``, ``train`` and ``log``.
        **options: Those of :func:`probes.attach`, which is called when training begins.

    Attributes:
        probe: The probe of the last training, or of the one under way; None before.

    Raises:
        ValueError: If the Trainer is to make its callbacks anew when it resumes.
    """

    def __init__(self, trainer: Trainer, **options: Any) -> None:
        if trainer.args.restore_callback_states_from_checkpoint:
            raise ValueError(
                "`restore_callback_states_from_checkpoint` replaces callbacks by new ones, made from what "
                "JSON can hold. Leave it out: ProbeCallback finds its state in the checkpoint without."
            )
        self.probe: probes.Probe | None = None
        self._trainer = trainer
        self._options = options
        self._loss: Tensor | None = None
        trainer.train = self._closing(trainer.train)  # type: ignore[method-assign]
        trainer.training_step = self._summing(trainer.training_step)  # type: ignore[method-assign]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attaches to what the Trainer has prepared; goes on where its checkpoint ends."""
        optimizer = kwargs["optimizer"]
        if isinstance(optimizer, AcceleratedOptimizer):  # which has no hooks
            optimizer = optimizer.optimizer
        if self.probe is not None:  # the Trainer begins again with a smaller batch
            self.probe.close()
        sinks = (*self._options.get("sinks", ()), _TrainerLog(self._trainer))
        self.probe = probes.attach(kwargs["model"], optimizer, **{**self._options, "sinks": sinks})
        self._loss = None
        # The Trainer looks its callbacks up there when it saves, also if the checkpoint had none.
        states: Any = state.stateful_callbacks
        saved = states.setdefault(type(self).__name__, self.state())["attributes"]
        probe_state = json.loads(saved["probe"]) if saved else self.probe.state_dict()
        self.probe.load_state_dict({**probe_state, "step": state.global_step})

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Records the loss of the step under way."""
        if self.probe is not None and self._loss is not None:
            self.probe.log(loss=self._loss)
        self._loss = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Waits for the last step's numbers: when training has ended, loggers that an alert is for have too.

        Raises:
            DivergenceError: If the last step shows divergence and ``on_divergence="raise"``.
        """
        if self.probe is not None and control.should_training_stop:
            self.probe.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Closes the probe."""
        if self.probe is not None:
            self.probe.close()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint: the probe's state, as one line of JSON."""
        if self.probe is None or self.probe.is_closed:
            return {"args": {}, "attributes": {}}
        return {"args": {}, "attributes": {"probe": json.dumps(self.probe.state_dict())}}

    def _closing(self, train: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(train)
        def closing(*args: Any, **kwargs: Any) -> T:
            try:
                return train(*args, **kwargs)
            except BaseException as error:
                if self.probe is not None:
                    self.probe.__exit__(type(error), error, error.__traceback__)
                raise

        return closing

    def _summing(self, training_step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(training_step)
        def summing(*args: Any, **kwargs: Any) -> Tensor:
            loss = training_step(*args, **kwargs)
            self._loss = loss if self._loss is None else self._loss + loss
            return loss

        return summing


class _TrainerLog:
    """Tells the Trainer of alerts; the probe's many numbers would fill its ``log_history``."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def write(self, records: StepRecords) -> None:
        pass

    def write_alert(self, alert: Alert) -> None:
        series, value = alert_marker(alert)
        self._trainer.log({series.tag: value})

    def close(self) -> None:
        pass

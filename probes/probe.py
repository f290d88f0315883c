"""One object that watches one model: its records, its alerts, and its life from attaching to closing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from numbers import Real
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from probes.attention_sites import AttentionSites
from probes.delivery import Delivery
from probes.failures import ProbeWarning, stacklevel_of_script
from probes.quantities import QUANTITIES
from probes.record import ALL_LAYERS, Record, Series
from probes.same_step import SameStep
from probes.saved_state import check_state
from probes.schedule import Schedule
from probes.sessions import EarlierSession
from probes.sharding import Sharding
from probes.snapshots import Snapshots
from probes.watch import Watch
from stability.divergence import Alert
from stability.html_table import html_table

_SHOWN_ALERTS = 5


class Probe:
    """Watches a model while it trains. Made by :func:`probes.attach`, which explains the arguments.

    The numbers of a step are written, and verdicts on them given, when the next recorded step ends.

    Example:
        >>> import torch, probes
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with probes.attach(model, optimizer) as probe:
        ...     for _ in range(2):
        ...         loss = model(torch.ones(1, 2)).square().mean()
        ...         probe.log(loss=loss)
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> [record.step for record in probe.records if record.quantity == "loss"]
        [0, 1]
        >>> probe
        <Probe closed: step 2, ... records, 0 alerts>
    """

    def __init__(
        self,
        names: dict[nn.Module, str],
        optimizers: Sequence[Optimizer],
        delivery: Delivery,
        *,
        selected: set[str],
        schedule: Schedule,
        attention_rows: int | None,
        sharding: Sharding,
        has_ranks: bool,
        is_attention_required: bool,
        same_step: bool,
        snapshots: Snapshots | None,
        earlier: EarlierSession | None,
    ) -> None:
        self._has_optimizers = bool(optimizers)
        self._sharding = sharding
        self._delivery = delivery
        self._earlier = earlier
        self._layers = tuple(names.values())
        self._is_attention_required = is_attention_required
        self._watch = Watch(
            names,
            optimizers,
            selected=selected,
            schedule=schedule,
            attention_rows=attention_rows,
            sharding=sharding,
            has_ranks=has_ranks,
            before_step_ends=self._before_step_ends,
            after_step=delivery.send,
        )
        self._has_stepped = False
        self._is_closed = False
        self._handles = ExitStack()
        with ExitStack() as on_failure:  # an attach that fails half-way leaves no hook
            on_failure.callback(self._handles.close)
            self._watch.install(self._handles)
            if same_step:  # its hooks come after those that measure
                SameStep(optimizers[0], self._watch, delivery, snapshots).install(self._handles)
            on_failure.pop_all()

    @property
    def is_closed(self) -> bool:
        """Whether the probe has let go of the model."""
        return self._is_closed

    @property
    def records(self) -> list[Record]:
        """The records in memory, oldest first. The newest two million stay; the running step comes later."""
        return list(self._delivery.memory)

    @property
    def alerts(self) -> list[Alert]:
        """Every alert so far."""
        return list(self._delivery.memory.alerts)

    @property
    def attention_sites(self) -> AttentionSites:
        """Where the model computes attention, as far as its forward passes have shown."""
        attention = self._watch.attention
        return AttentionSites([*attention.sites.values(), *attention.unseen.values()])

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
                copy = self._sharding.part(value.detach()).reshape(()).clone()
                self._watch.pending.add(series, copy)
            elif isinstance(value, Real):
                self._watch.pending.add_number(series, float(value))
            else:
                raise TypeError(f"`{name}` must be a number or a tensor; got {type(value).__name__}.")

    def log_batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> None:
        """Remembers which samples the step under way trains on, for an incident's report.

        The last 16 batches are kept. Call it before the optimizer's step; several times with accumulation.

        Args:
            indices: Integers, such as the indices a sampler has drawn; on the host.

        Raises:
            RuntimeError: After ``close``.
            TypeError: If they are not integers.
            ValueError: For a tensor on another device, for which the host would have to wait.
        """
        self._check_open("log_batch")
        if isinstance(indices, Tensor) and indices.device.type != "cpu":
            raise ValueError(
                f"`indices` must be on the CPU; got a tensor on {indices.device}. Log them before "
                "they are moved."
            )
        copied = np.array(indices)
        if copied.dtype.kind not in "iu" and copied.size:
            raise TypeError(f"`indices` must be integers; got {copied.dtype}.")
        if self._delivery.incidents is not None:
            self._delivery.incidents.note_batch(self._watch.step, copied)

    def step(self) -> None:
        """Ends a step when ``attach`` was given no optimizer; call it after the backward pass.

        Raises:
            RuntimeError: After ``close``, or if an optimizer was given: its own step is the clock then.
            DivergenceError: If the step before shows divergence and ``on_divergence="raise"``.
        """
        self._check_open("step")
        if self._has_optimizers:
            raise RuntimeError(
                "probe.step() is for probes without an optimizer; this one's steps end with "
                "optimizer.step(). Remove the call."
            )
        self._has_stepped = True
        self._before_step_ends()
        self._watch.measure_gradients()
        self._watch.end_step()

    def flush(self) -> None:
        """Waits for the last step's numbers, writes them and gives the verdict on them.

        For a script whose loggers close before the probe does.

        Raises:
            DivergenceError: If they show divergence and ``on_divergence="raise"``.
        """
        self._delivery.flush()

    def close(self) -> None:
        """Detaches from the model and brings all that was recorded to the sinks. Safe to call twice.

        Raises:
            DivergenceError: If the last step shows divergence and ``on_divergence="raise"``.
        """
        self._close(silently=False)

    def state_dict(self) -> dict[str, Any]:
        """Step count, detectors and order of layers, for a checkpoint. Waits for the last step's numbers.

        Raises:
            DivergenceError: If they show divergence and ``on_divergence="raise"``.
        """
        self.flush()
        self._note_checkpoint()
        return {
            "step": self._watch.step,
            "detectors": self._delivery.detection.state_dict(),
            "layers": list(self._delivery.readings.seen_order),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where ``state_dict`` was taken. What was measured since is judged no more.

        Of several processes all call it, and wait for each other.

        Raises:
            TypeError: If it is not what ``state_dict`` returned.
            ValueError: The same; or if the detectors or the model are not the ones the state was saved from,
                or processes go on at different steps.
        """
        check_state(state, self._layers)
        self._delivery.check_same_step(state["step"])
        self._delivery.detection.load_state_dict(state["detectors"])
        self._delivery.abandon()
        self._watch.pending.take()
        self._delivery.readings.resume(state["layers"])
        self._watch.begin_step(state["step"])
        self._note_checkpoint()

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
        self._close(silently=error is not None, error=error)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "attached"
        num_records = len(self._delivery.memory)
        return f"<Probe {state}: step {self._watch.step}, {num_records} records, {len(self.alerts)} alerts>"

    def _repr_html_(self) -> str:
        sites = self.attention_sites
        unseen = sum(site.unseen is not None for site in sites)
        facts = [
            ["state", "closed" if self._is_closed else "attached"],
            ["step", f"{self._watch.step:,}"],
            ["records in memory", f"{len(self._delivery.memory):,}"],
            ["attention calls", f"{len(sites) - unseen} seen, {unseen} not"],
            ["alerts", str(len(self.alerts))],
            *([alert.name, str(alert)] for alert in self.alerts[-_SHOWN_ALERTS:]),
        ]
        return html_table(("", ""), facts)

    def _note_checkpoint(self) -> None:
        if self._delivery.incidents is not None:
            self._delivery.incidents.note_checkpoint(self._watch.step)

    def _close(self, *, silently: bool, error: BaseException | None = None) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._handles.close()
        except Exception as failure:  # what was recorded comes first
            warnings.warn(
                f"letting go of the model failed; what was recorded is written all the same: {failure!r}",
                ProbeWarning,
                stacklevel=stacklevel_of_script(),
            )
        if error is None and not self._has_optimizers and not self._has_stepped and self._watch.pending:
            warnings.warn(
                "probe.step() was never called, so all that was seen counts as one step, and gradients of "
                "weights are missing. Call it after each backward pass, or give `attach` the optimizer.",
                ProbeWarning,
                stacklevel=stacklevel_of_script(),
            )
        try:
            if self._watch.pending:  # a step that an exception or an interrupt cut short
                self._delivery.send(self._watch.step, self._watch.pending.take(), is_whole=False)
        finally:
            self._delivery.close(silently=silently, step=self._watch.step, error=error)

    def _keep_in_memory(self) -> None:
        self._delivery.keep_in_memory()

    def _check_open(self, method: str) -> None:
        if self._is_closed:
            raise RuntimeError(f"probe.{method}() after close(); attach a new probe to go on recording.")

    def _before_step_ends(self) -> None:
        # Not before: a state may be loaded until then.
        earlier, self._earlier = self._earlier, None
        if earlier is not None and self._watch.step == 0:
            earlier.warn_of_rerun()
        self._check_attention_seen()

    def _check_attention_seen(self) -> None:
        attention = self._watch.attention
        if self._is_attention_required and attention.step is not None and not attention.sites:
            raise ValueError(
                "`attention_every` was given, but the model made no attention call that can be seen. Declare "
                "attention that is written by hand with stability.attention.report_attention, or leave "
                "`attention_every` out for a model without attention."
            )

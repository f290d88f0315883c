"""Records and alerts in a run of Weights & Biases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from probes.record import StepRecords, alert_marker
from stability.divergence import Alert

if TYPE_CHECKING:
    import wandb

STEP = "probes/step"


class WandbSink:
    """Logs records of layers as ``probes/quantity/layer``, without those of single heads, which are many.

    The charts have an axis of their own, ``probes/step``, so that they stand in nobody's way who logs with
    another one. An alert is the scalar ``probes/alert/kind/layer``, 1 for a warning and 2 for divergence, and
    a W&B alert, which is sent to whom the user's settings name. The run stays open.

    Args:
        run: The run; None: the one that is under way (``wandb.run``) when the first numbers come.
        every: Logs each n-th step; alerts always.

    Raises:
        ImportError: Without the package wandb.
        ValueError: If ``every`` is not positive.

    Example:
        >>> import probes, torch, wandb
        >>> run = wandb.init(mode="disabled")  # or as usual
        >>> model = torch.nn.Linear(2, 1)
        >>> with probes.attach(model, sinks=[WandbSink(run)]) as probe:
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     probe.step()
        >>> run.finish()
    """

    def __init__(self, run: wandb.Run | None = None, *, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"`every` must be at least 1; got {every}.")
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                'WandbSink needs the package wandb: pip install "stability-probes[wandb]".'
            ) from error
        self._wandb = wandb
        self._given = run
        self._every = every
        self._run: wandb.Run | None = None

    def write(self, records: StepRecords) -> None:
        """See :class:`~probes.sinks.Sink`."""
        if records.step % self._every:
            return
        values = {f"probes/{tag}": value for tag, value in records.by_tag().items()}
        self._open_run().log({STEP: records.step, **values})

    def write_alert(self, alert: Alert) -> None:
        """See :class:`~probes.sinks.Sink`."""
        run = self._open_run()
        series, value = alert_marker(alert)
        run.log({STEP: alert.step, f"probes/{series.tag}": value})
        run.alert(
            title=f"{alert.name} in {alert.layer}",
            text="\n".join([str(alert), *(f"* {remedy}" for remedy in alert.remedies)]),
            level="ERROR" if alert.severity == "divergence" else "WARN",
        )

    def close(self) -> None:
        """Nothing to do: whoever began the run finishes it."""

    def _open_run(self) -> wandb.Run:
        if self._run is None:
            run = self._given or self._wandb.run
            if run is None:
                raise RuntimeError("no W&B run is under way; call wandb.init() first, or give `run`.")
            run.define_metric(STEP, hidden=True)
            run.define_metric("probes/*", step_metric=STEP)
            self._run = run
        return self._run

"""Records and alerts in a run of MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from probes.record import StepRecords, alert_marker
from stability.divergence import Alert

if TYPE_CHECKING:
    import mlflow
    from mlflow.utils.async_logging.run_operations import RunOperations

_NOT_IN_A_NAME = re.compile(r"[^\w.\- :/]")
_MAX_BATCH = 1000  # MLflow's own limit on metrics in one request


class MLflowSink:
    """Logs records of layers as ``probes/quantity/layer``, without those of single heads, which are many.

    What MLflow allows in no name becomes an underscore: ``probes/grad_norm/_all_`` is the whole model's. An
    alert is the metric ``probes/alert/kind/layer``, 1 for a warning and 2 for divergence, and a tag of that
    name with the reason. MLflow's own thread sends the requests, and only the end waits for them. The run
    stays open.

    Args:
        run_id: The run, in the tracking store that ``mlflow.set_tracking_uri`` names; None: the active one
            (``mlflow.active_run()``) when the first numbers come.
        every: Logs each n-th step; alerts always.

    Raises:
        ImportError: Without the package mlflow.
        ValueError: If ``every`` is not positive.
    """

    def __init__(self, run_id: str | None = None, *, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"`every` must be at least 1; got {every}.")
        try:
            import mlflow
            from mlflow import entities
        except ImportError as error:
            raise ImportError(
                'MLflowSink needs the package mlflow: pip install "stability-probes[mlflow]".'
            ) from error
        self._mlflow, self._entities = mlflow, entities
        self._run_id = run_id
        self._every = every
        self._client: mlflow.MlflowClient | None = None
        self._last: RunOperations | None = None

    def write(self, records: StepRecords) -> None:
        """See :class:`~probes.sinks.Sink`."""
        if records.step % self._every == 0:
            self._log(records.step, records.by_tag())

    def write_alert(self, alert: Alert) -> None:
        """See :class:`~probes.sinks.Sink`."""
        series, value = alert_marker(alert)
        self._log(alert.step, {series.tag: value}, {series.tag: str(alert)})

    def close(self) -> None:
        """Waits for what is on its way; whoever began the run ends it."""
        if self._last is not None:
            self._mlflow.flush_async_logging()
            self._last.wait()  # raises what went wrong

    def _log(self, step: int, values: Mapping[str, float], tags: Mapping[str, str] | None = None) -> None:
        client, run_id = self._open_run()
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(_name(tag), value, now, step) for tag, value in values.items()]
        run_tags = [self._entities.RunTag(_name(key), text) for key, text in (tags or {}).items()]
        for start in range(0, len(metrics), _MAX_BATCH):
            batch = metrics[start : start + _MAX_BATCH]
            self._last = client.log_batch(run_id, batch, tags=run_tags, synchronous=False)

    def _open_run(self) -> tuple[mlflow.MlflowClient, str]:
        if self._client is None:
            self._client = self._mlflow.MlflowClient()
        if self._run_id is None:
            run = self._mlflow.active_run()
            if run is None:
                raise RuntimeError(
                    "no MLflow run is active; call mlflow.start_run() first, or give `run_id`."
                )
            self._run_id = run.info.run_id
        return self._client, self._run_id


def _name(tag: str) -> str:
    # A local file store has a file for each metric: none may be the directory of another.
    return "probes/" + _NOT_IN_A_NAME.sub("_", tag.replace("/call_", ".call_"))

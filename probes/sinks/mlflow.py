"""Records and alerts in a run of MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from probes.record import Series, StepRecords, alert_marker
from stability.divergence import Alert

if TYPE_CHECKING:
    import mlflow

_NOT_IN_A_NAME = re.compile(r"[^\w.\- :/]")
_MAX_NAME = 240  # MLflow's limit is 250 characters
_MAX_BATCH = 1000  # MLflow's own limit on metrics in one request


class MLflowSink:
    """Logs records of layers as ``probes/quantity/layer``, without those of single heads, which are many.

    What MLflow allows in no name becomes an underscore, and so does a slash in a layer's name:
    ``probes/grad_norm/_all_`` is the whole model's. A second series of such a name gets a number. An
    alert is the metric ``probes/alert/kind/layer``, 1 for a warning and 2 for divergence, and a tag of that
    name with the reason. A thread sends the requests, and only the end waits for them. The run stays open.

    Args:
        run_id: The run, in the tracking store that ``mlflow.set_tracking_uri`` names; None: the active one
            (``mlflow.active_run()``) when the first numbers come.
        every: Logs each n-th step; alerts always.

    Raises:
        ImportError: Without the package mlflow.
        ValueError: If ``every`` is not positive.

    Example:
        >>> sink = MLflowSink(run_id="0123456789abcdef0123456789abcdef", every=100)
        >>> sink.close()
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
        self._requests: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._failure: Exception | None = None
        self._names: dict[str, str] = {}  # of metrics, by tags
        self._taken: set[str] = set()

    def write(self, records: StepRecords) -> None:
        """See :class:`~probes.sinks.Sink`."""
        if records.step % self._every == 0:
            named = zip(records.series, records.values.tolist(), strict=True)
            self._log(records.step, {series: value for series, value in named if series.head is None})

    def write_alert(self, alert: Alert) -> None:
        """See :class:`~probes.sinks.Sink`."""
        series, value = alert_marker(alert)
        told = str(alert).encode(errors="replace").decode()  # what UTF-8 cannot hold is no text of a tag
        self._log(alert.step, {series: value}, {series: told})

    def close(self) -> None:
        """Waits for what is on its way; whoever began the run ends it."""
        if self._thread is not None:
            self._requests.put(None)
            self._thread.join()
            self._thread = None  # another probe may have numbers still
        if self._failure is not None:
            raise self._failure

    def _log(
        self, step: int, values: Mapping[Series, float], tags: Mapping[Series, str] | None = None
    ) -> None:
        if self._failure is not None:
            raise self._failure
        if self._thread is None:
            self._begin()
        now = int(time.time() * 1000)
        metrics = [
            self._entities.Metric(self._name(series), value, now, step) for series, value in values.items()
        ]
        run_tags = [self._entities.RunTag(self._name(series), text) for series, text in (tags or {}).items()]
        for start in range(0, len(metrics), _MAX_BATCH):
            self._requests.put({"metrics": metrics[start : start + _MAX_BATCH], "tags": run_tags})

    def _begin(self) -> None:
        if self._run_id is None:
            run = self._mlflow.active_run()
            if run is None:
                raise RuntimeError(
                    "no MLflow run is active; call mlflow.start_run() first, or give `run_id`."
                )
            self._run_id = run.info.run_id
        # One thread of our own: those of MLflow's asynchronous logging get into each other's way in a file
        # store. A daemon, since others have ended already when a script that never closed its probe does.
        self._thread = Thread(
            target=self._send, args=(self._mlflow.MlflowClient(), self._run_id), daemon=True
        )
        self._thread.start()

    def _send(self, client: mlflow.MlflowClient, run_id: str) -> None:
        while (request := self._requests.get()) is not None:
            if self._failure is None:
                try:
                    client.log_batch(run_id, **request, synchronous=True)
                except Exception as error:  # raised where the training hands over its next numbers
                    self._failure = error

    def _name(self, series: Series) -> str:
        """A name that MLflow takes, and that no other series has."""
        known = self._names.get(series.tag)
        if known is None:
            # A local file store has a file for each metric: none may be the directory of another.
            layer = series.tag.removeprefix(f"{series.quantity}/")
            layer = layer.replace("/call_", ".call_").replace("/", "_")
            known = full = "probes/" + _NOT_IN_A_NAME.sub("_", f"{series.quantity}/{layer}")[:_MAX_NAME]
            number = 1
            while known in self._taken:
                number += 1
                known = f"{full}_{number}"
            self._taken.add(known)
            self._names[series.tag] = known
        return known

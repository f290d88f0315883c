"""Records as TensorBoard scalars, alerts as text."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

from probes.record import Series, StepRecords
from probes.sinks.jsonl import to_json
from stability.divergence import Alert

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary


class TensorBoardSink:
    """Writes one event per recorded step, with a scalar ``quantity/layer`` for every record of a layer.

    Records of single heads are left out: hundreds of charts per quantity help nobody. NaN and infinity are
    written as such; TensorBoard marks them on the curve. An alert is a text and a marker, the scalar
    ``alert/kind/layer``: 1 for a warning, 2 for divergence. A killed process loses at most the last second.

    Args:
        log_dir: Directory of this run; created if absent.

    Raises:
        OSError: If the directory cannot be written.
    """

    def __init__(self, log_dir: str | Path) -> None:
        # Here, not at the top: a user without TensorBoard can record to memory or JSON lines.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.log_dir = Path(log_dir)
        self._event, self._summary = Event, Summary
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            self._writer = EventFileWriter(str(self.log_dir), flush_secs=0.5)
        except OSError as error:
            raise OSError(
                f"cannot write TensorBoard events to {self.log_dir}: {error}. Choose a writable log_dir."
            ) from error

    def write(self, records: StepRecords) -> None:
        """See :class:`~probes.sinks.Sink`."""
        values = [
            self._summary.Value(tag=series.tag, simple_value=value)
            for series, value in zip(records.series, records.values.tolist(), strict=True)
            if series.head is None
        ]
        self._add(records.step, self._summary(value=values))

    def write_alert(self, alert: Alert) -> None:
        """See :class:`~probes.sinks.Sink`."""
        from torch.utils.tensorboard.summary import text

        lines = [f"**{alert.severity}** in `{alert.layer}`: {alert.reason}"]
        if alert.evidence:
            evidence = ", ".join(f"{value:.4g} at {step}" for step, value in alert.evidence)
            lines.append(f"{alert.quantity}: {evidence}")
        if alert.spread:
            lines.append(f"spread to {', '.join(f'`{layer}`' for layer in alert.spread)}")
        lines += [f"* {remedy}" for remedy in alert.remedies]
        # The page leaves comments out; probes.read finds the alert there. Two hyphens would end it.
        fields = to_json(dataclasses.asdict(alert)).replace("--", "-\\u002d")
        lines.append(f"<!-- {fields} -->")
        self._add(alert.step, text("alerts", "\n\n".join(lines)))
        tag = Series(alert.layer, f"alert/{alert.kind or alert.quantity}").tag
        marker = self._summary.Value(tag=tag, simple_value=2.0 if alert.severity == "divergence" else 1.0)
        self._add(alert.step, self._summary(value=[marker]))

    def close(self) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self._writer.close()

    def _add(self, step: int, summary: Summary) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

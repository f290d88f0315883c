"""Records as TensorBoard scalars, a few charts and pictures of the whole run, and alerts as text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from probes.quantities import QUANTITIES
from probes.record import ALL_LAYERS, Series, StepRecords, alert_marker
from probes.sinks.event_files import EventFiles
from probes.sinks.heat_map import HeatMap
from probes.sinks.heat_map_picture import heat_map_png
from probes.sinks.jsonl import to_json
from probes.sinks.known_series import KnownSeries
from probes.sinks.overview import PEAK_TAG, Overview, layout
from probes.sinks.step_event import StepEvent
from stability.divergence import Alert

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

HParam = bool | int | float | str

MAX_ALERTS = 1000
MAX_ONSETS = 8  # alerts that pictures point at
FIRST_PICTURES = 16  # recorded steps before the first pictures; the next ones come after twice as many

# Custom Scalars takes all from a tag's first parenthesis on for the name of a run that it does not find, and
# draws nothing.
_WITHOUT_PARENTHESES = str.maketrans("()", "[]")

# Values at the ends of the colour scale.
_SCALES = {
    "grad_norm": (1e-6, 1e6),
    "activation_rms": (1e-4, 1e4),
    "attention/max_logit": (1e-2, 1e4),
    "attention/entropy": (1e-3, 1e1),
}
_DISTRIBUTIONS = ("attention/entropy", "attention/max_logit")


class _Columns(NamedTuple):
    """What becomes of the values of steps with these series."""

    event: StepEvent
    layers: np.ndarray  # values that are scalars
    overview: Overview
    maps: tuple[tuple[HeatMap, np.ndarray, np.ndarray], ...]  # values, and their rows in it
    heads: tuple[tuple[str, np.ndarray], ...]  # quantity, and its values of single heads


class TensorBoardSink:
    """Writes for a person who has half a minute, and for one who looks for a single layer.

    Custom Scalars shows the few charts that matter; Images the whole run as heat maps layer × step, drawn
    anew when it is twice as long, at the first alerts and at the end; Text its configuration and its alerts;
    Distributions the single heads; HParams the peak of its gradient norm. Scalars has ``quantity/layer`` for
    every record of a layer. NaN and infinity are written as such. The marker of an alert is the scalar
    ``alert/kind/layer``: 1 for a warning, 2 for divergence; with ``[all]`` for (all), as all parentheses.

    The files stay within ``max_megabytes``: whenever they have grown to two thirds of it, every second of the
    steps in them goes, and only every 2nd, 4th, … further one is written. Alerts stay, up to a thousand and a
    tenth of the budget. A killed process loses nothing that was written.

    Args:
        log_dir: Directory of this run; created if absent.
        layers: The model's layers, for the order of the heat maps' rows.
        configuration: What the Text page tells of the run.
        hparams: What the HParams page sorts runs by, beside their peak gradient norm; names and values.
        max_megabytes: Budget of the files, in 10⁶ bytes.

    Attributes:
        last_earlier_step: The last step that earlier sessions recorded there; None of a new directory.

    Raises:
        OSError: If the directory cannot be written.
        TypeError: If a hyperparameter is no number, text or truth value.
        ValueError: If the budget is less than 1 MB.

    Example:
        >>> import tempfile, torch, probes
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as log_dir:
        ...     sink = TensorBoardSink(log_dir, hparams={"lr": 0.1}, max_megabytes=10)
        ...     with probes.attach(model, optimizer, sinks=[sink]) as probe:
        ...         model(torch.ones(1, 2)).sum().backward()
        ...         optimizer.step()
        ...     run = probes.read(log_dir)
        >>> run["grad_max_abs/(root)"].values.tolist()
        [1.0]
    """

    def __init__(
        self,
        log_dir: str | Path,
        *,
        layers: Sequence[str] = (),
        configuration: Mapping[str, object] | None = None,
        hparams: Mapping[str, HParam] | None = None,
        max_megabytes: int = 50,
    ) -> None:
        # Here, not at the top: a user without TensorBoard can record to memory or JSON lines.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import summary

        if max_megabytes < 1:
            raise ValueError(f"`max_megabytes` must be at least 1; got {max_megabytes}.")
        check_hparams(hparams or {})
        self.log_dir = Path(log_dir)
        self._event, self._summary, self._summaries = Event, Summary, summary
        self._layers = list(layers)
        self._columns = KnownSeries[_Columns]()
        self._maps = {quantity: HeatMap(is_low_worse="entropy" in quantity) for quantity in _SCALES}
        self._known_tags: set[str] = set()
        self._peak = 0.0
        self._num_alerts = 0
        self._alert_room = max_megabytes * 10**5  # bytes
        self._num_onsets = 0
        self._onsets: list[tuple[str, int]] = []
        self._num_steps = 0
        self._next_pictures = FIRST_PICTURES
        self._last_step = 0
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            self._files = EventFiles(self.log_dir, max_megabytes * 10**6)
            self.last_earlier_step = self._files.last_step
            if configuration:
                self._add(0, summary.text("run", _encodable(_table(configuration))))
            self._end: Summary | None = None
            if hparams:
                named = {
                    _encodable(name): _encodable(value) if isinstance(value, str) else value
                    for name, value in hparams.items()
                }
                *begin, self._end = summary.hparams(named, {PEAK_TAG: 0.0})
                for part in begin:
                    self._add(0, part)
        except OSError as error:
            raise OSError(
                f"cannot write TensorBoard events to {self.log_dir}: {error}. Choose a writable log_dir."
            ) from error

    def write(self, records: StepRecords) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self._files.open_again()  # closed with an earlier probe
        # Not between two parts of a step: a file makes void what earlier ones hold from its first step on.
        if records.step != self._last_step and self._files.thin_if_full():
            self._draw()
        if records.step < self._last_step:  # the training was taken back
            self._onsets = [(layer, step) for layer, step in self._onsets if step < records.step]
        columns = self._columns_of(records.series)
        values, overview = records.values, columns.overview
        self._peak = max(self._peak, overview.grad_norm(values))
        for heat_map, indices, rows in columns.maps:
            heat_map.add(records.step, rows, values[indices])
        self._last_step = records.step
        self._num_steps += 1
        if records.step % self._files.stride == 0:
            numbers = overview.values(values, self._peak, self._num_alerts)
            event = columns.event.serialised(
                time.time(),
                records.step,
                np.concatenate([values[columns.layers], numbers]),
                b"".join(self._distribution(name, values[heads]) for name, heads in columns.heads),
            )
            self._files.append(event)
        if self._num_steps >= self._next_pictures:
            self._next_pictures *= 2
            self._draw()

    def write_alert(self, alert: Alert) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self._files.open_again()
        self._num_alerts += 1
        if self._num_alerts > MAX_ALERTS:  # a detector that speaks at every step
            return
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
        told = self._summaries.text("alerts", _encodable("\n\n".join(lines)))
        # After the text: an event that begins with a scalar is a step's, and thinned.
        marker, value = alert_marker(alert)
        told.value.add(tag=_encodable(marker.tag.translate(_WITHOUT_PARENTHESES)), simple_value=value)
        self._alert_room -= told.ByteSize()
        if self._alert_room < 0:
            return
        self._add(alert.step, told)
        if self._num_onsets < MAX_ONSETS:
            self._num_onsets += 1
            self._onsets.append((alert.layer, alert.step if alert.onset_step is None else alert.onset_step))
            self._draw()

    def close(self) -> None:
        """See :class:`~probes.sinks.Sink`."""
        try:
            self._draw()
            if self._end is not None:
                self._add(self._last_step, self._end)
        finally:
            self._files.close()

    def _columns_of(self, series: tuple[Series, ...]) -> _Columns:
        known = self._columns.get(series)
        if known is not None:
            return known
        layers = [index for index, name in enumerate(series) if name.head is None]
        groups: dict[tuple[str, bool], list[int]] = {}
        for index, name in enumerate(series):
            if name.layer != ALL_LAYERS:
                groups.setdefault((name.quantity, name.head is None), []).append(index)
        maps = []
        for quantity, heat_map in self._maps.items():
            if indices := groups.get((quantity, True)):
                names = [Series(series[i].layer, "", call=series[i].call).tag[1:] for i in indices]
                maps.append((heat_map, np.array(indices), heat_map.rows(names)))
        overview = Overview.of(series)
        columns = _Columns(
            StepEvent([*(series[index].tag for index in layers), *overview.tags]),
            np.array(layers, np.intp),
            overview,
            tuple(maps),
            tuple((q, np.array(groups[q, False])) for q in _DISTRIBUTIONS if (q, False) in groups),
        )
        self._columns.add(series, columns)
        if new_tags := set(overview.tags) - self._known_tags:
            self._known_tags |= new_tags
            self._add(0, self._summaries.custom_scalars(layout(self._known_tags)))
        return columns

    def _distribution(self, quantity: str, values: np.ndarray) -> bytes:
        """All heads of the model as one histogram, a serialised Summary."""
        # TensorBoard's precision: between values that differ by less, bins would not find room.
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float32).astype(np.float64)
        finite = rounded[np.isfinite(rounded)]
        if not finite.size:
            return b""
        low, high = finite.min(), finite.max()
        counts, edges = np.array([finite.size]), np.array([low, high])
        if low < high:
            counts, edges = np.histogram(finite, bins=min(30, 1 + finite.size))
        summary = self._summaries.histogram_raw(
            f"{quantity}/heads",
            min=low,
            max=high,
            num=finite.size,
            sum=finite.sum(),
            sum_squares=np.square(finite).sum(),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
        )
        return summary.SerializeToString()

    def _draw(self) -> None:
        for quantity, heat_map in self._maps.items():
            if not heat_map.steps:
                continue
            layers, values = heat_map.shown(self._layers)
            if not layers:  # nothing but infinities so far, which are the empty cell
                continue
            worst = "smallest" if heat_map.is_low_worse else "largest"
            picture = heat_map_png(
                f"{quantity} ({QUANTITIES[quantity].unit})",
                f"log scale, {worst} of each column's steps",
                heat_map.steps,
                layers,
                values,
                _SCALES[quantity],
                is_low_worse=heat_map.is_low_worse,
                onsets=self._onsets,
            )
            image = self._summary.Image(encoded_image_string=picture, colorspace=3)
            image.width, image.height = (
                int.from_bytes(picture[at : at + 4]) for at in (16, 20)
            )  # PNG's IHDR
            value = self._summary.Value(tag=f"heat_map/{quantity}", image=image)
            self._add(self._last_step, self._summary(value=[value]))

    def _add(self, step: int, summary: Summary) -> None:
        event = self._event(wall_time=time.time(), step=step, summary=summary)
        self._files.append(event.SerializeToString())


def check_hparams(hparams: Mapping[str, HParam]) -> None:
    """Raises TypeError unless it is a mapping of names to numbers, texts or truth values."""
    if not isinstance(hparams, Mapping):
        raise TypeError(
            f"`hparams` must be a dict, such as {{'learning rate': 1e-3}}; got {type(hparams).__name__}."
        )
    for name, value in hparams.items():
        if not isinstance(name, str) or not isinstance(value, bool | int | float | str):
            raise TypeError(
                f"`hparams` must map names to numbers, texts or truth values; got {name!r}: {value!r}."
            )


def _encodable(text: str) -> str:
    """The text without what UTF-8 cannot hold, such as a byte of a file's name."""
    return text.encode(errors="replace").decode()


def _table(rows: Mapping[str, object]) -> str:
    """A Markdown table."""

    def cell(value: object) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    return "\n".join(
        ["| | |", "|---|---|", *(f"| {cell(key)} | `{cell(value)}` |" for key, value in rows.items())]
    )

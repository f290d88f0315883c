"""All that the probes recorded of one long run, as one small file: raw material of its table row and figure.

A long table of (step, series, value) in float32: of 160 million parameters, 1,500 steps take some 2 MB.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from probes.record import ALL_LAYERS, Series, StepRecords
from stability.divergence import Alert

Arrays = dict[str, NDArray[Any]]


class RecordTable:
    """A sink of the probes that keeps all records in memory, ready for a file or a checkpoint."""

    def __init__(self) -> None:
        self._id_of: dict[Series, int] = {}
        self._steps: list[NDArray[np.int32]] = []
        self._ids: list[NDArray[np.uint16]] = []
        self._values: list[NDArray[np.float32]] = []
        self._alerts: list[dict[str, Any]] = []
        self._loss = Series(ALL_LAYERS, "loss")
        self.last_loss = 0.0

    def write(self, records: StepRecords) -> None:
        """See :class:`~probes.sinks.Sink`."""
        ids = [self._id_of.setdefault(series, len(self._id_of)) for series in records.series]
        self._steps.append(np.full(len(ids), records.step, dtype=np.int32))
        self._ids.append(np.array(ids, dtype=np.uint16))
        with np.errstate(over="ignore"):  # beyond float32 is as good as infinite
            self._values.append(records.values.astype(np.float32))
        if self._loss in records.series:
            self.last_loss = float(records.values[records.series.index(self._loss)])

    def write_alert(self, alert: Alert) -> None:
        """See :class:`~probes.sinks.Sink`."""
        self._alerts.append(asdict(alert))

    def close(self) -> None:
        """Nothing to do: the file is written by `write_run`."""

    def arrays(self) -> Arrays:
        """Columns step, series (index into names) and value, a row per record; names and alerts as JSON."""
        return {
            "step": np.concatenate([np.empty(0, np.int32), *self._steps]),
            "series": np.concatenate([np.empty(0, np.uint16), *self._ids]),
            "value": np.concatenate([np.empty(0, np.float32), *self._values]),
            "names": np.array(json.dumps([list(series) for series in self._id_of])),
            "alerts": np.array(json.dumps(self._alerts)),
        }

    def load(self, arrays: Arrays) -> None:
        """Takes the place of what was recorded so far; the counterpart of `arrays`."""
        self._id_of = {series: i for i, series in enumerate(_names(arrays))}
        self._steps, self._ids = [arrays["step"]], [arrays["series"]]
        self._values = [arrays["value"]]
        self._alerts = json.loads(str(arrays["alerts"]))
        losses = self._values[0][self._ids[0] == self._id_of.get(self._loss, -1)]
        self.last_loss = float(losses[-1]) if len(losses) else 0.0


@dataclass(frozen=True)
class RecordedRun:
    """One run as it was written.

    Attributes:
        facts: Configuration, steps done, validation losses and the like.
        alerts: The detectors' alerts, as dictionaries.
        series: Steps and values of every series, whole layers and heads.
    """

    facts: dict[str, Any]
    alerts: list[dict[str, Any]]
    series: dict[Series, tuple[NDArray[np.int32], NDArray[np.float32]]]

    def values(self, quantity: str, layer: str = ALL_LAYERS) -> NDArray[np.float64]:
        """One series of a whole layer, in the order of steps; empty if it was not recorded."""
        return self.over_steps(quantity, layer)[1].astype(np.float64)

    def over_steps(
        self, quantity: str, layer: str = ALL_LAYERS
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Its steps and values."""
        for series, recorded in self.series.items():
            if (series.quantity, series.layer, series.head) == (quantity, layer, None):
                return recorded
        return np.empty(0, np.int32), np.empty(0, np.float32)

    def layers(self, quantity: str) -> list[str]:
        """The layers that a quantity was recorded of, "(all)" left out."""
        return [
            series.layer
            for series in self.series
            if series.quantity == quantity and series.head is None and series.layer != ALL_LAYERS
        ]


def write_run(path: Path, facts: dict[str, Any], arrays: Arrays) -> None:
    """Write a run's file; one that is there is replaced in one go.

    Args:
        path: An .npz file.
        facts: Plain values, NaN included.
        arrays: Of `RecordTable.arrays`.
    """
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as file:
        np.savez_compressed(file, facts=np.array(json.dumps(facts)), **arrays)  # type: ignore[arg-type]
    os.replace(temporary, path)


def write_run_to(file: IO[bytes], run: RecordedRun, **arrays: NDArray[Any]) -> None:
    """Write a run that was read, or a part of it.

    Args:
        file: Open for writing.
        run: The run; its records are written series by series.
        **arrays: What its file holds besides.
    """
    counts = [len(steps) for steps, _ in run.series.values()]
    np.savez_compressed(
        file,
        facts=np.array(json.dumps(run.facts)),
        step=np.concatenate([np.empty(0, np.int32), *(steps for steps, _ in run.series.values())]),
        series=np.repeat(np.arange(len(counts), dtype=np.uint16), counts),
        value=np.concatenate([np.empty(0, np.float32), *(values for _, values in run.series.values())]),
        names=np.array(json.dumps([list(series) for series in run.series])),
        alerts=np.array(json.dumps(run.alerts)),
        **arrays,  # type: ignore[arg-type]
    )


def read_run(file: Path | IO[bytes]) -> RecordedRun:
    """Read a run's file.

    Args:
        file: Of `write_run`.

    Returns:
        The run.

    Raises:
        ValueError: It is no such file, or not all of it.
    """
    try:
        with np.load(file) as content:
            arrays = {name: content[name] for name in ("step", "series", "value", "names", "alerts", "facts")}
    except (zipfile.BadZipFile, KeyError, EOFError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected the records of a run; got something else or a part of it ({error})."
        ) from error
    order = np.argsort(arrays["series"], kind="stable")  # steps stay in order
    steps, values = arrays["step"][order], arrays["value"][order]
    names = _names(arrays)
    ends = np.cumsum(np.bincount(arrays["series"], minlength=len(names)))[:-1]
    columns = zip(np.split(steps, ends), np.split(values, ends), strict=True)
    return RecordedRun(
        facts=json.loads(str(arrays["facts"])),
        alerts=json.loads(str(arrays["alerts"])),
        series=dict(zip(names, columns, strict=True)) if names else {},
    )


def run_files(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """The files of runs in a place.

    Args:
        source: A file, a .zip archive of them, or a folder with either.

    Yields:
        Where a file is, for messages; its content.

    Raises:
        OSError: It is not there, or cannot be read.
        ValueError: An archive is damaged.
    """
    if source.is_dir():
        for entry in sorted([*source.glob("*.npz"), *source.glob("*.zip")]):
            yield from run_files(entry)
    elif source.suffix == ".zip":
        try:
            with zipfile.ZipFile(source) as archive:
                for name in archive.namelist():
                    yield f"{name} in {source}", io.BytesIO(archive.read(name))
        except zipfile.BadZipFile as error:
            raise ValueError(f"{source} is no archive, or not all of one ({error}). Leave it out.") from error
    else:
        yield str(source), io.BytesIO(source.read_bytes())


def read_facts(file: Path | IO[bytes]) -> dict[str, Any]:
    """The facts of a run's file alone, without its records.

    Args:
        file: Of `write_run`.

    Returns:
        The facts.
    """
    with np.load(file) as content:
        facts: dict[str, Any] = json.loads(str(content["facts"]))
    return facts


def _names(arrays: Arrays) -> list[Series]:
    return [Series(*fields) for fields in json.loads(str(arrays["names"]))]

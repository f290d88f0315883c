"""Reading recorded runs back as arrays."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from probes.record import Record

Point = tuple[str, int, float]  # tag, step, value


class RecordedSeries(NamedTuple):
    """One recorded series.

    Attributes:
        steps: Optimizer steps, int64 [n], ascending.
        values: float64 [n]. From TensorBoard files they have float32 precision.
    """

    steps: np.ndarray
    values: np.ndarray


def read(log_dir: str | Path) -> dict[str, RecordedSeries]:
    """Reads what a run recorded.

    JSON lines are read if there are any (they hold every record in full precision), TensorBoard events
    otherwise. A file that was cut short, by a killed process say, is read as far as it goes.

    Args:
        log_dir: The run's directory, or one ``.jsonl`` file.

    Returns:
        Tag ``quantity/layer`` (such as ``grad_norm/blocks.0.attention.query``) → series.

    Raises:
        FileNotFoundError: If there is no such directory, or nothing recorded in it.
        ValueError: If a JSON-lines file is not one of ours or of a newer schema.
    """
    path = Path(log_dir)
    if not path.exists():
        raise FileNotFoundError(f"no run at {path}; expected the `log_dir` of a finished or running probe.")
    lines = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    events = [] if lines else sorted(path.glob("events.out.tfevents.*"))
    if not lines and not events:
        raise FileNotFoundError(f"{path} holds no TensorBoard events and no .jsonl file.")
    return to_series(
        point for file in lines or events for point in (_read_lines if lines else _read_events)(file)
    )


def to_series(points: Iterable[Point]) -> dict[str, RecordedSeries]:
    """Groups (tag, step, value) by tag; of a step recorded twice the later value counts."""
    values: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for tag, step, value in points:
        values[tag][step] = value
    result = {}
    for tag, by_step in values.items():
        steps = sorted(by_step)
        result[tag] = RecordedSeries(np.array(steps, dtype=np.int64), np.array([by_step[s] for s in steps]))
    return result


def _read_lines(path: Path) -> Iterator[Point]:
    from probes.sinks.jsonl import SCHEMA_VERSION

    with path.open(encoding="utf-8") as file:
        header = _parse(file.readline()) or {}
        if header.get("schema") != "stability-probes" or header.get("schema_version", 0) > SCHEMA_VERSION:
            raise ValueError(
                f"{path} must begin with the schema stability-probes, version {SCHEMA_VERSION} or older; "
                f"got {header}."
            )
        for line in file:
            fields = _parse(line)
            # None: the line a killed process was writing; a later process may have gone on after it.
            if fields is not None and fields.pop("type", None) == "record":
                record = Record(**fields)
                yield record.series.tag, record.step, float(record.value)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _read_events(path: Path) -> Iterator[Point]:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield value.tag, event.step, value.simple_value

"""Reading recorded runs back as arrays."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from probes.flight_recorder_file import FILE_NAME, read_steps
from probes.record import Record
from probes.sessions import Point, Recorded
from probes.sinks.event_files import begun_at
from probes.sinks.overview import PREFIX as OVERVIEW
from stability.divergence import Alert

_ALERT = re.compile(r"^<!-- (\{.*\}) -->$", re.MULTILINE)


class RecordedSeries(NamedTuple):
    """One recorded series.

    Attributes:
        steps: Optimizer steps, int64 [n], ascending.
        values: float64 [n]. From TensorBoard files they have float32 precision.

    Example:
        >>> import numpy as np
        >>> series = RecordedSeries(steps=np.array([0, 10, 20]), values=np.array([1.0, 4.0, 2.0]))
        >>> int(series.steps[series.values.argmax()])
        10
    """

    steps: np.ndarray
    values: np.ndarray


class RecordedRun(dict[str, RecordedSeries]):
    """Tag ``quantity/layer`` (such as ``grad_norm/blocks.0.attention.query``) → series.

    Attributes:
        alerts: The verdicts, in the order in which they were given.
        can_hold_alerts: Whether the files would tell of alerts: a flight recorder and an incident's
            series.npz do not.

    Example:
        >>> import numpy as np
        >>> run = RecordedRun({"loss/(all)": RecordedSeries(np.array([0, 1]), np.array([2.5, 2.0]))})
        >>> run["loss/(all)"].values.tolist(), run.alerts
        ([2.5, 2.0], [])
    """

    def __init__(
        self,
        series: Mapping[str, RecordedSeries],
        alerts: Sequence[Alert] = (),
        *,
        can_hold_alerts: bool = True,
    ) -> None:
        super().__init__(series)
        self.alerts = list(alerts)
        self.can_hold_alerts = can_hold_alerts

    def __missing__(self, tag: object) -> RecordedSeries:
        near = difflib.get_close_matches(str(tag), self, n=4)
        known = f"near it are {', '.join(near)}" if near else "list(run) gives all tags"
        raise KeyError(f"no series {tag!r} was recorded; {known}.")


def read(log_dir: str | Path) -> RecordedRun:
    """Reads what a run recorded.

    Of a directory, JSON lines are read if there are any, since they hold every record in full precision;
    otherwise the probe's TensorBoard events, or those of any writer if it left none. The flight recorder
    adds the last few hundred steps, in full precision and with single heads. A file that was cut short, by a
    killed process say, is read as far as it goes.

    Where a run was taken up again or begun anew in the same directory or file, what earlier sessions recorded
    from the first step of a later one on is left out, alerts too; so it is where a session went back to an
    earlier step. On disk all of it stays. JSON lines of other programs beside them are passed over.

    Args:
        log_dir: The run's directory; or one file: JSON lines, a flight recorder, or an incident's series.npz.

    Returns:
        Series by their tags, and the alerts. TensorBoard's markers of alerts are series too, with the tag
        ``alert/kind/layer``, in which brackets stand for parentheses: ``alert/kind/[all]``.

    Raises:
        FileNotFoundError: If there is no such directory, or nothing recorded in it.
        ValueError: If a file is not one of ours or of a newer schema.

    Example:
        >>> import tempfile, torch, probes
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with tempfile.TemporaryDirectory() as log_dir:
        ...     with probes.attach(model, optimizer, log_dir=log_dir) as probe:
        ...         model(torch.ones(1, 2)).sum().backward()
        ...         optimizer.step()
        ...     run = read(log_dir)
        >>> run["grad_max_abs/(root)"].values.tolist()
        [1.0]
    """
    path = Path(log_dir)
    if not path.exists():
        raise FileNotFoundError(f"no run at {path}; expected the `log_dir` of a finished or running probe.")
    if path.is_file():
        files = [path]
    else:
        patterns = ("*.jsonl", "events.out.tfevents.*.probes", "events.out.tfevents.*")
        found = (sorted(filter(_may_be_ours, path.glob(pattern))) for pattern in patterns)
        files = next(filter(None, found), [])
        if files and files[0].name.endswith(".probes"):
            files.sort(key=begun_at)
        files += path.glob(FILE_NAME)  # last: of a step recorded twice the later value counts
        files = files or sorted(path.glob("*.jsonl"))  # to say what is wrong with them
    if not files and (path / "series.npz").exists():
        raise FileNotFoundError(f"{path} is an incident folder; give its series: {path / 'series.npz'}.")
    if not files:
        raise FileNotFoundError(f"{path} holds no TensorBoard events, no flight recorder and no .jsonl file.")
    run = Recorded()
    for file in files:
        if file.name.endswith(".probes"):  # each session's files are its own
            run.go_on_with(_read_file(file))
        else:
            run.add(_read_file(file))
    return RecordedRun(_to_arrays(run), run.alerts, can_hold_alerts=any(map(_can_hold_alerts, files)))


def to_series(points: Iterable[Point]) -> dict[str, RecordedSeries]:
    """Groups (tag, step, value) by tag; of a step recorded twice the later value counts."""
    return _to_arrays(Recorded(points))


def _to_arrays(recorded: Recorded) -> dict[str, RecordedSeries]:
    result = {}
    for tag, by_step in recorded.values.items():
        steps = sorted(by_step)
        result[tag] = RecordedSeries(np.array(steps, dtype=np.int64), np.array([by_step[s] for s in steps]))
    return result


def _can_hold_alerts(path: Path) -> bool:
    return path.suffix != ".npz" and not path.name.startswith(FILE_NAME)


def _may_be_ours(path: Path) -> bool:
    """Whether a file is no other program's JSON lines, as far as its first line tells."""
    if path.suffix != ".jsonl":
        return True
    with path.open(encoding="utf-8", errors="replace") as file:
        first_line = file.readline()
    return not first_line.endswith("\n") or _parse(first_line).get("schema") == "stability-probes"


def _read_file(path: Path) -> Recorded:
    if path.suffix == ".npz":
        return Recorded(_read_npz(path))
    if path.name.startswith("events.out.tfevents."):
        return _read_events(path)
    if path.name.startswith(FILE_NAME):
        return Recorded(_read_recorder(path))
    return _read_lines(path)


def _read_lines(path: Path) -> Recorded:
    from probes.sinks.jsonl import SCHEMA_VERSION

    run, session = Recorded(), Recorded()
    with path.open(encoding="utf-8") as file:
        first_line = file.readline()
        if not first_line.endswith("\n"):
            return run  # killed before anything was recorded
        header = _parse(first_line)
        if header.get("schema") != "stability-probes" or header.get("schema_version", 0) > SCHEMA_VERSION:
            raise ValueError(
                f"{path} must begin with the schema stability-probes, version {SCHEMA_VERSION} or older; "
                f"got {header}."
            )
        for line in file:
            # Empty: the line a killed process was writing; a later process may have gone on after it.
            fields = _parse(line)
            kind = fields.pop("type", None)
            if kind == "record":
                record = Record(**fields)
                session.take(record.series.tag, record.step, float(record.value))
            elif kind == "alert":
                session.alerts.append(_alert(fields))
            elif kind == "session":
                run.go_on_with(session)
                session = Recorded()
    run.go_on_with(session)
    return run


def _alert(fields: dict[str, Any]) -> Alert:
    fields["value"] = float(fields["value"])
    if fields["reference"] is not None:
        fields["reference"] = float(fields["reference"])
    fields["evidence"] = tuple((step, float(value)) for step, value in fields.get("evidence", ()))
    for name in ("spread", "remedies"):
        fields[name] = tuple(fields.get(name, ()))
    return Alert(**fields)


def _parse(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _read_recorder(path: Path) -> Iterator[Point]:
    for records in read_steps(path):
        for series, value in zip(records.series, records.values.tolist(), strict=True):
            yield series.tag, records.step, value


def _read_npz(path: Path) -> Iterator[Point]:
    with np.load(path) as arrays:
        tags = arrays["tags"].tolist()
        rows = zip(*(arrays[name].tolist() for name in ("tag_indices", "steps", "values")), strict=True)
        for index, step, value in rows:
            yield tags[index], step, value


def _read_events(path: Path) -> Recorded:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    recorded = Recorded()
    is_ours = path.name.endswith(".probes")  # another writer's series may each have steps of their own
    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.HasField("simple_value"):
                if value.tag.startswith(OVERVIEW):
                    continue
                if is_ours:
                    recorded.take(value.tag, event.step, value.simple_value)
                else:
                    recorded.values[value.tag][event.step] = value.simple_value
            elif value.tag.startswith("alerts/"):
                for text in value.tensor.string_val:
                    # The last, in case a layer's name holds the like.
                    found = _ALERT.findall(text.decode())[-1:]
                    recorded.alerts += [_alert(_parse(fields)) for fields in found]
    return recorded

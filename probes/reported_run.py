"""A recorded run as its report sees it: story, ranking of its layers, and a few numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from probes.departures import Departure, departures, until
from probes.grids import forward_order, group_tags
from probes.pictures import RunView
from probes.reading import RecordedRun, RecordedSeries, read
from probes.record import ALL_LAYERS
from probes.story import Story, number, tell
from stability.divergence import Alert


class ReportedRun(NamedTuple):
    """All that a report says of one run.

    Attributes:
        view: What pictures need.
        story: What is said first.
        ranking: Layers, the farthest from their past and their peers first, before anything was not finite.
        broken_step: First step at which something was not; None where all is.
        alerts: Of the run.
        facts: A few numbers, by their names.
    """

    view: RunView
    story: Story
    ranking: Sequence[Departure]
    broken_step: int | None
    alerts: Sequence[Alert]
    facts: dict[str, str]


def load_runs(directories: Sequence[Path]) -> list[ReportedRun]:
    """Reads runs for a report.

    Args:
        directories: As :func:`probes.read` takes them: directories of runs, or single files.

    Raises:
        FileNotFoundError: If there is no run; the message names those in directories below.
        ValueError: If a file is not one of ours.
    """
    names = _names(directories)
    return [reported_run(name, _read(path)) for name, path in zip(names, directories, strict=True)]


def reported_run(name: str, run: RecordedRun) -> ReportedRun:
    """What there is to say of a run.

    Args:
        name: Stands over its pictures.
        run: What it recorded, possibly nothing.
    """
    groups = group_tags(run)
    order = forward_order(groups)
    ranking = departures(groups, order)
    broken = [departure.step for departure in ranking if not math.isfinite(departure.farthest)]
    broken_step = min(broken, default=None)
    before = [] if broken_step is None else departures(until(groups, broken_step), order)
    story = tell(run.alerts, ranking, before)
    if not groups:
        story = Story(
            "Nothing was recorded",
            "The run holds no record yet: it ended, or was killed, before its second recorded step.",
        )
    ranking = before or ranking
    spread = (*story.spread, *(departure.layer for departure in ranking[:3]))
    view = RunView(name, groups, order, story.layer, story.step, spread)
    return ReportedRun(view, story, ranking, broken_step, run.alerts, _facts(groups, run.alerts))


def _read(path: Path) -> RecordedRun:
    try:
        return read(path)
    except FileNotFoundError as error:
        below = sorted({str(found.parent) for found in _recorded_files(path)}) if path.is_dir() else []
        if not below:
            raise FileNotFoundError(f"{error} Give the `log_dir` of probes.attach.") from error
        shown = ", ".join(below[:8]) + (f" and {len(below) - 8} more" if len(below) > 8 else "")
        raise FileNotFoundError(f"{error} There are runs in {shown}: give one of them.") from error


def _recorded_files(path: Path) -> list[Path]:
    patterns = ("*/*.jsonl", "*/events.out.tfevents.*", "*/flight_recorder.bin", "*/*/events.out.tfevents.*")
    return [found for pattern in patterns for found in path.glob(pattern)]


def _names(directories: Sequence[Path]) -> list[str]:
    """Last parts of the paths, with as many parts more as tell them apart."""
    parts = [path.absolute().parts for path in directories]
    for length in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{index + 1}: {path}" for index, path in enumerate(directories)]


def _facts(groups: Mapping[str, Mapping[str, RecordedSeries]], alerts: Sequence[Alert]) -> dict[str, str]:
    ends = [series.steps[[0, -1]] for by_layer in groups.values() for series in by_layer.values()]
    facts = {"steps": f"{np.min(ends)} to {np.max(ends)}" if ends else "none"}
    if ALL_LAYERS in groups.get("loss", {}):
        loss = groups["loss"][ALL_LAYERS].values
        facts["loss, first and last"] = f"{number(loss[0])}, {number(loss[-1])}"
    whole = groups.get("grad_norm", {}).get(ALL_LAYERS)
    if whole is not None:
        facts["largest gradient norm, whole model"] = _extreme({ALL_LAYERS: whole}, largest=True)
    for quantity, what, largest in (
        ("grad_norm", "largest gradient norm of a layer", True),
        ("attention/max_logit", "largest attention logit", True),
        ("attention/entropy", "smallest attention entropy (nats)", False),
    ):
        by_layer = {layer: one for layer, one in groups.get(quantity, {}).items() if layer != ALL_LAYERS}
        if by_layer:
            facts[what] = _extreme(by_layer, largest=largest)
    facts["alerts"] = str(len(alerts))
    return facts


def _extreme(by_layer: Mapping[str, RecordedSeries], *, largest: bool) -> str:
    """Value, step and layer; what is not finite beats all."""

    def key(series: RecordedSeries) -> np.ndarray:
        finite = np.isfinite(series.values)
        return np.where(finite, series.values if largest else -series.values, np.inf)

    layer = max(by_layer, key=lambda layer: key(by_layer[layer]).max())
    series = by_layer[layer]
    index = int(key(series).argmax())
    where = "" if layer == ALL_LAYERS else f" in `{layer}`"
    return f"{number(series.values[index])}{where} at step {series.steps[index]}"

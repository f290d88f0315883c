"""A recorded run as its report sees it: story, ranking of its layers, and a few numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from probes.departures import Departure, departures, until
from probes.grids import ByQuantity, forward_order, group_tags
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
        ranking: Layers, the farthest from their past and their peers first, before anything was not finite;
            all of them where nothing can be ranked before.
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
    taken = _without_steps(groups, _left_out(groups))
    ranking = departures(taken, order)
    broken = [departure.step for departure in ranking if not math.isfinite(departure.farthest)]
    broken_step = min(broken, default=None)
    before = [] if broken_step is None else departures(until(taken, broken_step), order)
    story = tell(run.alerts if run.can_hold_alerts else None, ranking, before)
    if not groups:
        story = Story(
            "Nothing was recorded",
            "The run holds no record yet: it ended, or was killed, before its second recorded step.",
        )
    ranking = before or ranking
    spread = (*story.spread, *(departure.layer for departure in ranking[:3]))
    view = RunView(name, groups, order, story.layer, story.step, spread)
    facts = _facts(groups, taken)
    facts["alerts"] = str(len(run.alerts)) if run.can_hold_alerts else "not in this file"
    return ReportedRun(view, story, ranking, broken_step, run.alerts, facts)


def _read(path: Path) -> RecordedRun:
    try:
        return read(path)
    except FileNotFoundError as error:
        if (path / "series.npz").exists():  # an incident folder: the message says what to give
            raise
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


def _left_out(groups: ByQuantity) -> np.ndarray:
    """Steps without an update, as a GradScaler looks for its factor. For detectors they never were."""
    marks = groups.get("skipped_step", {}).get(ALL_LAYERS)
    return np.zeros(0, np.int64) if marks is None else marks.steps[marks.values > 0]


def _without_steps(groups: ByQuantity, steps: np.ndarray) -> ByQuantity:
    """The series without some steps; those that had no others are gone."""
    kept: dict[str, dict[str, RecordedSeries]] = {}
    for quantity, by_layer in groups.items():
        for layer, series in by_layer.items():
            is_kept = ~np.isin(series.steps, steps)
            if is_kept.any():
                kept.setdefault(quantity, {})[layer] = RecordedSeries(
                    series.steps[is_kept], series.values[is_kept]
                )
    return kept


def _facts(groups: ByQuantity, taken: ByQuantity) -> dict[str, str]:
    ends = [series.steps[[0, -1]] for by_layer in groups.values() for series in by_layer.values()]
    facts = {"steps": f"{np.min(ends)} to {np.max(ends)}" if ends else "none"}
    if num_left_out := len(_left_out(groups)):
        facts["of these, recorded without an update"] = f"{num_left_out}, which the other numbers leave out"
    if ALL_LAYERS in taken.get("loss", {}):
        loss = taken["loss"][ALL_LAYERS]
        facts["loss, first and last"] = f"{number(loss.values[0])}, {number(loss.values[-1])}"
        facts["largest loss"] = _extreme({ALL_LAYERS: loss}, largest=True)
    whole = taken.get("grad_norm", {}).get(ALL_LAYERS)
    if whole is not None:
        facts["largest gradient norm, whole model"] = _extreme({ALL_LAYERS: whole}, largest=True)
    for quantity, what, largest in (
        ("grad_norm", "largest gradient norm of a layer", True),
        ("attention/max_logit", "largest attention logit", True),
        ("attention/entropy", "smallest attention entropy (nats)", False),
    ):
        by_layer = {layer: one for layer, one in taken.get(quantity, {}).items() if layer != ALL_LAYERS}
        if by_layer:
            facts[what] = _extreme(by_layer, largest=largest)
    return facts


def _extreme(by_layer: Mapping[str, RecordedSeries], *, largest: bool) -> str:
    """The farthest finite value, and the first that is not finite, with their steps and layers."""
    farthest: tuple[float, str] | None = None
    broken: tuple[int, str] | None = None
    for layer, (steps, values) in by_layer.items():
        where = "" if layer == ALL_LAYERS else f" in `{layer}`"
        is_finite = np.isfinite(values)
        if is_finite.any():
            index = int(np.where(is_finite, values if largest else -values, -np.inf).argmax())
            if farthest is None or (values[index] > farthest[0]) == largest:
                farthest = (values[index], f"{number(values[index])}{where} at step {steps[index]}")
        if not is_finite.all():
            step = int(steps[~is_finite][0])
            if broken is None or step < broken[0]:
                broken = (step, f"first not finite{where} at step {step}")
    return "; ".join(found[1] for found in (farthest, broken) if found is not None)

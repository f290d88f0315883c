"""What a scored half of the fault suite leaves behind: tables, a figure, JSON, Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.detection_faults import KINDS
from experiments.detection_scoring import (
    Interval,
    Outcome,
    Score,
    Verdict,
    num_episodes,
    rate,
    score,
)
from experiments.detection_suite import Run

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("fault", "runs", "told", "layer right", "delay (steps)", "lead (steps)")
TOOL_HEADINGS = ("tool", *HEADINGS[1:], "false alarms per 10,000 clean steps")


@dataclass(frozen=True)
class Result:
    """What one tool said on a set of runs.

    Attributes:
        tool: Its name.
        outcomes: Of the runs with faults.
        clean: Verdicts on the clean runs.
    """

    tool: str
    outcomes: Sequence[Outcome]
    clean: Mapping[Run, Sequence[Verdict]]

    @property
    def kinds(self) -> list[str]:
        """Kinds of fault that were scored."""
        present = {outcome.run.fault.kind for outcome in self.outcomes if outcome.run.fault}
        return [kind for kind in KINDS if kind in present]

    def score(self, kinds: Sequence[str] | None = None) -> Score:
        """Of all runs with faults, or those of some kinds."""
        return score(
            [
                outcome
                for outcome in self.outcomes
                if kinds is None or (outcome.run.fault and outcome.run.fault.kind in kinds)
            ]
        )

    @property
    def num_clean_steps(self) -> int:
        """Steps of the clean runs."""
        return sum(run.steps for run in self.clean)

    @property
    def num_false_alarms(self) -> int:
        """Episodes of verdicts in clean runs."""
        return sum(num_episodes([v.step for v in verdicts]) for verdicts in self.clean.values())

    @property
    def num_early_alarms(self) -> int:
        """Episodes of verdicts before the onset of faults."""
        return sum(outcome.num_early for outcome in self.outcomes)

    @property
    def num_early_steps(self) -> int:
        """Steps before the onset of faults."""
        return sum(outcome.onset for outcome in self.outcomes)


def result_of(tool: str, verdicts: Mapping[Run, Sequence[Verdict]], departures: Mapping[Run, int]) -> Result:
    """A tool's verdicts on some runs beside the truth.

    Args:
        tool: Its name.
        verdicts: Of every run that counts.
        departures: When the loss left its clean band, of every run with a fault.
    """
    outcomes = [
        Outcome(run, tuple(said), departures[run]) for run, said in verdicts.items() if run.fault is not None
    ]
    return Result(tool, outcomes, {run: said for run, said in verdicts.items() if run.fault is None})


def rows(result: Result) -> list[tuple[str, ...]]:
    """The table's cells: a row for each kind, one for the slow kinds, one for all.

    Args:
        result: Of one tool.
    """
    slow = [kind for kind in result.kinds if KINDS[kind].is_slow]
    groups = [(kind, [kind]) for kind in result.kinds]
    groups += [("slow kinds", slow)] if slow else []
    return [
        *(_row(name, result.score(kinds)) for name, kinds in groups),
        _row("all", result.score()),
    ]


def false_alarm_line(result: Result) -> str:
    """How often the tool cried wolf, in one line."""
    clean = rate(result.num_false_alarms, result.num_clean_steps)
    alarms = "1 false alarm" if result.num_false_alarms == 1 else f"{result.num_false_alarms} false alarms"
    return (
        f"{alarms} in {result.num_clean_steps:,} clean steps: "
        f"{clean.value:.2f} ({clean.low:.2f} to {clean.high:.2f}) per 10,000; "
        f"{result.num_early_alarms} in the {result.num_early_steps:,} steps before faults."
    )


def score_table(result: Result) -> Table:
    """A table for `rich.print`."""
    from rich.table import Table

    table = Table(title=result.tool, caption=false_alarm_line(result), caption_justify="left")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows(result):
        table.add_row(*row, style="bold" if row[0] == "all" else None)
    return table


def tools_rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Tools beside each other, on the same runs: name, told, layer right, delay, lead, false alarms."""
    return [
        (*_row(result.tool, result.score()), _interval(rate(result.num_false_alarms, result.num_clean_steps)))
        for result in results
    ]


def tools_table(results: Sequence[Result], title: str) -> Table:
    """The same for `rich.print`."""
    from rich.table import Table

    table = Table(title=title)
    for i, heading in enumerate(TOOL_HEADINGS):
        table.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    for row in tools_rows(results):
        table.add_row(*row)
    return table


def markdown_table(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *cells)]
    return "\n".join(lines) + "\n"


def cases(result: Result) -> list[str]:
    """Every miss, wrong layer and false alarm, a line each."""
    lines = []
    for outcome in result.outcomes:
        if outcome.detection is None:
            lines.append(f"missed       {outcome.run.name}")
        elif not outcome.is_layer_right:
            lines.append(f"wrong layer  {outcome.run.name}: {outcome.detection.text}")
        lines += [
            f"early        {outcome.run.name}: {verdict.text}"
            for verdict in outcome.verdicts
            if verdict.step < outcome.onset
        ]
    for run, verdicts in result.clean.items():
        lines += [f"false alarm  {run.name}: {verdict.text}" for verdict in verdicts]
    return lines


def summary(result: Result) -> dict[str, Any]:
    """Scores and every run's outcome, ready for JSON."""
    return {
        "tool": result.tool,
        "all": asdict(result.score()),
        "kinds": {kind: asdict(result.score([kind])) for kind in result.kinds},
        "clean_steps": result.num_clean_steps,
        "false_alarms": result.num_false_alarms,
        "false_alarms_per_10000": asdict(rate(result.num_false_alarms, result.num_clean_steps)),
        "steps_before_onset": result.num_early_steps,
        "alarms_before_onset": result.num_early_alarms,
        "outcomes": [
            {
                "run": outcome.run.name,
                "delay": outcome.delay,
                "lead": outcome.lead,
                "departure": outcome.departure,
                "is_layer_right": outcome.is_layer_right,
                "verdicts": [asdict(verdict) for verdict in outcome.verdicts],
            }
            for outcome in result.outcomes
        ],
        "clean": {run.name: [asdict(v) for v in verdicts] for run, verdicts in result.clean.items()},
    }


def draw_figure(path: Path, result: Result) -> None:
    """Recall and layer per kind with their intervals; delay and lead of every run.

    Args:
        path: The PNG to write.
        result: Of one tool.
    """
    from matplotlib.figure import Figure

    kinds = result.kinds[::-1]
    figure = Figure(figsize=(11, 0.34 * len(kinds) + 1.6), layout="constrained")
    shares, steps = figure.subplots(1, 2, sharey=True)
    scores = [result.score([kind]) for kind in kinds]
    for offset, label, colour, intervals in (
        (0.14, "told of the fault", "C0", [s.recall for s in scores]),
        (-0.14, "layer right", "C1", [s.layer for s in scores]),
    ):
        shares.errorbar(
            [100 * interval.value for interval in intervals],
            [i + offset for i in range(len(kinds))],
            xerr=[
                [100 * (interval.value - interval.low) for interval in intervals],
                [100 * (interval.high - interval.value) for interval in intervals],
            ],
            fmt="o",
            markersize=4,
            color=colour,
            label=label,
        )
    shares.set(
        yticks=range(len(kinds)), yticklabels=kinds, xlim=(-2, 102), xlabel="% of runs (95 % interval)"
    )
    for i, kind in enumerate(kinds):
        outcomes = [o for o in result.outcomes if o.run.fault and o.run.fault.kind == kind]
        for outcome in outcomes:
            if outcome.delay is not None:
                steps.plot(outcome.departure - outcome.onset, i, "|", color="0.55", markersize=9)
                steps.plot(outcome.delay, i, "o", color="C0", markersize=3, alpha=0.5)
    steps.plot([], [], "o", color="C0", markersize=3, label="verdict heard")
    steps.plot([], [], "|", color="0.55", markersize=9, label="loss leaves its clean band, or the run ends")
    steps.set_xscale("symlog", linthresh=1)
    steps.set(xlabel="steps after the fault's onset", xlim=(-0.2, None))
    for panel in (shares, steps):
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def _row(name: str, score: Score) -> tuple[str, ...]:
    return (
        name,
        str(score.num_runs),
        _percent(score.recall),
        _percent(score.layer),
        _interval(score.delay),
        _interval(score.lead),
    )


def _percent(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "–"
    return f"{100 * interval.value:.0f} % ({100 * interval.low:.0f}–{100 * interval.high:.0f})"


def _interval(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "–"
    return f"{interval.value:.3g} ({interval.low:.3g} to {interval.high:.3g})"

"""What an attention benchmark amounts to: TFLOP/s and errors, a table, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.attention_contenders import PASSES, Kind

if TYPE_CHECKING:
    from rich.table import Table

KIND_COLORS = {"ours": "black", "peer": "tab:orange", "softmax": "0.7"}


@dataclass(frozen=True)
class Measurement:
    """One contender in one pass of one case.

    Attributes:
        case: The case, in words.
        contender: Name.
        kind: "ours", "peer" or "softmax".
        which: "forward", "backward" or "forward+backward".
        milliseconds: Median over the rounds.
        teraflops: Operations on valid tokens per second, in units of 1e12.
        error: Relative Frobenius error of the output against float64.
    """

    case: str
    contender: str
    kind: Kind
    which: str
    milliseconds: float
    teraflops: float
    error: float


def attention_table(measurements: Sequence[Measurement], title: str, note: str) -> Table:
    """One row per case and contender.

    Args:
        measurements: What was measured, case by case.
        title: Above the table.
        note: Below it.

    Returns:
        A table for `rich.print`.
    """
    from rich.table import Table

    table = Table(title=title, caption=note, caption_justify="left")
    for heading in ("case", "implementation"):
        table.add_column(heading, no_wrap=True)
    for heading in (*(f"{which}, TFLOP/s" for which in PASSES), "error"):
        table.add_column(heading, justify="right")
    rows: dict[tuple[str, str], dict[str, Measurement]] = {}
    for measurement in measurements:
        rows.setdefault((measurement.case, measurement.contender), {})[measurement.which] = measurement
    previous = None
    for (case, contender), by_pass in rows.items():
        if previous not in (None, case):
            table.add_section()
        speeds = (f"{by_pass[which].teraflops:.3g}" if which in by_pass else "" for which in PASSES)
        error = next(iter(by_pass.values())).error
        table.add_row("" if case == previous else case, contender, *speeds, f"{error:.1e}")
        previous = case
    return table


def draw_figure(
    path: Path, measurements: Sequence[Measurement], ceilings: dict[str, float], title: str
) -> None:
    """Forward and backward speed of every contender, one panel a case.

    Args:
        path: A .png or .svg file.
        measurements: What was measured.
        ceilings: Name → TFLOP/s, drawn as lines.
        title: Above the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global pyplot state
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(measurement.case for measurement in measurements))
    names = list(dict.fromkeys(measurement.contender for measurement in measurements))
    figure = Figure(figsize=(9, 0.8 + len(cases) * (0.7 + 0.28 * len(names))), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(cases), 2, sharex=True, squeeze=False)
    for row, case in zip(panels, cases, strict=True):
        for panel, which in zip(row, PASSES[:2], strict=True):
            shown = [m for m in measurements if m.case == case and m.which == which]
            panel.barh(
                [m.contender for m in shown],
                [m.teraflops for m in shown],
                color=[KIND_COLORS[m.kind] for m in shown],
            )
            for position, measurement in enumerate(shown):
                label = f" {measurement.teraflops:.3g}"
                panel.annotate(label, (measurement.teraflops, position), verticalalignment="center")
            for ceiling in ceilings.values():
                panel.axvline(ceiling, color="0.4", linewidth=1, linestyle="--")
            panel.invert_yaxis()
            panel.set_title(f"{which}: {case}", fontsize=8)
            panel.tick_params(labelsize=7, labelleft=which == PASSES[0])
            panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[-1]:
        panel.set_xlabel("TFLOP/s on valid tokens; dashed: the matrix product", fontsize=8)
    figure.suptitle(title)
    figure.savefig(path)

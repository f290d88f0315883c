"""What an overhead measurement amounts to: paired ratios, their intervals, a table, a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

NUM_RESAMPLES = 10_000
Kind = Literal["bare", "ours", "peer"]


@dataclass(frozen=True)
class Overhead:
    """Cost of one contender.

    Attributes:
        name: The contender.
        kind: "bare", "ours" or "peer".
        milliseconds: Median time of a training step.
        ratio: Median over rounds of its time over that of bare training in the same round.
        low: Lower end of the ratio's 95 % bootstrap interval.
        high: Upper end.
        total: Its time over bare training's, of all rounds together. Steps too rare to be in most rounds are
            in it, at the price of every disturbance.
    """

    name: str
    kind: Kind
    milliseconds: float
    ratio: float
    low: float
    high: float
    total: float


def paired_ratio(seconds: np.ndarray, bare_seconds: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Median of the rounds' ratios and its 95 % percentile bootstrap interval over rounds.

    Args:
        seconds: [rounds], a contender's time in each.
        bare_seconds: [rounds], bare training's in the same.
        seed: Of the resampling.

    Returns:
        Median, lower and upper end.

    Source:
        Efron & Tibshirani (1993), An Introduction to the Bootstrap, chapter 13.

    Example:
        >>> paired_ratio(np.array([1.1, 2.2, 4.4]), np.array([1.0, 2.0, 4.0]))
        (1.1, 1.1, 1.1)
    """
    ratios = seconds / bare_seconds
    generator = np.random.default_rng(seed)
    resamples = generator.integers(len(ratios), size=(NUM_RESAMPLES, len(ratios)))
    medians = np.median(ratios[resamples], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


def overheads(
    seconds: Mapping[str, Sequence[float]], kinds: Mapping[str, Kind], steps: int
) -> list[Overhead]:
    """The cost of every contender.

    Args:
        seconds: Contender → seconds per turn, round by round; bare training comes first.
        kinds: Contender → its kind.
        steps: Timed steps of a turn.
    """
    turns = {name: np.array(values) for name, values in seconds.items()}
    bare = next(iter(turns.values()))
    return [
        Overhead(
            name,
            kinds[name],
            1e3 * float(np.median(own)) / steps,
            *paired_ratio(own, bare),
            total=float(own.sum() / bare.sum()),
        )
        for name, own in turns.items()
    ]


def overhead_table(overheads: Sequence[Overhead], title: str, note: str) -> Table:
    """One row per contender.

    Args:
        overheads: What was measured.
        title: Above the table.
        note: Below it.

    Returns:
        A table for `rich.print`.
    """
    from rich.table import Table

    table = Table(title=title, caption=note, caption_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("ms a step", "ratio to bare", "95 % interval", "all rounds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, overhead in enumerate(overheads):
        if i and overhead.kind != overheads[i - 1].kind:
            table.add_section()
        table.add_row(
            overhead.name,
            f"{overhead.milliseconds:.3g}",
            f"{overhead.ratio:.3f}",
            f"{overhead.low:.3f} – {overhead.high:.3f}",
            f"{overhead.total:.3f}",
        )
    return table


def draw_figure(path: Path, overheads: Sequence[Overhead], title: str) -> None:
    """Ratio to bare training with its interval, one line per contender.

    Args:
        path: A .png or .svg file.
        overheads: What was measured, the baseline first; it is drawn as the line at 1.
        title: Above the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global pyplot state
    from matplotlib.figure import Figure

    shown = list(overheads[1:])
    figure = Figure(figsize=(8.5, 1.4 + 0.32 * len(shown)), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    panel.axvline(1.0, color="0.4", linewidth=1)
    styles = {
        "bare": ("D", "white", "bare training against itself"),
        "ours": ("o", "black", "probes"),
        "peer": ("s", "0.7", "peers"),
    }
    for kind, (marker, face, label) in styles.items():
        rows = [i for i, overhead in enumerate(shown) if overhead.kind == kind]
        if not rows:
            continue
        ratios = np.array([shown[i].ratio for i in rows])
        errors = [
            [shown[i].ratio - shown[i].low for i in rows],
            [shown[i].high - shown[i].ratio for i in rows],
        ]
        panel.errorbar(
            ratios,
            rows,
            xerr=errors,
            fmt=marker,
            color="black",
            markerfacecolor=face,
            capsize=3,
            linewidth=1,
            label=label,
        )
    for row, overhead in enumerate(shown):
        panel.annotate(
            f"{overhead.ratio:.3f}",
            (1.02, row),
            xycoords=("axes fraction", "data"),
            verticalalignment="center",
        )
    panel.set_yticks(range(len(shown)), [overhead.name for overhead in shown])
    panel.invert_yaxis()
    panel.set_xlabel("time of a training step over bare training's, median and 95 % interval")
    panel.set_title(title)
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)

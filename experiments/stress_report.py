"""What a stress test leaves behind: the summary table, one JSON file, one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import command_line
from experiments.explosion import DIVERGED, EXPLOSION_FACTOR, FIRST_STEPS, LEARNED, Judgement, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

SCHEMA_VERSION = 1
_COLOUR_OF_VERDICT = {"stable": "green", "exploded": "red", "diverged": "red", "no learning": "yellow"}


def summary_table(runs: Sequence[Run], judgements: Sequence[Judgement]) -> Table:
    """One row per run.

    Args:
        runs: The runs.
        judgements: Their judgements, in the same order.

    Returns:
        A table for `rich.print`.
    """
    from rich.table import Table

    table = Table(
        title="Gradient norm without clipping, and what became of the loss",
        caption=(
            f"peak, median, last: global gradient norm after the first {FIRST_STEPS} steps, whose transient "
            "has its own column.\norders: log10(peak / healthy median); the healthy median is that of the "
            "gentlest run of this mechanism and seed that learned.\nloss/mean: loss over that of predicting "
            "the mean, in the last tenth of the run; below "
            f"{1 - LEARNED:g} counts as learning. Definitions: experiments/explosion.py"
        ),
        caption_justify="left",
    )
    for name in ("mechanism", "rate", "seed"):
        table.add_column(name)
    for name in ("first peak", "peak", "median", "last", "orders", "loss first", "last", "loss/mean"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("first layer to explode")
    table.add_column("verdict", no_wrap=True)
    previous_rate: float | None = None
    for run, judgement in zip(runs, judgements, strict=True):
        if previous_rate not in (None, run.learning_rate):
            table.add_section()
        previous_rate = run.learning_rate
        colour = _COLOUR_OF_VERDICT.get(judgement.verdict, "white")
        table.add_row(
            run.mechanism,
            f"{run.learning_rate:g}",
            str(run.seed),
            _short(judgement.first_peak),
            _short(judgement.peak),
            _short(judgement.median),
            _short(judgement.last),
            "–" if judgement.orders is None else f"{judgement.orders:+.1f}",
            _short(run.losses[0] if len(run.losses) else None),
            _short(run.losses[-1] if len(run.losses) else None),
            _short(1 - judgement.explained_variance),
            judgement.first_layer or "–",
            f"[{colour}]{judgement.verdict}[/]",
        )
    return table


def conclusion(runs: Sequence[Run], judgements: Sequence[Judgement]) -> str:
    """How each mechanism fared at the ladder's top, in one line.

    Args:
        runs: At least one run.
        judgements: Their judgements, in the same order.

    Returns:
        For example "At learning rate 3: softmax 2 of 2 exploded; sigmoid 1 of 2 exploded, 1 diverged."
    """
    top = max(run.learning_rate for run in runs)
    parts = []
    for mechanism in dict.fromkeys(run.mechanism for run in runs):
        verdicts = [
            judgement.verdict
            for run, judgement in zip(runs, judgements, strict=True)
            if (run.mechanism, run.learning_rate) == (mechanism, top)
        ]
        counts = ", ".join(
            f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(sorted(verdicts))
        )
        if verdicts:
            parts.append(f"{mechanism} {counts} (of {len(verdicts)})")
    return f"At learning rate {top:g}: {'; '.join(parts)}."


def write_json(
    path: Path, runs: Sequence[Run], judgements: Sequence[Judgement], facts: dict[str, Any]
) -> None:
    """Write everything but the per-layer series, which TensorBoard's files hold.

    Args:
        path: The file to write.
        runs: The runs.
        judgements: Their judgements, in the same order.
        facts: Further top-level entries: configuration, versions, hardware, commit.
    """
    content = {
        "schema_version": SCHEMA_VERSION,
        **facts,
        "definitions": {
            "first_steps": FIRST_STEPS,
            "explosion_factor": EXPLOSION_FACTOR,
            "learned_explained_variance": LEARNED,
            "diverged_loss_factor": DIVERGED,
        },
        "runs": [
            {
                "name": run.name,
                "mechanism": run.mechanism,
                "learning_rate": run.learning_rate,
                "seed": run.seed,
                "steps": len(run.grad_norms),
                "seconds": round(run.seconds, 2),
                **asdict(judgement),
                "series": {
                    "loss": run.losses.tolist(),
                    "mean_loss": run.mean_losses.tolist(),
                    "grad_norm": run.grad_norms.tolist(),
                },
            }
            for run, judgement in zip(runs, judgements, strict=True)
        ],
    }
    command_line.write_json(path, content)


def draw_figure(path: Path, runs: Sequence[Run], judgements: Sequence[Judgement]) -> None:
    """Gradient norm against step, one panel per mechanism, one colour per learning rate.

    Args:
        path: A .png or .svg file.
        runs: At least one run.
        judgements: Their judgements, in the same order.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global pyplot state
    from matplotlib.figure import Figure

    mechanisms = list(dict.fromkeys(run.mechanism for run in runs))
    figure = Figure(figsize=(1.5 + 4.5 * len(mechanisms), 4.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(mechanisms), sharex=True, sharey=True, squeeze=False)[0]
    for panel, mechanism in zip(panels, mechanisms, strict=True):
        chosen = [pair for pair in zip(runs, judgements, strict=True) if pair[0].mechanism == mechanism]
        _draw_panel(panel, chosen, sorted({run.learning_rate for run in runs}))
        panel.set_title(f"{mechanism} attention")
        panel.set_xlabel("optimizer step")
    panels[0].set_ylabel("global gradient norm, not clipped")
    handles, labels = panels[0].get_legend_handles_labels()
    for panel in panels[1:]:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles, labels = [*handles, handle], [*labels, label]
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path)


def _draw_panel(panel: Axes, pairs: list[tuple[Run, Judgement]], rates: list[float]) -> None:
    from matplotlib import colormaps

    # viridis stays in order for the colour-blind and in grey; its palest end is left out on white.
    colours = dict(zip(rates, colormaps["viridis"](np.linspace(0, 0.9, len(rates))), strict=True))
    panel.set_yscale("log")
    panel.axvspan(0, FIRST_STEPS - 0.5, color="0.93", linewidth=0, label=f"first {FIRST_STEPS} steps")
    labelled = set()
    for run, _ in pairs:
        label = None if run.learning_rate in labelled else f"learning rate {run.learning_rate:g}"
        labelled.add(run.learning_rate)
        colour = colours[run.learning_rate]
        finite = np.where(np.isfinite(run.grad_norms) & (run.grad_norms > 0), run.grad_norms, np.nan)
        panel.plot(finite, color=colour, linewidth=1.2, alpha=0.85, label=label)
        if not np.isfinite([*run.losses, *run.grad_norms]).all() and not np.isnan(finite).all():
            last = int(np.flatnonzero(~np.isnan(finite))[-1])
            panel.plot(last, finite[last], "x", color=colour, markersize=9, markeredgewidth=2)
    baselines = [judgement.healthy_median for _, judgement in pairs if judgement.healthy_median]
    if baselines:
        panel.axhline(
            float(np.median(baselines)) * EXPLOSION_FACTOR,
            color="black",
            linestyle="--",
            linewidth=1,
            label=f"{EXPLOSION_FACTOR:.0e}".replace("e+0", "e") + " × healthy median",
        )
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.02)


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"

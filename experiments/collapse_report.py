"""What an attention-collapse demonstration leaves behind: a table, a verdict, JSON, one figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.reading import RecordedSeries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

QUANTITIES = {
    "attention/entropy": "entropy (nats)",
    "attention/max_logit": "largest logit",
    "attention/jacobian_frobenius": "row Jacobian ‖J‖ꜰ",
}
LOSS = "loss/(all)"
DEPARTURE_FACTOR = 2.0
LAST_STEPS = 10


@dataclass(frozen=True)
class PairedRuns:
    """Two runs of one seed, the second with a fault.

    Attributes:
        clean: Tag `quantity/layer` → series.
        faulty: The same of the faulty run.
        fault_step: First step with the fault.
        fault_layer: Attention layer it sits in.
    """

    clean: dict[str, RecordedSeries]
    faulty: dict[str, RecordedSeries]
    fault_step: int
    fault_layer: str

    @property
    def layers(self) -> list[str]:
        """Attention layers in model order."""
        prefix = "attention/entropy/"
        return [tag.removeprefix(prefix) for tag in self.clean if tag.startswith(prefix)]

    def departure(self, quantity: str, layer: str) -> int | None:
        """First recorded step from which a series stays at least a factor 2 from that of the clean run.

        Args:
            quantity: A key of `QUANTITIES`.
            layer: An attention layer.

        Returns:
            The step; None if the series is within the factor at the end.
        """
        clean, faulty = self.clean[f"{quantity}/{layer}"], self.faulty[f"{quantity}/{layer}"]
        distance = np.abs(np.log(np.maximum(faulty.values, 1e-300) / np.maximum(clean.values, 1e-300)))
        within = np.flatnonzero(~(distance >= np.log(DEPARTURE_FACTOR)))
        first = int(within[-1]) + 1 if len(within) else 0
        return int(clean.steps[first]) if first < len(clean.steps) else None

    def loss_summary(self) -> dict[str, float]:
        """The two losses at the end, their largest distance, and what hides it.

        Returns:
            "clean" and "faulty": means over the last ten steps. "largest_difference": over all steps.
            "scatter": standard deviation of the clean loss from batch to batch since the fault began, from
            its successive differences, so that the trend does not count (NaN with fewer than two steps).
        """
        clean, faulty = self.clean[LOSS].values, self.faulty[LOSS].values
        steps = np.diff(clean[self.fault_step :])
        return {
            "clean": float(clean[-LAST_STEPS:].mean()),
            "faulty": float(faulty[-LAST_STEPS:].mean()),
            "largest_difference": float(np.abs(faulty - clean).max()),
            "scatter": float(np.sqrt(np.square(steps).mean() / 2)) if len(steps) else float("nan"),
        }


def summary_table(pair: PairedRuns) -> Table:
    """One row per attention layer: before the fault, at the end, and at the end of the clean run.

    Args:
        pair: The runs.

    Returns:
        A table for `rich.print`.
    """
    from rich.table import Table

    before, end = _steps_of_table(pair)
    loss = pair.loss_summary()
    table = Table(
        title="Attention layers of the faulty run",
        caption=(
            "(clean): the same step of the run without the fault.\n"
            f"Loss, last {LAST_STEPS} steps: clean run {loss['clean']:.3f}, faulty run {loss['faulty']:.3f}."
        ),
        caption_justify="left",
    )
    table.add_column("layer", no_wrap=True)
    for heading in QUANTITIES.values():
        table.add_column(f"{heading}\nstep {before}", justify="right", no_wrap=True)
        table.add_column(f"\nstep {end}", justify="right", no_wrap=True)
        table.add_column("\n(clean)", justify="right", no_wrap=True)
    for layer in pair.layers:
        cells = []
        for quantity in QUANTITIES:
            tag = f"{quantity}/{layer}"
            cells += [
                _at(pair.faulty[tag], before),
                _at(pair.faulty[tag], end),
                _at(pair.clean[tag], end),
            ]
        style = "bold red" if layer == pair.fault_layer else None
        table.add_row(
            layer, *(f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}" for value in cells), style=style
        )
    return table


def conclusion(pair: PairedRuns) -> str:
    """Which layers left the clean run, by what and when, and what the loss did.

    Args:
        pair: The runs.

    Returns:
        Two or more lines.
    """
    lines = []
    for layer in pair.layers:
        departures = {
            heading: step
            for quantity, heading in QUANTITIES.items()
            if (step := pair.departure(quantity, layer)) is not None
        }
        if departures:
            steps = ", ".join(f"{heading} at step {step}" for heading, step in departures.items())
            lines.append(f"{layer} leaves the clean run (factor {DEPARTURE_FACTOR:g}, to stay): {steps}.")
    if not lines:
        lines.append(f"No attention layer leaves the clean run by a factor of {DEPARTURE_FACTOR:g}.")
    loss = pair.loss_summary()
    lines.append(
        f"The loss is never more than {loss['largest_difference']:.3f} from the clean run's, "
        f"which scatters by {loss['scatter']:.3f} from batch to batch."
    )
    return "\n".join(lines)


def summary(pair: PairedRuns) -> dict[str, Any]:
    """Everything the table and the figure show, for JSON.

    Args:
        pair: The runs.

    Returns:
        Keys "definitions", "loss", "departures" and "series".
    """
    tags = [LOSS, *(f"{quantity}/{layer}" for quantity in QUANTITIES for layer in pair.layers)]
    return {
        "definitions": {"departure_factor": DEPARTURE_FACTOR, "loss_mean_over_last_steps": LAST_STEPS},
        "loss": pair.loss_summary(),
        "departures": {
            layer: {quantity: pair.departure(quantity, layer) for quantity in QUANTITIES}
            for layer in pair.layers
        },
        "series": {
            name: {
                tag: {"steps": run[tag].steps.tolist(), "values": run[tag].values.tolist()} for tag in tags
            }
            for name, run in (("clean", pair.clean), ("faulty", pair.faulty))
        },
    }


def draw_figure(path: Path, pair: PairedRuns) -> None:
    """Loss, and the attention quantities of every layer, against step.

    Args:
        path: A .png or .svg file.
        pair: The runs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global pyplot state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True).flat
    loss_panel, *attention_panels = panels
    loss_panel.plot(*pair.clean[LOSS], color="0.65", linewidth=3.5, label="loss, clean run")
    loss_panel.plot(*pair.faulty[LOSS], color="black", linewidth=1, linestyle="--", label="loss, faulty run")
    loss_panel.set_title("loss (nats)")
    for panel, (quantity, heading) in zip(attention_panels, QUANTITIES.items(), strict=True):
        _draw_layers(panel, pair, quantity)
        panel.set_title(heading)
    attention_panels[1].set_yscale("log")
    for panel in (loss_panel, *attention_panels):
        panel.axvline(pair.fault_step, color="0.4", linewidth=1, linestyle=":", label="fault begins")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.02)
    for panel in attention_panels[1:]:
        panel.set_xlabel("optimizer step")
    handles, labels = loss_panel.get_legend_handles_labels()
    for handle, label in zip(*attention_panels[0].get_legend_handles_labels(), strict=True):
        if label not in labels:
            handles, labels = [*handles, handle], [*labels, label]
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path)


def _draw_layers(panel: Axes, pair: PairedRuns, quantity: str) -> None:
    from matplotlib import colormaps

    # Told apart by dashes as well as by colour; the faulty layer by its weight and by black.
    healthy = [layer for layer in pair.layers if layer != pair.fault_layer]
    colours = colormaps["viridis"](np.linspace(0.2, 0.7, max(1, len(healthy))))
    dashes = ["-", (0, (6, 2)), (0, (4, 2, 1, 2)), (0, (1.5, 1.5))]
    for i, layer in enumerate(healthy):
        series = pair.faulty[f"{quantity}/{layer}"]
        panel.plot(*series, color=colours[i], linestyle=dashes[i % len(dashes)], linewidth=1.5, label=layer)
    tag = f"{quantity}/{pair.fault_layer}"
    panel.plot(*pair.clean[tag], color="0.65", linewidth=3.5, label=f"{pair.fault_layer}, clean run")
    panel.plot(*pair.faulty[tag], color="black", linewidth=2, label=f"{pair.fault_layer}, fault")


def _steps_of_table(pair: PairedRuns) -> tuple[int, int]:
    """The last recorded step before the fault (the first if there is none), and the last of all."""
    steps = pair.clean[f"attention/entropy/{pair.fault_layer}"].steps
    before = steps[steps < pair.fault_step]
    return int(before[-1] if len(before) else steps[0]), int(steps[-1])


def _at(series: RecordedSeries, step: int) -> float:
    return float(series.values[series.steps == step][0])


def _short(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"

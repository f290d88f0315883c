"""The seeds of one long run beside each other, softmax and sigmoid: what is so in all, and since when.

    python -m experiments.stress_seeds ARCHIVE.zip ... --run lead-softmax-seed0 --out runs/seeds

Seeds are all runs that differ from the named one in nothing but name, seed, mechanism and length. Reads what
`experiments.stress_ledger` reads; writes seeds.md and seeds.png.

* **Calm**: the lowest median gradient norm of `CALM_STEPS` consecutive steps after the first 300, begun at
  each 50th. (The ledger divides by steps 100 to 300 instead, fixed before any run; gradients go on falling
  after them.) A norm that is no finite number counts as infinite.
* **Grows from**: the first step after the calm ones began whose next fifty have a median of twice that.
* **Late** and **largest**: the median of the last `CALM_STEPS` steps, and the largest single one after the
  first `CALM_STEPS`, over calm.
* **Collapsed layers**: attention layers that are collapsed as in the ledger: softmax rows of less than 0.1
  nats of entropy, or more than half of the sigmoid weights saturated. **Frozen MLPs**: those whose Adam
  steps are below a thousandth of full size. Both at the last measurement.
* **Learns from**: the first validation with a gain of `LEAST_GAIN`: 0.05 nats below the unigram loss, or 0.05
  of the variance explained. (The verdict *learned* asks for as much below what is known without attention.)

All gradient norms are of the whole model: single layers can grow by orders within a calm one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.cell_transformer import MECHANISMS
from experiments.command_line import experiment_parser, fail
from experiments.run_records import RecordedRun
from experiments.stress_ledger import read_runs
from experiments.sustained_explosion import (
    BASELINE,
    LEAST_GAIN,
    gain_of,
    layer_collapses,
    nan_as_infinite,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    *("run", "steps", "calm", "calm from", "grows from", "late", "largest", "collapsed layers"),
    *("frozen MLPs", "learns from", "lowest validation", "last validation"),
)
CALM_STEPS = 1000
FROZEN = 1e-3  # Adam's step over its full size
_MEDIAN_STEPS = 50
_FREE = ("name", "seed", "mechanism", "steps")

FloatArray = NDArray[np.float64]
Steps = NDArray[np.int32]


@dataclass(frozen=True)
class SeedSummary:
    """A run's row; None where there is nothing to say. See the module's definitions.

    Attributes:
        calm: Gradient norm; None, too, where it is no positive number.
        calm_from: Step at which the calm steps begin.
        grows_from: Step.
        late: Over calm.
        largest: Over calm.
        collapsed_layers: Number; None where it was not measured.
        frozen_mlps: Number; None where it was not measured.
        learns_from: Step.
        lowest_validation: Loss, of those that are numbers.
        last_validation: Loss.
    """

    calm: float | None
    calm_from: int | None
    grows_from: int | None
    late: float | None
    largest: float | None
    collapsed_layers: int | None
    frozen_mlps: int | None
    learns_from: int | None
    lowest_validation: float | None
    last_validation: float | None


def seeds_of(runs: dict[str, RecordedRun], name: str) -> dict[str, RecordedRun]:
    """The runs that differ from one in name, seed, mechanism and length alone, and that one.

    Args:
        runs: By name.
        name: Of one of them.

    Raises:
        ValueError: There is no such run.
    """
    if name not in runs:
        raise ValueError(f"Expected one of the runs {', '.join(runs)}; got {name!r}.")
    wanted = _fixed(runs[name])
    return {other: run for other, run in runs.items() if _fixed(run) == wanted}


def summarise(run: RecordedRun) -> SeedSummary:
    """One run's row.

    Args:
        run: Gradient norms of every step from the first.
    """
    norms = nan_as_infinite(run.values("grad_norm"))
    calm = calm_from = grows_from = late = largest = None
    if len(norms) >= BASELINE.stop + CALM_STEPS:
        starts = range(BASELINE.stop, len(norms) - CALM_STEPS + 1, _MEDIAN_STEPS)
        lowest, begins = min((float(np.median(norms[i : i + CALM_STEPS])), i) for i in starts)
        calm, calm_from = (lowest, begins) if 0 < lowest < np.inf else (None, None)
    if calm is not None and calm_from is not None:
        medians = _running_medians(norms)[calm_from:]
        grown = np.flatnonzero(medians > 2 * calm)
        grows_from = calm_from + int(grown[0]) if grown.size else None
        late = float(np.median(norms[-CALM_STEPS:])) / calm
        largest = float(norms[CALM_STEPS:].max()) / calm
    validation: list[tuple[int, float]] = run.facts["validation"]
    learned = [step for step, loss in validation if gain_of(run, loss) >= LEAST_GAIN]
    collapsed, frozen = (
        int(counts[-1]) if len(counts) else None for _, counts in (collapsed_layers(run), frozen_mlps(run))
    )
    return SeedSummary(
        calm,
        calm_from,
        grows_from,
        late,
        largest,
        collapsed_layers=collapsed,
        frozen_mlps=frozen,
        learns_from=learned[0] if learned else None,
        lowest_validation=min((loss for _, loss in validation if not np.isnan(loss)), default=None),
        last_validation=validation[-1][1] if validation else None,
    )


def collapsed_layers(run: RecordedRun) -> tuple[Steps, NDArray[np.int64]]:
    """Steps of the measurements, and how many attention layers are collapsed at each; empty without any."""
    return _count(layer_collapses(run))


def frozen_mlps(run: RecordedRun) -> tuple[Steps, NDArray[np.int64]]:
    """Steps of the measurements, and how many MLPs' first layers Adam does not move; empty without any."""
    layers = [layer for layer in run.layers("adam_update_rms") if layer.endswith(".mlp.hidden")]
    sizes = [run.over_steps("adam_update_rms", layer) for layer in layers]
    return _count([(steps, values < FROZEN) for steps, values in sizes])


def markdown_table(runs: dict[str, RecordedRun]) -> str:
    """One line a run: what `summarise` finds, as Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, run in runs.items():
        row = summarise(run)
        cells = (
            name,
            str(run.facts["steps"]),
            _short(row.calm, ".3f"),
            _short(row.calm_from, "d"),
            _short(row.grows_from, "d"),
            _short(row.late, ".1f"),
            _short(row.largest, ".0f"),
            _short(row.collapsed_layers, "d"),
            _short(row.frozen_mlps, "d"),
            _short(row.learns_from, "d"),
            _short(row.lowest_validation, ".3f"),
            _short(row.last_validation, ".3f"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_seeds(path: Path, runs: dict[str, RecordedRun]) -> None:
    """Gradient norm, validation loss, collapsed layers and frozen MLPs over the steps; a colour a seed.

    Args:
        path: A .png or .svg file.
        runs: Of `seeds_of`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global pyplot state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(4, 2, sharex=True, sharey="row", height_ratios=(3, 2, 1.2, 1.2))
    for column, mechanism in enumerate(MECHANISMS):
        panels[0, column].set_title(mechanism)
        panels[0, column].set_yscale("log")
        of_mechanism = [run for run in runs.values() if run.facts["config"]["mechanism"] == mechanism]
        for run in sorted(of_mechanism, key=lambda run: run.facts["config"]["seed"]):
            _draw_run(panels[:, column], run)
    facts = next(iter(runs.values())).facts
    for panel in panels[1]:
        panel.axhline(facts["reference"], color="gray", linestyle=":", linewidth=1, label="knowing nothing")
        panel.axhline(
            facts["without_attention"], color="gray", linestyle="--", linewidth=1, label="without attention"
        )
    next(panel for panel in panels[0] if panel.lines).legend(loc="upper left")
    panels[1, 0].legend(loc="lower left")
    labels = (
        "gradient norm,\nmedian of 50 steps\n(pale: each step)",
        f"validation loss:\n{facts['metric']}",
        "collapsed\nlayers",
        "frozen MLPs",
    )
    for panel, label in zip(panels[:, 0], labels, strict=True):
        panel.set_ylabel(label)
    figure.supxlabel("optimizer step")
    figure.savefig(path)


def _draw_run(panels: Sequence[Axes], run: RecordedRun) -> None:
    seed = run.facts["config"]["seed"]
    color, norms = f"C{seed}", run.values("grad_norm")
    panels[0].plot(norms, color=color, alpha=0.25, linewidth=0.4)
    panels[0].plot(_running_medians(norms), color=color, linewidth=1.5, label=f"seed {seed}")
    if validation := run.facts["validation"]:
        panels[1].plot(*zip(*validation, strict=True), color=color)
    for panel, (steps, counts) in zip(panels[2:], (collapsed_layers(run), frozen_mlps(run)), strict=True):
        panel.step(steps, counts, where="post", color=color)


def _fixed(run: RecordedRun) -> dict[str, Any]:
    return {key: value for key, value in run.facts["config"].items() if key not in _FREE}


def _running_medians(norms: FloatArray) -> FloatArray:
    """Of each step and the 49 after it; shorter by 49 steps."""
    if len(norms) < _MEDIAN_STEPS:
        return np.empty(0)
    windows = np.lib.stride_tricks.sliding_window_view(norms, _MEDIAN_STEPS)
    return np.asarray(np.median(windows, axis=1), dtype=np.float64)


def _count(layers: Sequence[tuple[Steps, NDArray[np.bool_]]]) -> tuple[Steps, NDArray[np.int64]]:
    """All layers are measured at the same steps."""
    if not layers:
        return np.empty(0, np.int32), np.empty(0, np.int64)
    return layers[0][0], np.sum([is_so for _, is_so in layers], axis=0)


def _short(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write table and figure. Exit status: 0, 2 for input that cannot be used."""
    parser = experiment_parser("stress_seeds", __doc__)
    parser.add_argument("sources", nargs="+", type=Path, help="archives, files or folders of records")
    parser.add_argument("--run", required=True, help="one of the seeds, of either mechanism")
    parser.add_argument("--out", type=Path, required=True, help="folder of table and figure")
    options = parser.parse_args(arguments)
    try:
        runs = seeds_of(read_runs(options.sources), options.run)
        options.out.mkdir(parents=True, exist_ok=True)
        table = markdown_table(runs)
        (options.out / "seeds.md").write_text(table, encoding="utf-8")
        draw_seeds(options.out / "seeds.png", runs)
    except (OSError, ValueError) as error:
        return fail("stress_seeds", error)
    print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

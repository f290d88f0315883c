"""The ledger of long runs: table, JSON and figure, from nothing but the records that were carried home.

    python -m experiments.stress_ledger ARCHIVE.zip ... --out runs/ledger

Reads the archives of `experiments.stress_queue`, single .npz files and folders of either. Of a run that is
there several times, in pieces, the longest is taken. Definitions: `experiments/sustained_explosion.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.command_line import experiment_parser, fail, write_json
from experiments.run_records import RecordedRun, read_run, run_files
from experiments.sustained_explosion import LongJudgement, judge_long_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    *("run", "steps", "s / step", "baseline", "healthy baseline", "first steps", "peak", "sustained"),
    *(
        "diverged at",
        "first layer",
        "train loss",
        "validation loss",
        "without attention",
        "reference",
        "gain",
    ),
    *("healthy run", "collapsed layers", "query gradient", "verdict"),
)


def read_runs(sources: Sequence[Path]) -> dict[str, RecordedRun]:
    """All runs of some archives, files and folders, by name.

    Args:
        sources: .zip archives, .npz files, or folders with such files in them.

    Returns:
        The longest of each name, in order of names.

    Raises:
        FileNotFoundError: A source is not there, or there are no runs in any.
        ValueError: A file cannot be read.
    """
    runs: dict[str, RecordedRun] = {}
    for place, file in (found for source in sources for found in run_files(source)):
        try:
            run = read_run(file)
        except ValueError as error:
            raise ValueError(f"{place} cannot be read. {error} Leave it out.") from error
        name = run.facts["config"]["name"]
        if name not in runs or run.facts["steps"] >= runs[name].facts["steps"]:
            runs[name] = run
    if not runs:
        raise FileNotFoundError(
            f"Expected records of runs (.npz, or .zip archives of them) in {', '.join(map(str, sources))}; "
            "there are none. `python -m experiments.stress_queue` writes them."
        )
    return dict(sorted(runs.items()))


def markdown_table(runs: dict[str, RecordedRun], judgements: dict[str, LongJudgement]) -> str:
    """One line a run.

    Args:
        runs: The runs by name.
        judgements: Their judgements.

    Returns:
        A Markdown table; orders of magnitude for first steps, peak and sustained.
    """
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, run in runs.items():
        judgement = judgements[name]
        steps = f"{run.facts['steps']}{'' if run.facts['is_finished'] else ' (cut)'}"
        cells = (
            name,
            steps,
            _short(run.facts["seconds"] / max(1, run.facts["steps"]), 2),
            _short(judgement.baseline),
            _yes(judgement.has_baseline),
            _orders(judgement.first_steps),
            _orders(judgement.peak),
            _orders(judgement.sustained),
            "–" if judgement.diverged_at is None else str(judgement.diverged_at),
            judgement.first_layer or "–",
            _short(judgement.train_loss, 4),
            _short(judgement.validation_loss, 4),
            _short(run.facts["without_attention"], 4),
            _short(run.facts["reference"], 4),
            _short(judgement.gain),
            _yes(judgement.is_healthy),
            _short(judgement.collapsed_layers, 2),
            _short(judgement.query_gradient, 1),
            judgement.verdict,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def largest_learning_rates(runs: dict[str, RecordedRun], judgements: dict[str, LongJudgement]) -> str:
    """Per ladder (runs that differ in rate and seed alone) the largest rate at which every seed learned.

    Runs that were cut have no say.

    Args:
        runs: The runs by name.
        judgements: Their judgements.

    Returns:
        A line a ladder with, per mechanism, how many seeds learned at each rate; empty without any.
    """
    ladders: dict[str, dict[str, dict[float, list[bool]]]] = {}
    questions: dict[str, list[str]] = {}
    for name, run in runs.items():
        if not run.facts["is_finished"]:
            continue
        same = dict(run.facts["config"])
        mechanism, rate, _, _ = (same.pop(key) for key in ("mechanism", "learning_rate", "seed", "name"))
        key = json.dumps(same, sort_keys=True)
        ladder = ladders.setdefault(key, {})
        questions.setdefault(key, []).append(name.partition(f"-{mechanism}-")[0])
        has_learned = judgements[name].verdict == "learned"
        ladder.setdefault(mechanism, {}).setdefault(rate, []).append(has_learned)
    lines = []
    for key, ladder in ladders.items():
        if len({rate for rates in ladder.values() for rate in rates}) < 2:
            continue
        parts = []
        for mechanism, rates in sorted(ladder.items()):
            largest = max((rate for rate, learned in rates.items() if all(learned)), default=None)
            seeds = ", ".join(
                f"{sum(rates[rate])} of {len(rates[rate])} at {rate:g}" for rate in sorted(rates)
            )
            parts.append(f"{mechanism} {'none' if largest is None else f'{largest:g}'} (seeds: {seeds})")
        asked = ", ".join(dict.fromkeys(questions[key]))
        lines.append(f"Largest rate at which every seed learned, of {asked}: {'; '.join(parts)}.\n")
    return "\n".join(lines)


def strongest_pair(
    runs: dict[str, RecordedRun], judgements: dict[str, LongJudgement]
) -> tuple[RecordedRun, RecordedRun] | None:
    """The softmax run with the largest sustained factor that has a sigmoid run beside it, and that one.

    Runs with a healthy baseline come first; runs without a recorded step, or with clipping, have no picture.
    """
    pairs = []
    for name, run in runs.items():
        other = name.replace("-softmax-", "-sigmoid-")
        if "-softmax-" not in name or other not in runs or run.facts["config"].get("clip_norm") is not None:
            continue
        if min(_num_steps(run), _num_steps(runs[other])) > 0:
            judgement = judgements[name]
            sustained = -np.inf if judgement.sustained is None else judgement.sustained
            pairs.append((judgement.has_baseline, sustained, name, run, runs[other]))
    return max(pairs, key=lambda pair: pair[:3])[3:] if pairs else None


def draw_layers(path: Path, pair: tuple[RecordedRun, RecordedRun]) -> None:
    """Gradient norm of every layer over the steps, softmax beside sigmoid, in one scale of colours.

    Args:
        path: A .png or .svg file.
        pair: Two runs of the same model.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global pyplot state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(1, 3))
    images = [_image(run) for run in pair]
    ends = [_last_step(run) for run in pair]
    finite = np.concatenate([image[np.isfinite(image)] for image in images])
    limits = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    for column, (run, image, end) in enumerate(zip(pair, images, ends, strict=True)):
        _draw_norm(panels[0, column], run)
        drawn = panels[1, column].imshow(
            image,
            aspect="auto",
            interpolation="nearest",
            vmin=limits[0],
            vmax=limits[1],
            cmap="viridis",
            extent=(-0.5, end + 0.5, len(image) - 0.5, -0.5),
        )
    panels[0, 0].set_xlim(-0.5, max(ends) + 0.5)
    layers = pair[0].layers("grad_norm")
    blocks = [i for i, layer in enumerate(layers) if layer.endswith("attention.query")]
    panels[1, 0].set_yticks(blocks, [layers[i] for i in blocks], fontsize=7)
    panels[0, 0].set_ylabel("gradient norm,\nall layers")
    figure.colorbar(drawn, ax=panels, label="log10 of the layer's gradient norm")
    figure.supxlabel("optimizer step")
    figure.savefig(path)


def _num_steps(run: RecordedRun) -> int:
    return len(run.values("grad_norm"))


def _last_step(run: RecordedRun) -> int:
    return max(int(steps[-1]) for steps, _ in run.series.values() if len(steps))


def _image(run: RecordedRun) -> np.ndarray:
    """[layers, recorded steps] log10 of gradient norms; NaN where they are zero or not finite."""
    norms = np.stack([run.values("grad_norm", layer) for layer in run.layers("grad_norm")])
    return np.log10(np.where(np.isfinite(norms) & (norms > 0), norms, np.nan))


def _draw_norm(panel: Axes, run: RecordedRun) -> None:
    norms = run.values("grad_norm")
    panel.plot(np.where(np.isfinite(norms), norms, np.nan), linewidth=0.8)
    panel.set_yscale("log")
    panel.set_title(run.facts["config"]["name"])


def write_ledger(sources: Sequence[Path], out: Path, softmax_run: str | None = None) -> str:
    """Judge all runs and write ledger.md, ledger.json and gradient_norms.png.

    Args:
        sources: See `read_runs`.
        out: A folder; it is made.
        softmax_run: Which run the figure shows, beside its sigmoid twin; None takes the strongest.

    Returns:
        The Markdown table.

    Raises:
        FileNotFoundError: There is no run.
        ValueError: A file cannot be read, or there is no such pair of runs.
    """
    runs = read_runs(sources)
    shown = runs
    if softmax_run is not None:
        names = softmax_run, softmax_run.replace("-softmax-", "-sigmoid-")
        if not set(names) <= runs.keys() or "-softmax-" not in softmax_run:
            raise ValueError(f"Expected a softmax run with a sigmoid twin among {', '.join(runs)}.")
        shown = {name: runs[name] for name in names}
    judgements = {name: judge_long_run(run) for name, run in runs.items()}
    out.mkdir(parents=True, exist_ok=True)
    table = markdown_table(runs, judgements)
    if rates := largest_learning_rates(runs, judgements):
        table += f"\n{rates}"
    (out / "ledger.md").write_text(table, encoding="utf-8")
    rows: list[dict[str, Any]] = [
        {**run.facts, "judgement": asdict(judgements[name]), "alerts": run.alerts[:20]}
        for name, run in runs.items()
    ]
    write_json(out / "ledger.json", {"schema_version": 1, "runs": rows})
    if pair := strongest_pair(shown, judgements):
        draw_layers(out / "gradient_norms.png", pair)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the ledger. Exit status: 0, 2 for input that cannot be used."""
    parser = experiment_parser("stress_ledger", __doc__)
    parser.add_argument("sources", nargs="+", type=Path, help="archives, files or folders of records")
    parser.add_argument("--out", type=Path, required=True, help="folder of table, JSON and figure")
    parser.add_argument("--figure", metavar="RUN", help="the softmax run to draw (default: the strongest)")
    options = parser.parse_args(arguments)
    try:
        print(write_ledger(options.sources, options.out, options.figure), end="")
    except (OSError, ValueError) as error:
        return fail("stress_ledger", error)
    return 0


def _short(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _orders(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f}"


if __name__ == "__main__":
    sys.exit(main())

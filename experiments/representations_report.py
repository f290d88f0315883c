"""What the runs of the representation experiment say: tables, figures, JSON and the sentences on the claims.

    python -m experiments.representations_report runs/representations/results --out runs/report
    python -m experiments.representations_report archives/*.zip --out docs/results/representations

Reads runs, archives and folders of them. Everything is computed from the runs: metrics of the held-out cells'
embeddings, differences paired by seed, and each sentence from its interval. Writes `representations.md`,
`representations.json`, `differences.png` and `embeddings.png`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from experiments.command_line import experiment_parser, run_facts, write_json
from experiments.embedding_metrics import METRICS
from experiments.paired_comparison import Comparison, claim_sentence, compare, overall
from experiments.provenance import provenance
from experiments.representation_figures import draw_differences, draw_embeddings
from experiments.representation_plan import best_rate
from experiments.representation_results import ATTENTION, Judged, RawRun, judge, read_raw

LOSSES = {
    "held_out_loss": "cross-entropy of masked genes of held-out cells, nats",
    "validation_loss": "the same of the validation cells, which chose rate and weights",
}
# Fixed before any run; what is not here is secondary and decides nothing.
PRIMARY = {
    "silhouette": "Silhouette",
    "cohesion": "Within-type cosine similarity",
    "held_out_loss": "Held-out loss",
}
METHODS = ("PCA", "softmax untrained", "sigmoid untrained", "softmax", "sigmoid")


def compare_all(judged: Sequence[Judged], controls: set[str]) -> dict[str, list[Comparison]]:
    """Paired comparisons of every metric.

    Args:
        judged: Of all runs.
        controls: Data sets that stand apart: their comparisons come last and count in no family.

    Returns:
        Metric → comparisons.
    """
    values = {(each.dataset, each.method, each.seed): each.values for each in judged}
    datasets = list(dict.fromkeys(each.dataset for each in judged))
    found: dict[str, list[Comparison]] = {}
    for metric in (*METRICS, *LOSSES):
        family: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        apart: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for dataset in datasets:
            seeds = [
                seed
                for name, method, seed in values
                if (name, method) == (dataset, "softmax") and (dataset, "sigmoid", seed) in values
            ]
            if seeds:
                softmax, sigmoid = (
                    np.array([values[dataset, method, seed][metric] for seed in seeds])
                    for method in ("softmax", "sigmoid")
                )
                (apart if dataset in controls else family)[dataset] = (softmax, sigmoid)
        found[metric] = compare(family) + compare(apart)
    return found


def verdicts(comparisons: dict[str, list[Comparison]], controls: set[str]) -> dict[str, str]:
    """One sentence for each claim, and for the other definitions of separation and loss.

    Args:
        comparisons: Of `compare_all`.
        controls: Left out.

    Returns:
        Metric → sentence; empty where there are no pairs.
    """
    claims: dict[str, dict[str, Any]] = {
        "silhouette": {"subject": "Separation (silhouette)", "direction": "higher", "size": 0.25},
        "cohesion": {"subject": "Cohesion (within-type cosine similarity)", "direction": "higher"},
        "held_out_loss": {"subject": "Loss on held-out cells", "direction": "lower"},
        "silhouette_scib": {"subject": "Separation (scIB's silhouette)", "direction": "higher", "size": 0.25},
        "distance_ratio": {"subject": "Separation (distance ratio)", "direction": "higher", "size": 0.25},
        "connectivity": {"subject": "Cohesion (graph connectivity)", "direction": "higher"},
        "validation_loss": {"subject": "Loss on validation cells", "direction": "lower"},
    }
    sentences = {}
    for metric, claim in claims.items():
        if family := [each for each in comparisons[metric] if each.dataset not in controls]:
            sentences[metric] = claim_sentence(comparisons=family, **claim)
    return sentences


def attention_relations(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    """Whether attention statistics go with the outcome: rank correlations within data sets.

    Ranks are taken over the seeds of one data set and mechanism, then pooled: differences between data sets
    tell nothing. Exploratory: not corrected for their number.

    Args:
        judged: Of all runs.

    Returns:
        One entry per mechanism, quantity and outcome.
    """
    rows = []
    for method in ("softmax", "sigmoid"):
        for quantity in ATTENTION:
            for outcome in ("silhouette", "held_out_loss"):
                left, right = [], []
                for dataset in dict.fromkeys(each.dataset for each in judged):
                    runs = [e.values for e in judged if (e.dataset, e.method) == (dataset, method)]
                    runs = [values for values in runs if quantity in values]
                    if len(runs) > 2:
                        left.append(_centred_ranks([values[quantity] for values in runs]))
                        right.append(_centred_ranks([values[outcome] for values in runs]))
                if left:
                    x, y = np.concatenate(left), np.concatenate(right)
                    size = float(np.sqrt((x**2).sum() * (y**2).sum()))
                    correlation = float((x * y).sum() / size) if size else float("nan")
                    freedom = len(x) - len(left) - 1
                    low, high = _fisher_interval(correlation, freedom)
                    rows.append(
                        {"method": method, "quantity": quantity, "outcome": outcome, "runs": len(x),
                         "correlation": correlation, "low": low, "high": high}
                    )  # fmt: skip
    return rows


def selections(runs: Sequence[RawRun]) -> list[dict[str, Any]]:
    """Validation losses of the grid, and the rate that was chosen.

    Args:
        runs: All.

    Returns:
        One entry per data set and mechanism.
    """
    losses: dict[tuple[str, str], dict[float, float]] = {}
    for run in runs:
        if run.config["purpose"] == "selection":
            key = run.config["dataset"], run.config["mechanism"]
            losses.setdefault(key, {})[run.config["learning_rate"]] = run.facts["validation_loss"]
    rows = []
    for (dataset, mechanism), by_rate in losses.items():
        rate = best_rate(by_rate)
        rows.append(
            {"dataset": dataset, "mechanism": mechanism, "validation_losses": dict(sorted(by_rate.items())),
             "chosen": rate, "is_edge": len(by_rate) > 1 and rate in (min(by_rate), max(by_rate))}
        )  # fmt: skip
    return rows


def markdown(
    judged: Sequence[Judged],
    runs: Sequence[RawRun],
    comparisons: dict[str, list[Comparison]],
    controls: set[str],
) -> str:
    """The page of tables.

    Args:
        judged: Of all runs.
        runs: All.
        comparisons: Of `compare_all`.
        controls: Data sets that stand apart.

    Returns:
        Markdown.
    """
    parts = [
        "# Representations of cells: softmax and sigmoid attention",
        "",
        "Computed from the runs alone.",
        "",
    ]
    parts += [f"* {sentence}" for sentence in verdicts(comparisons, controls).values()]
    for metric, title in PRIMARY.items():
        parts += ["", f"## {title}", "", f"That is, {(METRICS | LOSSES)[metric]}.", ""]
        parts += _table(
            ["data set", "softmax", "sigmoid", "difference", "interval", "p (Holm)", "sigmoid is", "seeds"],
            (
                [
                    f"{each.dataset} (control)" if each.dataset in controls else each.dataset,
                    f"{each.softmax:.4f}", f"{each.sigmoid:.4f}", f"{each.difference:+.4f}",
                    _interval(each), "–" if np.isnan(each.p) else f"{each.p:.2g}",
                    each.verdict, str(each.pairs),
                ]
                for each in comparisons[metric]
            ),
        )  # fmt: skip
    parts += ["", "## All metrics", "", "Means over seeds; after ± the standard deviation.", ""]
    for metric, meaning in METRICS.items():
        parts.append(f"* `{metric}`: {meaning}")
    parts.append("")
    parts += _table(["data set", "method", *METRICS], _metric_rows(judged))
    parts += ["", "## Learning rates", ""]
    parts += _table(
        ["data set", "mechanism", "best validation loss at each rate", "chosen"],
        (
            [
                row["dataset"], row["mechanism"],
                ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in row["validation_losses"].items()),
                f"{row['chosen']:g}" + (", the edge of the grid" if row["is_edge"] else ""),
            ]
            for row in selections(runs)
        ),
    )  # fmt: skip
    parts += ["", "## Training", "", "Speeds are of runs that shared their device.", ""]
    parts += _table(
        ["data set", "mechanism", "runs", "median steps", "kept step", "ended by patience", "padding",
         "valid tokens a second"],
        _training_rows(runs),
    )  # fmt: skip
    parts += ["", "## Attention and outcome", ""]
    parts += ["Rank correlations within data sets, exploratory (95 % intervals, not corrected).", ""]
    parts += _table(
        ["mechanism", "quantity", "outcome", "correlation", "interval", "runs"],
        (
            [
                row["method"], f"`{row['quantity']}`", row["outcome"], f"{row['correlation']:+.2f}",
                f"{row['low']:+.2f} to {row['high']:+.2f}", str(row["runs"]),
            ]
            for row in attention_relations(judged)
        ),
    )  # fmt: skip
    return "\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge the runs and write the report.

    Args:
        arguments: Command line without the program name; None reads `sys.argv`.

    Returns:
        Exit status: 0, 2 for input that cannot be used.
    """
    parser = experiment_parser("representations_report", __doc__)
    parser.add_argument("raw", nargs="+", type=Path, help="runs, archives, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    started = time.time()
    try:
        runs = read_raw(options.raw)
        judged = [each for run in runs for each in judge(run)]
        if not any(each.method in ("softmax", "sigmoid") for each in judged):
            raise ValueError("Expected finished runs with embeddings; these have only tried learning rates.")
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"representations_report: {error}", file=sys.stderr)
        return 2
    controls = {run.config["dataset"] for run in runs if run.facts.get("is_control")}
    comparisons = compare_all(judged, controls)
    page = markdown(judged, runs, comparisons, controls)
    (options.out / "representations.md").write_text(page, encoding="utf-8")
    families = {
        metric: [each for each in found if each.dataset not in controls]
        for metric, found in comparisons.items()
    }
    write_json(
        options.out / "representations.json",
        {
            "schema_version": 1,
            **run_facts("representations_report", arguments, started),
            "primary": list(PRIMARY),
            "controls": sorted(controls),
            "verdicts": verdicts(comparisons, controls),
            "comparisons": {m: [asdict(each) for each in found] for m, found in comparisons.items()},
            "overall": {m: asdict(overall(found)) for m, found in families.items() if found},
            "selections": [
                {**row, "validation_losses": {f"{k:g}": v for k, v in row["validation_losses"].items()}}
                for row in selections(runs)
            ],
            "attention": attention_relations(judged),
            "judged": [asdict(each) for each in judged],
            "runs": [{key: value for key, value in run.facts.items() if key != "versions"} for run in runs],
            **provenance("cpu"),
        },
    )
    draw_differences(options.out / "differences.png", {PRIMARY[m]: comparisons[m] for m in PRIMARY})
    draw_embeddings(options.out / "embeddings.png", runs)
    print(page)
    print(f"{len(runs)} runs. Written: {options.out}")
    return 0


def _interval(comparison: Comparison) -> str:
    if np.isnan(comparison.low):
        return "– (one seed)"
    return f"{comparison.low:+.4f} to {comparison.high:+.4f}"


def _metric_rows(judged: Sequence[Judged]) -> Iterable[list[str]]:
    for dataset in dict.fromkeys(each.dataset for each in judged):
        for method in METHODS:
            found = [each.values for each in judged if (each.dataset, each.method) == (dataset, method)]
            if not found:
                continue
            cells = []
            for metric in METRICS:
                values = np.array([each[metric] for each in found])
                spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.3f}{spread}")
            yield [dataset, method, *cells]


def _training_rows(runs: Sequence[RawRun]) -> Iterable[list[str]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        if run.config["purpose"] == "final":
            groups.setdefault((run.config["dataset"], run.config["mechanism"]), []).append(run.facts)
    for (dataset, mechanism), facts in groups.items():
        medians = {
            name: float(np.median([each[name] for each in facts]))
            for name in ("steps", "best_step", "padding", "tokens_per_second")
        }
        stopped = sum(each["is_stopped_by_patience"] for each in facts)
        yield [
            dataset, mechanism, str(len(facts)), f"{medians['steps']:g}", f"{medians['best_step']:g}",
            f"{stopped} of {len(facts)}", f"{medians['padding']:.0%}", f"{medians['tokens_per_second']:,.0f}",
        ]  # fmt: skip


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _centred_ranks(values: Sequence[float]) -> np.ndarray:
    ranks = stats.rankdata(values)
    centred: np.ndarray = (ranks - ranks.mean()) / len(ranks)
    return centred


def _fisher_interval(correlation: float, freedom: int) -> tuple[float, float]:
    if freedom < 3 or not abs(correlation) < 1:
        return float("nan"), float("nan")
    half = 1.96 / (freedom - 2) ** 0.5
    return float(np.tanh(np.arctanh(correlation) - half)), float(np.tanh(np.arctanh(correlation) + half))


if __name__ == "__main__":
    sys.exit(main())

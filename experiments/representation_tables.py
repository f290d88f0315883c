"""The page of tables of the representation experiment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.embedding_metrics import METRICS
from experiments.paired_comparison import Comparison
from experiments.representation_bootstrap import CellInterval
from experiments.representation_findings import (
    LOSSES,
    PRIMARY,
    attention_relations,
    interval_level,
    verdicts,
)
from experiments.representation_results import Judged, RawRun
from experiments.representation_scope import Scope, selections

# Of a run's facts.
_MEDIANS = (
    "steps",
    "best_step",
    "padding",
    "tokens_per_second",
    "reference",
    "without_attention",
    "validation_loss",
)
METHODS = ("PCA", "softmax untrained", "sigmoid untrained", "softmax", "sigmoid")


def markdown(
    judged: Sequence[Judged],
    runs: Sequence[RawRun],
    comparisons: dict[str, list[Comparison]],
    cells: dict[str, dict[str, CellInterval]],
    scope: Scope,
) -> str:
    """The page of tables.

    Args:
        judged: Of all runs.
        runs: All.
        comparisons: Of `compare_all`.
        cells: Of `cell_intervals`.
        scope: Of `scope_of`.

    Returns:
        Markdown.
    """
    parts = [
        "# Representations of cells: softmax and sigmoid attention",
        "",
        "Computed from the runs alone. Seeds replicate training only: split, held-out cells and chosen rate",
        f"are fixed. Tests and intervals over seeds are corrected for a family of {len(scope.planned)}, the",
        f"intervals are at {interval_level(scope)}. Primary metrics:",
        "",
    ]
    sentences = verdicts(comparisons, scope)
    parts += [f"* {sentences[metric]}" for metric in PRIMARY]
    parts += ["", "Other definitions, and the loss of the validation cells. They decide nothing:", ""]
    parts += [f"* {sentence}" for metric, sentence in sentences.items() if metric not in PRIMARY]
    for metric, title in PRIMARY.items():
        parts += ["", f"## {title}", "", f"That is, {(METRICS | LOSSES)[metric]}.", ""]
        parts += _table(
            ["data set", "softmax", "sigmoid", "difference", "interval over seeds", "p (Holm)", "sigmoid is",
             "seeds (of training)", "95 % interval over held-out cells"],
            (
                [
                    each.dataset + scope.remark(each.dataset),
                    f"{each.softmax:.4f}", f"{each.sigmoid:.4f}", f"{each.difference:+.4f}",
                    _interval(each), "–" if np.isnan(each.p) else f"{each.p:.2g}",
                    each.verdict, str(each.pairs), _cell_interval(cells[metric][each.dataset]),
                ]
                for each in comparisons[metric]
            ),
        )  # fmt: skip
    parts += ["", "## All metrics", ""]
    parts += ["Means over the seeds that both mechanisms have; after ± the standard deviation.", ""]
    for metric, meaning in METRICS.items():
        parts.append(f"* `{metric}`: {meaning}")
    parts.append("")
    parts += _table(["data set", "method", *METRICS], _metric_rows(judged, scope))
    parts += ["", "## Learning rates", ""]
    parts += _table(
        ["data set", "mechanism", "mean of lowest validation losses at each rate (seeds)", "chosen"],
        (
            [
                row["dataset"] + _control(row["dataset"], scope), row["mechanism"],
                ", ".join(
                    f"{rate:g}: {np.mean(losses):.4f} ({len(losses)})"
                    for rate, losses in row["validation_losses"].items()
                ),
                "none" if row["chosen"] is None else f"{row['chosen']:g}" + ", an edge" * row["is_edge"],
            ]
            for row in sorted(selections(runs), key=lambda row: row["dataset"] in scope.controls)
        ),
    )  # fmt: skip
    parts += ["", "## Training", "", "Medians of the final runs.", ""]
    parts += [
        "Losses in nats, on validation cells: by how common genes are, by that at each rank (all that is",
        "known without attention), and the model's. Valid tokens a second are without padding; probes, looks",
        "at the validation cells and whatever else ran on the machine are in their time.",
        "",
    ]
    parts += _table(
        ["data set", "mechanism", "runs", "median steps", "kept step", "ended by patience",
         "by steps", "diverged", "padding", "valid tokens a second", "common genes", "without attention",
         "model"],
        _training_rows(runs, scope),
    )  # fmt: skip
    parts += ["", "## Attention and outcome", ""]
    parts += [
        "Rank correlations within data sets, exploratory (95 % intervals, not corrected); no controls.",
        "",
    ]
    parts += _table(
        ["mechanism", "quantity", "outcome", "correlation", "interval", "runs"],
        (
            [
                row["method"], f"`{row['quantity']}`", row["outcome"], f"{row['correlation']:+.2f}",
                f"{row['low']:+.2f} to {row['high']:+.2f}", str(row["runs"]),
            ]
            for row in attention_relations(judged, scope)
        ),
    )  # fmt: skip
    return "\n".join(parts) + "\n"


def _interval(comparison: Comparison) -> str:
    if np.isnan(comparison.low):
        return "– (one seed)" if comparison.pairs < 2 else "– (no finite number)"
    return f"{comparison.low:+.4f} to {comparison.high:+.4f}"


def _cell_interval(interval: CellInterval) -> str:
    return f"{interval.low:+.4f} to {interval.high:+.4f} ({interval.count} {interval.unit})"


def _control(dataset: str, scope: Scope) -> str:
    return " (control)" if dataset in scope.controls else ""


def _metric_rows(judged: Sequence[Judged], scope: Scope) -> Iterable[list[str]]:
    for dataset in scope.controls_last(each.dataset for each in judged):
        of_dataset = [each for each in judged if each.dataset == dataset]
        softmax, sigmoid = (
            {each.seed for each in of_dataset if each.method == method} for method in ("softmax", "sigmoid")
        )
        # The same seeds as in the tables above: other means of the same runs would contradict them.
        counted = (softmax & sigmoid) | {None}  # the baseline's
        for method in METHODS:
            found = [e.values for e in of_dataset if e.method == method and e.seed in counted]
            if not found:
                continue
            cells = []
            for metric in METRICS:
                values = np.array([each[metric] for each in found])
                spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.3f}{spread}")
            # What is said of final runs is not said of those without training.
            remark = scope.remark(dataset) if method in ("softmax", "sigmoid") else _control(dataset, scope)
            yield [dataset + remark, method, *cells]


def _training_rows(runs: Sequence[RawRun], scope: Scope) -> Iterable[list[str]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        if run.config["purpose"] == "final":
            groups.setdefault((run.config["dataset"], run.config["mechanism"]), []).append(run.facts)
    controls_last = sorted(groups, key=lambda group: group[0] in scope.controls)
    for dataset, mechanism in controls_last:
        facts = groups[dataset, mechanism]
        medians = {name: float(np.median([each[name] for each in facts])) for name in _MEDIANS}
        patient = sum(each["is_stopped_by_patience"] for each in facts)
        diverged = sum(each["is_diverged"] for each in facts)
        yield [
            dataset + scope.remark(dataset), mechanism, str(len(facts)),
            f"{medians['steps']:g}", f"{medians['best_step']:g}",
            str(patient), str(len(facts) - patient - diverged), str(diverged), f"{medians['padding']:.0%}",
            f"{medians['tokens_per_second']:,.0f}",
            *(f"{medians[name]:.3f}" for name in ("reference", "without_attention", "validation_loss")),
        ]  # fmt: skip


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]

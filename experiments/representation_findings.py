"""What judged runs say: paired comparisons, verdicts on the claims, attention and outcome."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from experiments.embedding_metrics import METRICS
from experiments.paired_comparison import LEVEL, Comparison, claim_sentence, compare
from experiments.representation_results import ATTENTION, Judged
from experiments.representation_scope import Scope

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


def interval_level(scope: Scope) -> str:
    """Of the intervals over seeds, in words: those of a family hold together, a control's by itself."""
    of_family = f"{100 * (1 - LEVEL / len(scope.planned)):.4g} %"
    return f"{of_family} (a control's at {100 * (1 - LEVEL):g} %)" if scope.controls else of_family


def compare_all(judged: Sequence[Judged], scope: Scope) -> dict[str, list[Comparison]]:
    """Paired comparisons of every metric.

    Args:
        judged: Of all runs.
        scope: Its family is what is corrected for; comparisons of controls come last, in no family.

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
                (apart if dataset in scope.controls else family)[dataset] = (softmax, sigmoid)
        found[metric] = compare(family, family=len(scope.planned)) + compare(apart)
    return found


def verdicts(comparisons: dict[str, list[Comparison]], scope: Scope) -> dict[str, str]:
    """One sentence for each claim, and for the other definitions of separation and loss.

    Args:
        comparisons: Of `compare_all`.
        scope: Controls, and data sets where attention learned nothing, are left out.

    Returns:
        Metric → sentence, those on primary metrics with the scope's remarks.
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
        family = counted(comparisons[metric], scope)
        said = f"{claim['subject']}: no data set counts."
        if family:
            said = claim_sentence(comparisons=family, **claim)
        sentences[metric] = said + scope.remarks() if metric in PRIMARY else said
    return sentences


def counted(comparisons: Sequence[Comparison], scope: Scope) -> list[Comparison]:
    """Those that decide: neither controls nor data sets where attention learned nothing."""
    left_out = scope.controls | set(scope.unlearned)
    return [each for each in comparisons if each.dataset not in left_out]


def attention_relations(judged: Sequence[Judged], scope: Scope) -> list[dict[str, Any]]:
    """Whether attention statistics go with the outcome: rank correlations within data sets.

    Ranks are taken over the seeds of one data set and mechanism, then pooled: differences between data sets
    tell nothing. Exploratory: not corrected for their number.

    Args:
        judged: Of all runs.
        scope: Its controls are left out.

    Returns:
        One entry per mechanism, quantity and outcome.
    """
    rows = []
    datasets = dict.fromkeys(each.dataset for each in judged if each.dataset not in scope.controls)
    for method in ("softmax", "sigmoid"):
        for quantity in ATTENTION:
            for outcome in ("silhouette", "held_out_loss"):
                left, right = [], []
                for dataset in datasets:
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


def _centred_ranks(values: Sequence[float]) -> np.ndarray:
    ranks = stats.rankdata(values)
    centred: np.ndarray = (ranks - ranks.mean()) / len(ranks)
    return centred


def _fisher_interval(correlation: float, freedom: int) -> tuple[float, float]:
    if freedom < 3 or not abs(correlation) < 1:
        return float("nan"), float("nan")
    half = 1.96 / (freedom - 2) ** 0.5
    return float(np.tanh(np.arctanh(correlation) - half)), float(np.tanh(np.arctanh(correlation) + half))

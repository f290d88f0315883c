"""How far the paired differences depend on which cells are held out: a bootstrap over them, at report time.

The seeds of a data set replicate training alone; split, held-out cells and chosen rate are the same for all.
This second interval draws the held-out cells anew, or their donors where at least ten are held out, each with
the mean of its difference over the seeds. Cells keep their score and not their neighbours: a copy of a cell
beside it would be its nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.embedding_metrics import cosines
from experiments.representation_results import RawRun

DRAWS, LEVEL = 2000, 0.05
# Of fewer groups a bootstrap tells little: of four, one draw in 64 is four times the same.
LEAST_GROUPS = 10


@dataclass(frozen=True)
class CellInterval:
    """Sigmoid less softmax on one data set, over draws of its held-out cells.

    Attributes:
        low: Lower end of the 95 % interval.
        high: Upper end.
        unit: What was drawn, "cells" or "groups".
        count: How many there are.
    """

    low: float
    high: float
    unit: str
    count: int


def cell_intervals(runs: Sequence[RawRun]) -> dict[str, dict[str, CellInterval]]:
    """The intervals of the primary metrics.

    Args:
        runs: All; seeds that both mechanisms have count.

    Returns:
        Metric → data set → interval.
    """
    finals = {
        (run.config["dataset"], run.config["mechanism"], run.config["seed"]): run
        for run in runs
        if run.config["purpose"] == "final"
    }
    differences: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    shares: dict[tuple[str, str], NDArray[np.float64]] = {}
    units: dict[str, tuple[str, NDArray[np.int64]]] = {}
    for (dataset, mechanism, seed), softmax in finals.items():
        sigmoid = finals.get((dataset, "sigmoid", seed))
        if mechanism != "softmax" or sigmoid is None:
            continue
        units[dataset] = _units(softmax)
        ours, theirs = cell_scores(sigmoid), cell_scores(softmax)
        for metric, (scores, share) in theirs.items():
            differences.setdefault((metric, dataset), []).append(ours[metric][0] - scores)
            shares[metric, dataset] = share
    found: dict[str, dict[str, CellInterval]] = {}
    for (metric, dataset), by_seed in differences.items():
        unit, unit_of = units[dataset]
        low, high = _bootstrap(np.mean(by_seed, axis=0), shares[metric, dataset], unit_of)
        count = int(unit_of.max()) + 1
        found.setdefault(metric, {})[dataset] = CellInterval(low, high, unit, count)
    return found


def cell_scores(run: RawRun) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """What each held-out cell adds to the primary metrics.

    Args:
        run: A final one.

    Returns:
        Metric → [cells] scores and [cells] shares; the metric is Σ share · score / Σ share. Cells that are
        alone in their type have no share but in the loss.
    """
    from sklearn.metrics import silhouette_samples

    types = run.arrays["labels"]
    _, type_of, counts = np.unique(types, return_inverse=True, return_counts=True)
    is_kept = counts[type_of] > 1
    embeddings, kept = run.arrays["embeddings"][is_kept].astype(np.float64), types[is_kept]
    silhouettes, cohesion = np.zeros(len(types)), np.zeros(len(types))
    silhouettes[is_kept] = silhouette_samples(embeddings, kept)
    similar = cosines(embeddings, run.arrays["embeddings_centre"])
    np.fill_diagonal(similar, 0.0)
    is_same = kept[:, None] == kept
    cohesion[is_kept] = (similar * is_same).sum(axis=1) / (is_same.sum(axis=1) - 1)
    hidden = run.arrays["hidden"].astype(np.float64)
    return {
        "silhouette": (silhouettes, is_kept.astype(np.float64)),
        "cohesion": (cohesion, is_kept / counts[type_of]),
        "held_out_loss": (run.arrays["losses"] / hidden, hidden),
    }


def _units(run: RawRun) -> tuple[str, NDArray[np.int64]]:
    """What is drawn, and [cells] in which of them a cell is."""
    groups = run.arrays.get("groups")
    if groups is not None and len(np.unique(groups)) >= LEAST_GROUPS:
        return "groups", np.unique(groups, return_inverse=True)[1]
    return "cells", np.arange(len(run.arrays["labels"]))


def _bootstrap(
    differences: NDArray[np.float64], shares: NDArray[np.float64], unit_of: NDArray[np.int64]
) -> tuple[float, float]:
    sums, sizes = np.bincount(unit_of, weights=shares * differences), np.bincount(unit_of, weights=shares)
    counts = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=DRAWS)
    means = (counts @ sums) / (counts @ sizes)
    low, high = np.quantile(means, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)

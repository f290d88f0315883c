"""How far the paired differences depend on which cells are held out: a bootstrap over them, at report time.

The seeds of a data set replicate training alone; split, held-out cells and chosen rate are the same for all.
This second interval draws the held-out cells anew, or their donors where at least ten are held out, the same
ones for both mechanisms and all seeds, and takes the mean difference over the seeds of each draw. A cell is
held against the cells of the draw: those that are drawn move the scores of all others, too, and scores that
stayed as they were would make intervals half as wide. A cell is never held against copies of itself.
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
    found: dict[str, dict[str, CellInterval]] = {}
    for dataset in dict.fromkeys(dataset for dataset, *_ in finals):
        pairs = [
            (softmax, finals[dataset, "sigmoid", seed])
            for (name, mechanism, seed), softmax in finals.items()
            if (name, mechanism) == (dataset, "softmax") and (dataset, "sigmoid", seed) in finals
        ]
        if not pairs:
            continue
        unit, unit_of = _units(pairs[0][0])
        times = drawn(unit_of)
        by_seed: dict[str, list[NDArray[np.float64]]] = {}
        for softmax, sigmoid in pairs:
            theirs, ours = drawn_metrics(softmax, times), drawn_metrics(sigmoid, times)
            for metric, values in theirs.items():
                by_seed.setdefault(metric, []).append(ours[metric] - values)
        for metric, differences in by_seed.items():
            # A draw of fewer than two types has no silhouette.
            low, high = np.nanquantile(np.mean(differences, axis=0), [LEVEL / 2, 1 - LEVEL / 2])
            interval = CellInterval(float(low), float(high), unit, int(unit_of.max()) + 1)
            found.setdefault(metric, {})[dataset] = interval
    return found


def drawn(unit_of: NDArray[np.int64]) -> NDArray[np.float64]:
    """How often each cell is in each draw.

    Args:
        unit_of: [cells] which unit a cell is of; units are drawn, as many as there are.

    Returns:
        [cells, draws].
    """
    count = int(unit_of.max()) + 1
    times = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    return times.T[unit_of].astype(np.float64)


def drawn_metrics(run: RawRun, times: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The primary metrics of each draw.

    Args:
        run: A final one.
        times: [cells, draws] how often each held-out cell is in a draw.

    Returns:
        Metric → [draws]. Types of which a draw has fewer than two cells are left out but in the loss; no
        silhouette (NaN) where no two types are left.
    """
    from sklearn.metrics import pairwise_distances

    embeddings = run.arrays["embeddings"].astype(np.float64)
    names, type_of = np.unique(run.arrays["labels"], return_inverse=True)
    cells_of = [np.flatnonzero(type_of == t) for t in range(len(names))]
    similar = cosines(embeddings, run.arrays["embeddings_centre"])
    np.fill_diagonal(similar, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):  # where a type is not in a draw
        losses = (run.arrays["losses"].astype(np.float64) @ times) / (run.arrays["hidden"] @ times)
        return {
            "silhouette": _silhouettes(pairwise_distances(embeddings), cells_of, times),
            "cohesion": _cohesion(similar, cells_of, times),
            "held_out_loss": losses,
        }


def _silhouettes(
    distances: NDArray[np.float64], cells_of: list[NDArray[np.int64]], times: NDArray[np.float64]
) -> NDArray[np.float64]:
    own, nearest = np.zeros_like(times), np.full_like(times, np.inf)
    shares = np.zeros_like(times)
    for cells in cells_of:
        is_kept = _is_kept(times[cells])
        sums, sizes = distances[:, cells] @ times[cells], times[cells].sum(axis=0)
        own[cells] = sums[cells] / (sizes - times[cells])  # the cell itself is at distance 0
        others = np.delete(np.arange(len(times)), cells)
        nearest[others] = np.minimum(nearest[others], np.where(is_kept, sums[others] / sizes, np.inf))
        shares[cells] = times[cells] * is_kept
    largest = np.maximum(own, nearest)
    scores = np.where(largest > 0, (nearest - own) / np.where(largest > 0, largest, 1.0), 0.0)
    means: NDArray[np.float64] = np.where(shares > 0, shares * scores, 0.0).sum(axis=0) / shares.sum(axis=0)
    return means


def _cohesion(
    similar: NDArray[np.float64], cells_of: list[NDArray[np.int64]], times: NDArray[np.float64]
) -> NDArray[np.float64]:
    total, num_types = np.zeros(times.shape[1]), np.zeros(times.shape[1])
    for cells in cells_of:
        ours = times[cells]
        is_kept, sizes = _is_kept(ours), ours.sum(axis=0)
        sums = (ours * (similar[np.ix_(cells, cells)] @ ours)).sum(axis=0)
        total += np.where(is_kept, sums / (ours * (sizes - ours)).sum(axis=0), 0.0)
        num_types += is_kept
    means: NDArray[np.float64] = total / num_types
    return means


def _is_kept(times: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[draws] whether two cells of a type are there: copies of one are one."""
    kept: NDArray[np.bool_] = (times > 0).sum(axis=0) > 1
    return kept


def _units(run: RawRun) -> tuple[str, NDArray[np.int64]]:
    """What is drawn, and [cells] in which of them a cell is."""
    groups = run.arrays.get("groups")
    if groups is not None and len(np.unique(groups)) >= LEAST_GROUPS:
        return "groups", np.unique(groups, return_inverse=True)[1]
    return "cells", np.arange(len(run.arrays["labels"]))

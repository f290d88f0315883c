"""How well embeddings of cells keep types apart, and each type together.

All take [cells, dimensions] embeddings and [cells] types, use Euclidean distances unless said, and leave
types of a single cell out: nothing is within them.

Source:
    Luecken et al., Nature Methods 19:41 (2022), scIB, for the rescaled silhouette, graph connectivity and
    cLISI; Korsunsky et al., Nature Methods 16:1289 (2019) for LISI.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

NEIGHBOURS = 15
LISI_NEIGHBOURS = 90
# LISI's kernel is as wide as a third of the neighbours counts (Korsunsky et al.).
_PERPLEXITY_SHARE = 1 / 3

METRICS = {
    "silhouette": "mean silhouette, in [−1, 1]",
    "silhouette_scib": "(silhouette + 1) / 2",
    "distance_ratio": "mean distance to cells of other types over that to those of one's own, types alike",
    "purity": f"mean share of a cell's {NEIGHBOURS} nearest neighbours that are of its type",
    "cohesion": "cosine similarity to cells of one's type about the training cells' mean, types alike",
    "cohesion_gap": "cohesion less the same to cells of other types",
    "connectivity": "share of a type's cells that its neighbour graph connects, mean over types",
    "clisi": f"1 where {LISI_NEIGHBOURS} weighted neighbours are of one type, 0 where of all alike; median",
    "nmi": "normalised mutual information of types and k-means clusters",
    "ari": "adjusted Rand index of types and k-means clusters",
}


def embedding_metrics(
    embeddings: NDArray[Any], types: NDArray[np.str_], centre: NDArray[Any]
) -> dict[str, float]:
    """All metrics of `METRICS`; higher is better in each.

    Args:
        embeddings: [cells, dimensions], finite.
        types: [cells].
        centre: [dimensions], about which cosines are taken: the mean of the training cells. About the origin
            embeddings with a large common part are all alike, whatever their types.

    Returns:
        Metric → value.

    Raises:
        ValueError: Shapes do not fit, values are not finite, or there are fewer than two types of two cells.

    Example:
        >>> points = np.array([[0.0, 1.0], [0.0, 1.1], [5.0, 0.0], [5.1, 0.0]])
        >>> values = embedding_metrics(points, np.array(["a", "a", "b", "b"]), centre=points.mean(axis=0))
        >>> round(values["silhouette"], 2), values["ari"]
        (0.98, 1.0)
    """
    from sklearn.metrics import silhouette_score

    embeddings = np.asarray(embeddings, dtype=np.float64)
    if embeddings.ndim != 2 or embeddings.shape[0] != len(types):
        raise ValueError(
            f"Expected [cells, dimensions] and [cells]; got {embeddings.shape} and {types.shape}."
        )
    if np.shape(centre) != embeddings.shape[1:]:
        raise ValueError(f"Expected a centre of {embeddings.shape[1:]}; got {np.shape(centre)}.")
    if not np.isfinite(embeddings).all():
        raise ValueError("Expected finite embeddings; found NaN or infinity.")
    names, counts = np.unique(types, return_counts=True)
    is_kept = np.isin(types, names[counts > 1])
    embeddings, types = embeddings[is_kept], types[is_kept]
    if len(np.unique(types)) < 2:
        raise ValueError("Expected at least two types of two cells; nothing can be told apart.")
    silhouette = float(silhouette_score(embeddings, types))
    within, between = (values.mean() for values in _by_type(cosines(embeddings, centre), types))
    nmi, ari = cluster_agreement(embeddings, types)
    return {
        "silhouette": silhouette,
        "silhouette_scib": (silhouette + 1) / 2,
        "distance_ratio": distance_ratio(embeddings, types),
        "purity": purity(embeddings, types),
        "cohesion": float(within),
        "cohesion_gap": float(within - between),
        "connectivity": connectivity(embeddings, types),
        "clisi": clisi(embeddings, types),
        "nmi": nmi,
        "ari": ari,
    }


def distance_ratio(embeddings: NDArray[np.float64], types: NDArray[np.str_]) -> float:
    """Mean distance of a type's cells to those of others, over that to each other; both means over types."""
    from sklearn.metrics import pairwise_distances

    within, between = _by_type(pairwise_distances(embeddings), types)
    return float(between.mean() / within.mean())


def purity(embeddings: NDArray[np.float64], types: NDArray[np.str_]) -> float:
    """Mean share of a cell's nearest neighbours, itself left out, that are of its type."""
    _, neighbours = _nearest(embeddings, NEIGHBOURS)
    return float((types[neighbours] == types[:, None]).mean())


def connectivity(embeddings: NDArray[np.float64], types: NDArray[np.str_]) -> float:
    """Largest connected part of each type in the graph of nearest neighbours, as a share; mean over types.

    Connected both ways, as in scib-metrics: edges lead from a cell to its neighbours. Without direction, as
    in scIB, almost every type is connected and the metric says little.
    """
    _, neighbours = _nearest(embeddings, NEIGHBOURS)
    count = neighbours.shape[1]
    rows = np.repeat(np.arange(len(types)), count)
    graph = sparse.csr_matrix((np.ones(rows.size), (rows, neighbours.ravel())), shape=(len(types),) * 2)
    shares = []
    for name in np.unique(types):
        cells = np.flatnonzero(types == name)
        _, part = connected_components(graph[cells][:, cells], connection="strong")
        shares.append(np.bincount(part).max() / len(cells))
    return float(np.mean(shares))


def clisi(embeddings: NDArray[np.float64], types: NDArray[np.str_]) -> float:
    """Cell-type LISI, rescaled: (T − median LISI) / (T − 1) for T types.

    LISI is 1 / Σ_t p_t², the effective number of types around a cell; p_t are sums of Gaussian weights over
    its nearest neighbours, with a width by which each cell counts a third of them.
    """
    names, codes = np.unique(types, return_inverse=True)
    distances, neighbours = _nearest(embeddings, LISI_NEIGHBOURS)
    weights = _neighbour_weights(distances, max(1.0, _PERPLEXITY_SHARE * distances.shape[1]))
    shares = np.stack([(weights * (codes[neighbours] == t)).sum(axis=1) for t in range(len(names))])
    lisi = float(np.median(1 / (shares**2).sum(axis=0)))
    return (len(names) - lisi) / (len(names) - 1)


def cluster_agreement(embeddings: NDArray[np.float64], types: NDArray[np.str_]) -> tuple[float, float]:
    """NMI and ARI of types and as many k-means clusters (the best of 10 starts, seed 0)."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    count = len(np.unique(types))
    clusters = KMeans(count, n_init=10, random_state=0).fit_predict(embeddings)
    return float(normalized_mutual_info_score(types, clusters)), float(adjusted_rand_score(types, clusters))


def cosines(embeddings: NDArray[np.float64], centre: NDArray[Any]) -> NDArray[np.float64]:
    """[cells, cells] cosine similarities about a centre; 0 for a cell that lies on it."""
    embeddings = embeddings - centre
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    directions = embeddings / np.where(norms > 0, norms, 1.0)
    return directions @ directions.T


def _by_type(
    matrix: NDArray[np.float64], types: NDArray[np.str_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[types] means over the pairs within each type, and over its cells with those of all others."""
    within, between = [], []
    for name in np.unique(types):
        is_own = types == name
        rows = matrix[is_own]
        own = rows[:, is_own]
        within.append((own.sum() - own.trace()) / (len(own) * (len(own) - 1)))
        between.append(rows[:, ~is_own].mean())
    return np.array(within), np.array(between)


def _nearest(embeddings: NDArray[np.float64], count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """[cells, k] distances and indices of the nearest others; k is at most all others."""
    from sklearn.neighbors import NearestNeighbors

    count = min(count, len(embeddings) - 1)
    distances, neighbours = NearestNeighbors(n_neighbors=count).fit(embeddings).kneighbors()
    return distances, neighbours


def _neighbour_weights(distances: NDArray[np.float64], perplexity: float) -> NDArray[np.float64]:
    """[cells, k] weights e^{−β d²}, summing to 1, with β so that their entropy is ln perplexity."""
    squares = distances**2 - distances[:, :1] ** 2  # the nearest weighs 1 before the sum: no underflow of all
    scale = np.maximum(squares.mean(axis=1, keepdims=True), np.finfo(float).tiny)
    low, high = np.full((len(squares), 1), -30.0), np.full((len(squares), 1), 30.0)
    weights = np.ones_like(squares)
    for _ in range(60):
        middle = (low + high) / 2
        weights = np.exp(-np.exp(middle) * squares / scale)
        weights /= weights.sum(axis=1, keepdims=True)
        entropy = -(weights * np.log(np.where(weights > 0, weights, 1.0))).sum(axis=1, keepdims=True)
        is_too_wide = entropy > np.log(perplexity)
        low, high = np.where(is_too_wide, middle, low), np.where(is_too_wide, high, middle)
    return weights

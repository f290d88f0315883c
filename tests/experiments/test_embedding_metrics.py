from __future__ import annotations

import numpy as np
import pytest

from experiments.embedding_metrics import (
    METRICS,
    clisi,
    cluster_agreement,
    connectivity,
    distance_ratio,
    embedding_metrics,
    purity,
)


def two_clouds(distance: float, size: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(2 * size, 5))
    points[size:, 0] += distance
    return points, np.repeat(["a", "b"], size)


# Two types on a line: a at 0 and 1, b at 10 and 12.
LINE = np.array([[0.0], [1.0], [10.0], [12.0]])
LINE_TYPES = np.array(["a", "a", "b", "b"])


def test_silhouette_by_hand():
    # Each point's distance to its type's other cell, and mean distance to the other type's cells.
    own, other = np.array([1, 1, 2, 2]), np.array([11, 10, 9.5, 11.5])
    expected = np.mean((other - own) / other)
    values = embedding_metrics(LINE, LINE_TYPES, np.zeros(1))
    assert values["silhouette"] == pytest.approx(expected)
    assert values["silhouette_scib"] == pytest.approx((expected + 1) / 2)


def test_distance_ratio_by_hand():
    assert distance_ratio(LINE, LINE_TYPES) == pytest.approx(np.mean([10, 12, 9, 11]) / np.mean([1, 2]))


def test_cosines_by_hand():
    points = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    values = embedding_metrics(points + 7, LINE_TYPES, centre=np.full(2, 7.0))
    diagonal = np.sqrt(0.5)
    assert values["cohesion"] == pytest.approx((1 + diagonal) / 2)
    assert values["cohesion_gap"] == pytest.approx((1 + diagonal) / 2 - (0 + diagonal) / 2)


def test_a_part_that_all_cells_have_in_common_is_no_cohesion():
    points, types = two_clouds(0.0)
    moved = points + 1000.0
    assert embedding_metrics(moved, types, np.zeros(5))["cohesion"] > 0.99
    assert abs(embedding_metrics(moved, types, moved.mean(axis=0))["cohesion"]) < 0.1


def test_a_common_type_weighs_no_more_than_a_rare_one():
    # Type a in one direction, 20 times; type b in two opposite ones.
    points = np.array([[1.0, 0.0]] * 20 + [[0.0, 1.0], [0.0, -1.0]])
    values = embedding_metrics(points, np.array(["a"] * 20 + ["b"] * 2), np.zeros(2))
    assert values["cohesion"] == pytest.approx((1 - 1) / 2)
    assert values["distance_ratio"] == pytest.approx(np.sqrt(2) / np.mean([0, 2]))


def test_a_centre_of_other_dimensions():
    with pytest.raises(ValueError, match=r"centre of \(1,\); got \(2,\)"):
        embedding_metrics(LINE, LINE_TYPES, np.zeros(2))


def test_purity_counts_neighbours_without_the_cell_itself():
    points, types = two_clouds(1000.0)
    assert purity(points, types) == 1.0
    # Each of four cells has three neighbours, one of them of its type.
    assert purity(LINE, LINE_TYPES) == pytest.approx(1 / 3)


def test_connectivity_of_a_type_in_two_places():
    generator = np.random.default_rng(0)
    points = np.concatenate([generator.normal(place, 0.1, size=(40, 2)) for place in (0.0, 50.0, 100.0)])
    types = np.array(["a"] * 40 + ["b"] * 40 + ["a"] * 40)
    assert connectivity(points, types) == pytest.approx((0.5 + 1.0) / 2)


def test_clisi_of_types_apart_and_mixed():
    points, types = two_clouds(1000.0, size=120)
    assert clisi(points, types) == pytest.approx(1.0)
    mixed, types = two_clouds(0.0, size=120)
    assert clisi(mixed, types) < 0.1


def test_clisi_by_hand_where_all_neighbours_are_alike_far():
    # On the corners of a simplex all weights are equal: of 3 others, 1 is of the own type.
    effective = 1 / ((1 / 3) ** 2 + (2 / 3) ** 2)
    assert clisi(np.eye(4), LINE_TYPES) == pytest.approx(2 - effective)


def test_clusters_agree_with_types_apart():
    assert cluster_agreement(*two_clouds(1000.0)) == (pytest.approx(1.0), pytest.approx(1.0))
    assert max(cluster_agreement(*two_clouds(0.0))) < 0.2


def test_every_metric_is_better_apart_than_mixed():
    apart, mixed = (
        embedding_metrics(points, types, points.mean(axis=0))
        for points, types in (two_clouds(8.0), two_clouds(0.0))
    )
    assert set(apart) == set(METRICS)
    # Connected are types in both: its own test takes one apart.
    assert all(apart[name] > mixed[name] for name in METRICS if name != "connectivity")


def test_scale_and_place_of_points():
    points, types = two_clouds(3.0)
    values, scaled = (embedding_metrics(size * points, types, np.full(5, size)) for size in (1.0, 1e6))
    for name in METRICS:
        assert scaled[name] == pytest.approx(values[name], rel=1e-6)


def test_equal_points_have_finite_metrics():
    points, types = two_clouds(3.0)
    points[:3] = points[0]
    assert all(np.isfinite(value) for value in embedding_metrics(points, types, np.zeros(5)).values())


def test_types_of_one_cell_are_left_out():
    points, types = two_clouds(3.0)
    single = np.concatenate([points, [[9.0] * 5]]), np.append(types, "c")
    assert embedding_metrics(*single, np.zeros(5)) == embedding_metrics(points, types, np.zeros(5))


@pytest.mark.parametrize(
    ("points", "types", "message"),
    [
        (np.zeros(4), LINE_TYPES, r"got \(4,\) and \(4,\)"),
        (np.zeros((3, 2)), LINE_TYPES, r"got \(3, 2\) and \(4,\)"),
        (np.full((4, 2), np.nan), LINE_TYPES, "finite embeddings"),
        (LINE, np.array(["a"] * 4), "at least two types of two cells"),
    ],
)
def test_bad_input(points, types, message):
    with pytest.raises(ValueError, match=message):
        embedding_metrics(points, types, np.zeros(points.shape[1:]))

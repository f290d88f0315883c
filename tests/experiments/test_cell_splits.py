from __future__ import annotations

import numpy as np
import pytest

from experiments.cell_splits import split_cells


def sides(split):
    return split.is_train.astype(int) + split.is_validation + split.is_test


@pytest.mark.parametrize("num_groups", [2, 5, 40])
def test_no_group_is_on_both_sides(num_groups):
    generator = np.random.default_rng(0)
    groups = generator.integers(num_groups, size=600).astype(str)
    labels = generator.choice(["a", "b", "c"], size=600)
    split = split_cells(labels, groups)
    assert (sides(split) == 1).all()
    assert not set(groups[split.is_test]) & set(groups[~split.is_test])
    assert split.rule == f"{len(set(groups[split.is_test]))} of {num_groups} groups held out"
    if num_groups > 2:
        assert 0.2 < split.is_test.mean() < 0.4


def test_groups_are_chosen_so_that_types_are_on_both_sides():
    # Types a and b are in donors 1 and 2; c only in 3 and 4.
    groups = np.repeat(["1", "2", "3", "4"], 30)
    labels = np.concatenate([np.tile(["a", "b"], 30), np.repeat("c", 60)])
    split = split_cells(labels, groups, test_share=0.4)
    assert set(labels[split.is_test]) == set(labels[split.is_train]) == {"a", "b", "c"}


@pytest.mark.parametrize("groups", [None, np.repeat("one donor", 100)])
def test_without_groups_a_share_of_each_type_is_held_out(groups):
    labels = np.repeat(["common", "rare"], [90, 10])
    split = split_cells(labels, groups, test_share=0.3, validation_share=0.1)
    assert (labels[split.is_test] == "common").sum() == 27
    assert (labels[split.is_test] == "rare").sum() == 3
    assert (labels[split.is_validation] == "common").sum() == 9
    assert (labels[split.is_validation] == "rare").sum() == 1
    assert split.rule == "a random share of each type held out"


def test_seeds():
    labels = np.repeat(["a", "b"], 50)
    first, again, other = (split_cells(labels, None, seed=seed).is_test for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_type_of_one_cell_trains():
    labels = np.append(np.repeat("a", 20), "single")
    assert split_cells(labels, None).is_train[-1]


@pytest.mark.parametrize(
    ("labels", "shares", "message"),
    [
        (np.repeat("a", 20), {"test_share": 0.0}, "positive shares"),
        (np.repeat("a", 20), {"test_share": 0.9, "validation_share": 0.1}, "positive shares"),
        (np.array(["a", "b"]), {}, "too few"),
    ],
)
def test_bad_input(labels, shares, message):
    with pytest.raises(ValueError, match=message):
        split_cells(labels, None, **shares)

"""Which cells are held out: whole groups (donors, batches, plates), or a share of each type.

Cells of one donor or batch resemble each other beyond their type, so a group on both sides of the split would
let a model be tried on what it has seen. Among the possible choices of groups the one is taken that holds out
about the same share of every type.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

# Of up to so many groups every choice is tried; of more, as many random ones.
_MOST_GROUPS = 12


@dataclass(frozen=True)
class CellSplit:
    """Three sides of a split.

    Attributes:
        is_test: [cells] bool, held out: embedded and judged, never trained on nor selected by.
        is_validation: [cells] bool, of the others: for the learning rate and for when to stop.
        rule: How it was made, in words.
    """

    is_test: NDArray[np.bool_]
    is_validation: NDArray[np.bool_]
    rule: str

    @property
    def is_train(self) -> NDArray[np.bool_]:
        """[cells] bool, neither of the two."""
        return ~(self.is_test | self.is_validation)


def split_cells(
    labels: NDArray[np.str_],
    groups: NDArray[np.str_] | None,
    *,
    test_share: float = 0.3,
    validation_share: float = 0.1,
    seed: int = 0,
) -> CellSplit:
    """Hold out whole groups, or a share of each type where there are none, then validation cells.

    Validation cells are a share of each type of the training side: they choose and stop, alike for every
    model, and judge nothing.

    Args:
        labels: [cells] types.
        groups: [cells] donors, batches or the like; None, or a single one, holds out a share of each type.
        test_share: Share of all cells to hold out, in (0, 1).
        validation_share: Share of all cells for validation; the rest, which trains, must not be empty.
        seed: Equal seeds give equal splits.

    Returns:
        The split.

    Raises:
        ValueError: The shares leave nothing to train on, or a side is empty.

    Example:
        >>> labels = np.array(["a", "b"] * 10)
        >>> split = split_cells(labels, np.repeat(["p1", "p2", "p3", "p4", "p5"], 4), test_share=0.4)
        >>> int(split.is_test.sum()), int(split.is_validation.sum()), split.rule
        (8, 2, '2 of 5 groups held out')
    """
    if min(test_share, validation_share) <= 0 or test_share + validation_share >= 1:
        raise ValueError(
            f"Expected positive shares that leave cells to train on; got {test_share} and {validation_share}."
        )
    generator = np.random.default_rng(seed)
    names = np.unique(groups) if groups is not None else np.empty(0, str)
    if groups is not None and len(names) > 1:
        chosen = _chosen_groups(labels, groups, test_share, generator)
        is_test = np.isin(groups, chosen)
        rule = f"{len(chosen)} of {len(names)} groups held out"
    else:
        is_test = _share_of_each_type(labels, np.ones(len(labels), bool), test_share, generator)
        rule = "a random share of each type held out"
    is_validation = _share_of_each_type(labels, ~is_test, validation_share / (1 - test_share), generator)
    split = CellSplit(is_test, is_validation, rule)
    if not (split.is_test.any() and split.is_validation.any() and split.is_train.any()):
        raise ValueError(f"Expected cells on every side of the split; got too few ({len(labels)}).")
    return split


def _chosen_groups(
    labels: NDArray[np.str_], groups: NDArray[np.str_], share: float, generator: np.random.Generator
) -> NDArray[np.str_]:
    """The groups whose cells are nearest to `share` of every type, by the mean over types."""
    names, group_of = np.unique(groups, return_inverse=True)
    types, type_of = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(names), len(types)))
    np.add.at(counts, (group_of, type_of), 1)
    if len(names) <= _MOST_GROUPS:
        choices = np.array(list(product([False, True], repeat=len(names)))[1:-1])
    else:
        order = generator.random((2**_MOST_GROUPS, len(names))).argsort(axis=1)
        sizes = counts.sum(axis=1)
        is_first = sizes[order].cumsum(axis=1) <= share * sizes.sum()
        choices = np.zeros_like(is_first)
        np.put_along_axis(choices, order, is_first, axis=1)
        choices = choices[choices.any(axis=1)]
    held_out = choices @ counts / counts.sum(axis=0)
    # A type that is all on one side can be learned or judged, not both: as bad as no overlap at all.
    is_one_sided = (held_out == 0) | (held_out == 1)
    distance = np.where(is_one_sided, 1.0, np.abs(held_out - share)).mean(axis=1)
    return names[choices[distance.argmin()]]


def _share_of_each_type(
    labels: NDArray[np.str_], is_candidate: NDArray[np.bool_], share: float, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """[cells] bool; of a type with two cells or more, one at least and not all."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        cells = np.flatnonzero(is_candidate & (labels == label))
        count = min(max(1, round(share * len(cells))), len(cells) - 1)
        chosen[generator.permutation(cells)[: max(count, 0)]] = True
    return chosen

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.cell_pool import synthetic_pool
from experiments.length_batches import LengthAwareRankTask, length_batches

LENGTHS = np.random.default_rng(0).integers(100, 2500, size=500)


@pytest.mark.parametrize("generator", [None, np.random.default_rng(0)])
def test_every_cell_is_in_one_batch_that_fits(generator):
    batches = length_batches(LENGTHS, 8192, generator)
    assert sorted(np.concatenate(batches)) == list(range(500))
    assert all(len(batch) * LENGTHS[batch].max() <= 8192 for batch in batches)


def test_little_is_padding():
    def padding(batches):
        padded = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
        return 1 - LENGTHS.sum() / padded

    jittered = padding(length_batches(LENGTHS, 8192, np.random.default_rng(0)))
    at_random = padding(np.array_split(np.random.default_rng(0).permutation(500), 80))
    assert jittered < 0.15 < at_random


def test_a_cell_longer_than_a_batch_is_alone():
    assert [batch.tolist() for batch in length_batches(np.array([50, 3, 3]), 10)] == [[1, 2], [0]]


POOL = synthetic_pool(num_genes=60, num_train=40, num_validation=12)


def task_of(seed: int) -> LengthAwareRankTask:
    return LengthAwareRankTask(POOL, batch_size=2, tokens=32, seed=seed)


@pytest.fixture
def task():
    return task_of(3)


def test_a_pass_sees_every_cell_once_and_passes_differ(task):
    first = length_batches(task.train.lengths, 64, np.random.default_rng([3, 0, 1]))
    second = [task._chosen(len(first) + i) for i in range(3)]
    assert all(np.array_equal(task._chosen(i), batch) for i, batch in enumerate(first))
    assert not all(np.array_equal(a, b) for a, b in zip(first, second, strict=False))


def test_batches_depend_on_seed_and_step_alone(task):
    late, again, other = task.batch(30), task_of(3).batch(30), task_of(4).batch(30)
    assert torch.equal(late.tokens, again.tokens)
    assert torch.equal(late.hidden, again.hidden)
    assert late.tokens.shape != other.tokens.shape or not torch.equal(late.tokens, other.tokens)


def test_validation_cells_come_once_with_the_same_masks_for_every_seed(task):
    ours, theirs = task.validation_batches(2), task_of(9).validation_batches(2)
    assert sum(len(batch.tokens) for batch in ours) == len(POOL.validation)
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(ours, theirs, strict=True))


def test_what_is_hidden_of_a_validation_cell_does_not_depend_on_the_size_of_batches(monkeypatch):
    def hidden_by_cell(room):
        monkeypatch.setattr("experiments.length_batches.FORWARD_ROOM", room)
        looks = task_of(3).looks()
        found = {}
        for cells, batch in looks:
            rows = batch.hidden // batch.tokens.shape[1]
            found |= {cell: batch.genes[rows == row].tolist() for row, cell in enumerate(cells)}
        return len(looks), found

    (many, one_by_one), (few, together) = hidden_by_cell(1), hidden_by_cell(4)
    assert few < many
    assert one_by_one == together


def test_tokens_are_counted_with_and_without_padding(task):
    batches = [task.batch(step) for step in range(5)]
    lengths = [
        batch.lengths
        if batch.lengths is not None
        else torch.full((len(batch.tokens),), batch.tokens.shape[1])
        for batch in batches
    ]
    assert task.tokens_trained(5) == (
        sum(int(each.sum()) for each in lengths),
        sum(batch.tokens.numel() for batch in batches),
    )
    assert task.tokens_trained(0) == (0, 0)

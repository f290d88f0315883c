from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments.cell_pool import CellPool, synthetic_pool
from experiments.cell_transformer import CellTransformer, CellTransformerConfig
from experiments.expression_values import ValueTask


@pytest.fixture(scope="module")
def pool() -> CellPool:
    return synthetic_pool(num_genes=40, num_train=30, num_validation=7)


def task(pool: CellPool, **changes) -> ValueTask:
    return ValueTask(pool, **{"batch_size": 3, "tokens": 16, "seed": 0, **changes})


def test_batches_depend_on_seed_and_step_alone(pool):
    assert torch.equal(task(pool).batch(4).targets, task(pool).batch(4).targets)
    assert not torch.equal(task(pool).batch(4).targets, task(pool).batch(5).targets)
    assert not torch.equal(task(pool).batch(4).targets, task(pool, seed=1).batch(4).targets)


def test_lengths_are_given_only_where_they_say_something(pool):
    assert task(pool).batch(0).lengths is None
    assert task(pool, tokens=40).batch(0).lengths is not None


def test_the_reference_is_the_error_of_the_training_mean(pool):
    asked = task(pool)
    hidden = torch.cat([batch.targets[batch.mask] for batch in asked.validation_batches(3)])
    mean = float(pool.train.expression.data.mean())
    assert asked.reference == pytest.approx(float((hidden - mean).square().mean()), rel=1e-4)


@pytest.mark.parametrize("is_heavy_tailed", [False, True])
def test_without_attention_a_value_is_told_by_its_gene(pool, is_heavy_tailed):
    asked = task(pool, is_heavy_tailed=is_heavy_tailed)
    dense = pool.train.expression.toarray()
    scale = np.expm1(pool.train.expression.data).std()
    targets = np.expm1(dense) / scale if is_heavy_tailed else dense
    means = targets.sum(axis=0) / (dense > 0).sum(axis=0)
    errors = [
        (batch.targets[batch.mask].numpy() - means[batch.genes[batch.mask].numpy()]) ** 2
        for batch in asked.validation_batches(3)
    ]
    assert asked.without_attention == pytest.approx(float(np.concatenate(errors).mean()), rel=1e-4)
    assert asked.without_attention < asked.reference


def test_heavy_tails_are_counts_of_unit_variance_and_inputs_stay_logged(pool):
    logged, heavy = task(pool).batch(0), task(pool, is_heavy_tailed=True).batch(0)
    assert torch.equal(logged.values, heavy.values)
    ratio = heavy.targets / logged.targets.expm1()
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    scale = float((torch.from_numpy(pool.train.expression.data).expm1() * ratio[0, 0]).std())
    assert scale == pytest.approx(1, rel=1e-3)


def test_loss_of_the_right_answer_is_zero(pool):
    batch = task(pool).batch(0)
    assert task(pool).loss(lambda genes, values, mask, lengths: batch.targets, batch).item() == 0


def test_160m_has_between_154_and_162_million_parameters():
    with torch.device("meta"):
        counts = CellTransformer(CellTransformerConfig.preset("160m", num_genes=10_240)).parameter_counts()
    assert 154e6 < counts["total"] < 162e6

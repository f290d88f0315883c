from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from experiments import gene_ranks
from experiments.cell_pool import CellPool, synthetic_pool
from experiments.cell_transformer import CellTransformerConfig
from experiments.cells import Cells
from experiments.gene_ranks import RankTask, RankTransformer, gene_medians, rank_genes


def by_hand(counts: list[list[float]]) -> Cells:
    expression = sparse.csr_matrix(np.log1p(np.array(counts)), dtype=np.float32)
    return Cells(expression, np.array([f"gene {i}" for i in range(len(counts[0]))]), None, "by hand")


@pytest.fixture(scope="module")
def task() -> RankTask:
    pool = synthetic_pool(num_genes=40, num_train=30, num_validation=7)
    return RankTask(pool, batch_size=3, tokens=32, seed=0)


def test_medians_are_of_the_cells_that_express_a_gene():
    medians = gene_medians(by_hand([[1, 0, 0], [3, 8, 0], [5, 0, 0]]))
    np.testing.assert_allclose(medians, [3, 8, 1], rtol=1e-5)


def test_genes_are_ranked_by_expression_over_their_median():
    cells = by_hand([[10, 4, 0, 3], [0, 0, 7, 0]])
    ranked = rank_genes(cells, np.array([10.0, 2.0, 1.0, 1.0]), tokens=4)
    assert ranked.genes.tolist() == [[3, 1, 0], [2, 0, 0]]
    assert ranked.lengths.tolist() == [3, 1]
    assert rank_genes(cells, np.ones(4), tokens=2).genes.tolist() == [[0, 1], [2, 0]]


def test_a_batch_hides_what_it_asks_for(task):
    batch = task.batch(5)
    assert batch.tokens.shape[0] == 3
    assert (batch.tokens.flatten()[batch.hidden] == task.num_genes).all()
    assert len(batch.hidden) == (batch.tokens == task.num_genes).sum()
    restored = batch.tokens.flatten().clone()
    restored[batch.hidden] = batch.genes
    lists = {tuple(row[row > 0].tolist()) for row in task.train.genes}
    assert {tuple(row[row > 0].tolist()) for row in restored.view_as(batch.tokens)} <= lists


def test_batches_depend_on_seed_and_step_alone(task):
    twin = RankTask(
        synthetic_pool(num_genes=40, num_train=30, num_validation=7), batch_size=3, tokens=32, seed=0
    )
    twin.batch(0)
    assert torch.equal(twin.batch(7).hidden, task.batch(7).hidden)
    assert not torch.equal(task.batch(7).genes, task.batch(8).genes)


def test_lengths_are_given_only_where_they_say_something():
    cells = by_hand([[1, 2, 3, 4], [1, 2, 0, 0]] * 3)
    ragged = RankTask(CellPool(cells, cells), batch_size=6, tokens=4, seed=0)
    (batch,) = ragged.validation_batches(6)
    assert batch.lengths.tolist() == [4, 2] * 3
    full = RankTask(CellPool(cells, cells), batch_size=6, tokens=2, seed=0)
    assert full.batch(0).lengths is None


def test_validation_sees_each_cell_once_and_always_alike(task):
    batches = task.validation_batches(3)
    assert [len(batch.tokens) for batch in batches] == [3, 3, 1]
    assert all(
        torch.equal(one.hidden, two.hidden)
        for one, two in zip(batches, task.validation_batches(3), strict=True)
    )


def test_the_reference_is_the_unigram_cross_entropy():
    cells = by_hand([[5, 1, 0], [5, 0, 1]])
    task = RankTask(CellPool(cells, cells), batch_size=1, tokens=3, seed=0)
    assert task.reference == pytest.approx(-(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)))


def test_without_attention_a_gene_is_told_by_its_rank(monkeypatch):
    monkeypatch.setattr(gene_ranks, "RANKS_PER_GROUP", 2)
    monkeypatch.setattr(gene_ranks, "_PRIOR_TOKENS", 1e-6)
    # Ranks 0 and 1 hold genes 0 and 1, ranks 2 and 3 genes 2 and 3, in every order.
    cells = by_hand([[9, 8, 2, 1], [8, 9, 1, 2], [9, 8, 1, 2], [8, 9, 2, 1]])
    monkeypatch.setattr(gene_ranks, "gene_medians", lambda cells: np.ones(4))
    task = RankTask(CellPool(cells, cells), batch_size=2, tokens=4, seed=0)
    assert task.reference == pytest.approx(math.log(4))
    assert task.without_attention == pytest.approx(math.log(2), rel=1e-4)


def test_where_ranks_tell_nothing_only_frequencies_are_left(task):
    assert task.without_attention == pytest.approx(task.reference, abs=0.1)


def test_a_head_that_knows_nothing_scores_uniformly(task):
    model = task.model(CellTransformerConfig.preset("tiny", num_genes=1))
    torch.nn.init.zeros_(model.gene_embedding.weight)
    assert task.loss(model, task.batch(0)).item() == pytest.approx(math.log(40), rel=1e-5)


def test_the_order_of_genes_matters_and_padding_does_not():
    torch.manual_seed(0)
    model = RankTransformer(CellTransformerConfig.preset("tiny", num_genes=20, attention="sigmoid"))
    tokens, hidden = torch.tensor([[3, 20, 7, 5]]), torch.tensor([1])
    logits = model(tokens, hidden, None)
    assert not torch.allclose(model(tokens.flip(1), torch.tensor([2]), None), logits)
    padded = torch.cat([tokens, torch.tensor([[9, 9]])], dim=1)
    torch.testing.assert_close(model(padded, hidden, torch.tensor([4])), logits)


@pytest.mark.parametrize("position", ["pre", "post"])
def test_160m_has_between_154_and_162_million_parameters(position):
    with torch.device("meta"):
        config = CellTransformerConfig.preset("160m", num_genes=10_240, norm_position=position)
        counts = RankTransformer(config).parameter_counts()
    assert 154e6 < counts["total"] < 162e6
    assert counts["head"] == 10_240


def test_more_tokens_than_ranks():
    cells = by_hand([[1, 2]])
    with pytest.raises(ValueError, match="`tokens` must be at most 8192, the ranks embedded; got 9000"):
        RankTask(CellPool(cells, cells), batch_size=1, tokens=9000, seed=0)

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from experiments.cell_batches import masked_batches
from experiments.cells import Cells, synthetic_cells


@pytest.fixture(scope="module")
def cells() -> Cells:
    """Six cells with 12 to 30 expressed genes of 40."""
    return synthetic_cells(num_cells=6, num_genes=40, num_types=2, counts_per_cell=45)


def test_values_are_the_cells_own(cells):
    batch = next(masked_batches(cells, batch_size=6, max_tokens=40))
    rows = {tuple(row) for row in cells.expression.toarray().round(4).tolist()}
    for genes, targets, length in zip(batch.genes, batch.targets, batch.lengths, strict=True):
        row = torch.zeros(40).scatter(0, genes[:length], targets[:length])
        assert tuple(row.numpy().round(4).tolist()) in rows
        assert len(set(genes[:length].tolist())) == length


def test_without_zeros_sequences_hold_the_expressed_genes_and_are_padded(cells):
    batch = next(masked_batches(cells, batch_size=6, max_tokens=40))
    assert sorted(batch.lengths.tolist()) == sorted(np.diff(cells.expression.indptr).tolist())
    assert batch.genes.shape == (6, int(batch.lengths.max()))
    padding = torch.arange(batch.genes.shape[1]) >= batch.lengths[:, None]
    assert not batch.mask[padding].any()
    assert not batch.targets[padding].any()
    assert (batch.targets[~padding] > 0).all()


def test_with_zeros_sequences_are_full_and_expressed_genes_come_first(cells):
    batch = next(masked_batches(cells, batch_size=6, max_tokens=36, include_zeros=True))
    assert batch.lengths.tolist() == [36] * 6
    is_expressed = batch.targets > 0
    assert (is_expressed.int().diff(dim=1) <= 0).all()
    assert all(len(set(genes.tolist())) == 36 for genes in batch.genes)


def test_zeros_cannot_exceed_the_vocabulary(cells):
    batch = next(masked_batches(cells, batch_size=2, max_tokens=100, include_zeros=True))
    assert batch.genes.shape == (2, 40)


def test_long_cells_are_sampled_anew(cells):
    one = Cells(cells.expression[:1], cells.genes, None, "one cell")
    first, second = islice(masked_batches(one, batch_size=1, max_tokens=5), 2)
    assert first.lengths.item() == second.lengths.item() == 5
    assert set(first.genes[0].tolist()) != set(second.genes[0].tolist())


def test_hidden_values_are_flagged_and_not_readable(cells):
    batch = next(masked_batches(cells, batch_size=6, max_tokens=20, mask_fraction=0.5, include_zeros=True))
    assert batch.mask.sum(dim=1).tolist() == [10] * 6
    assert not batch.values[batch.mask].any()
    assert torch.equal(batch.values[~batch.mask], batch.targets[~batch.mask])


def test_at_least_one_value_is_hidden(cells):
    batch = next(masked_batches(cells, batch_size=3, max_tokens=4, mask_fraction=0.01))
    assert batch.mask.sum(dim=1).tolist() == [1] * 3


def test_every_cell_comes_once_a_pass(cells):
    batches = islice(masked_batches(cells, batch_size=2, max_tokens=40), 6)
    lengths = [length for batch in batches for length in batch.lengths.tolist()]
    expected = sorted(np.diff(cells.expression.indptr).tolist())
    assert sorted(lengths[:6]) == sorted(lengths[6:]) == expected


def test_the_seed_decides_everything(cells):
    def stream(seed):
        return list(islice(masked_batches(cells, batch_size=2, max_tokens=10, seed=seed), 5))

    for first, second in zip(stream(3), stream(3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(stream(3)[0].genes, stream(4)[0].genes)


@pytest.mark.parametrize("sizes", [(0, 8), (2, 0)])
def test_sizes_must_be_positive(cells, sizes):
    with pytest.raises(ValueError, match="`batch_size` and `max_tokens` must be at least 1"):
        next(masked_batches(cells, batch_size=sizes[0], max_tokens=sizes[1]))


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_mask_fraction_out_of_range(cells, fraction):
    with pytest.raises(ValueError, match=rf"`mask_fraction` must lie in \(0, 1\]; got {fraction}"):
        next(masked_batches(cells, batch_size=1, max_tokens=8, mask_fraction=fraction))

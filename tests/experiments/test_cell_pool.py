from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from experiments.cell_pool import real_pool, synthetic_pool
from experiments.cells import synthetic_cells
from experiments.prepare_cells import held_out, write_prepared


@pytest.fixture
def prepared(tmp_path) -> Path:
    cells = synthetic_cells(num_cells=12, num_genes=40, num_types=3, counts_per_cell=120)
    path = tmp_path / "cells.npz"
    write_prepared(path, cells, held_out(np.arange(len(cells)).astype(str), 0.3, seed=0))
    return path


def test_every_mixture_fills_a_sequence(prepared):
    pool = real_pool(prepared, tokens=30, num_train=20, num_validation=5)
    assert (len(pool.train), len(pool.validation)) == (20, 5)
    for cells in (pool.train, pool.validation):
        assert np.diff(cells.expression.indptr).min() >= 30
        np.testing.assert_allclose(cells.expression.expm1().sum(axis=1), 10_000, rtol=1e-4)


def test_a_mixture_expresses_what_either_cell_does(prepared):
    with np.load(prepared) as file:
        starts, genes, is_validation = file["starts"], file["genes_of_values"], file["is_validation"]
    expressed = [set(genes[start:end]) for start, end in pairwise(starts)]
    held_out_genes = set.union(*(expressed[i] for i in np.flatnonzero(is_validation)))
    mixtures = real_pool(prepared, tokens=10, num_train=4, num_validation=8).validation
    assert set(mixtures.expression.indices) <= held_out_genes


def test_equal_seeds_give_equal_pools(prepared):
    sizes = {"tokens": 20, "num_train": 4, "num_validation": 2}
    first, again, other = (real_pool(prepared, **sizes, seed=seed).train.expression for seed in (0, 0, 1))
    assert (first != again).nnz == 0
    assert (first != other).nnz > 0


def test_a_missing_file_says_where_it_comes_from(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"experiments\.prepare_cells --out .*none\.npz"):
        real_pool(tmp_path / "none.npz", tokens=1, num_train=1, num_validation=1)


def test_more_tokens_than_cells_express(prepared):
    with pytest.raises(ValueError, match="to express 41 genes; 0 of 40 do"):
        real_pool(prepared, tokens=41, num_train=2, num_validation=1)


def test_synthetic_cells_are_split():
    pool = synthetic_pool(num_genes=20, num_train=6, num_validation=3)
    assert (len(pool.train), len(pool.validation)) == (6, 3)
    assert (pool.train.expression[:3] != pool.validation.expression).nnz > 0

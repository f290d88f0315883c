"""The cells of the long runs: many for training, and others, of other origin, for validation.

A real file of long cells holds a hundred or two, too few for thousands of steps, and not each of them
expresses 8,192 genes. So the pool is made of mixtures: two cells of one side of the split in random
proportion, read anew by a Poisson draw. Mixtures that express fewer genes than a sequence has tokens are
drawn again: without padding the fastest kernels apply. Training mixtures know nothing of the embryos that
are held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from experiments.cells import COUNTS_PER_CELL, Cells, synthetic_cells

# Reads of a mixture, fewer than Smart-seq's millions: noise, but few expressed genes are lost.
READS_PER_CELL = 4_000_000
# One in five training mixtures falls short of 8,192 genes, one in three of the held-out ones.
_MOST_TRIES = 20


@dataclass(frozen=True)
class CellPool:
    """Cells of both sides of the split.

    Attributes:
        train: What batches are drawn from.
        validation: What the model is tried on.
    """

    train: Cells
    validation: Cells


def real_pool(
    path: str | Path, *, tokens: int, num_train: int, num_validation: int, seed: int = 0
) -> CellPool:
    """Mixtures of the cells of a prepared file.

    Args:
        path: A file of `python -m experiments.prepare_cells`.
        tokens: Genes that every mixture expresses at least.
        num_train: Mixtures of training cells.
        num_validation: Mixtures of held-out cells.
        seed: Equal seeds give equal pools.

    Returns:
        The pool.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Mixtures hardly ever express so many genes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected prepared cells at {path}; there are none. Where ../shared/cells is, write them with "
            f"`python -m experiments.prepare_cells --out {path}`, and take the file along."
        )
    with np.load(path) as file:
        shape = (len(file["starts"]) - 1, len(file["genes"]))
        expression = sparse.csr_matrix(
            (file["values"], file["genes_of_values"].astype(np.int32), file["starts"]), shape=shape
        )
        genes, is_validation, source = file["genes"], file["is_validation"], str(file["source"])
    generator = np.random.default_rng(seed)
    train, validation = (
        Cells(
            _mixtures(expression[chosen], tokens, count, generator),
            genes,
            None,
            f"{count} mixtures of {source}",
        )
        for chosen, count in ((~is_validation, num_train), (is_validation, num_validation))
    )
    return CellPool(train, validation)


def synthetic_pool(*, num_genes: int, num_train: int, num_validation: int, seed: int = 0) -> CellPool:
    """Cells of `synthetic_cells`: eight types, each with a programme of genes whose strength differs by cell.

    Args:
        num_genes: Number of genes; a cell expresses nine in ten.
        num_train: Training cells.
        num_validation: Other cells of the same types.
        seed: Equal seeds give equal pools.

    Returns:
        The pool.
    """
    cells = synthetic_cells(
        num_cells=num_train + num_validation, num_genes=num_genes, counts_per_cell=40 * num_genes, seed=seed
    )
    train, validation = (
        Cells(cells.expression[rows], cells.genes, None, cells.source)
        for rows in (slice(None, num_train), slice(num_train, None))
    )
    return CellPool(train, validation)


def _mixtures(
    expression: sparse.csr_matrix, tokens: int, count: int, generator: np.random.Generator
) -> sparse.csr_matrix:
    """[count, genes] log1p of counts per 10,000, of two cells each."""
    shares = expression.expm1().toarray().astype(np.float64)
    shares /= shares.sum(axis=1, keepdims=True)
    rows: list[sparse.csr_matrix] = []
    for _ in range(_MOST_TRIES * count):  # one by one: all of them dense would take a gigabyte
        first, second = generator.choice(len(shares), size=2, replace=False)
        part = generator.uniform(0.25, 0.75)
        reads = generator.poisson(READS_PER_CELL * (part * shares[first] + (1 - part) * shares[second]))
        if np.count_nonzero(reads) >= tokens:
            scaled = reads * (COUNTS_PER_CELL / reads.sum())
            rows.append(sparse.csr_matrix(np.log1p(scaled), dtype=np.float32))
        if len(rows) == count:
            return sparse.vstack(rows, format="csr")
    raise ValueError(
        f"Expected mixtures of two cells to express {tokens} genes; {len(rows)} of {_MOST_TRIES * count} do. "
        "Ask for fewer tokens, or prepare cells that express more."
    )

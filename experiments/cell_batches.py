"""Cells as token sequences with hidden values: the batches of masked-value regression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.cells import Cells


class MaskedBatch(NamedTuple):
    """Token sequences of one batch, padded to its longest cell.

    Attributes:
        genes: [B, n] int64, gene indices; 0 in the padding.
        values: [B, n] float32, log1p expression; 0 where hidden and in the padding.
        mask: [B, n] bool, True where the value is hidden; never in the padding.
        lengths: [B] int64, tokens of each cell; None where none is padded.
        targets: [B, n] float32, log1p expression; 0 in the padding.
    """

    genes: Tensor
    values: Tensor
    mask: Tensor
    lengths: Tensor | None
    targets: Tensor

    def to(self, device: torch.device | str) -> MaskedBatch:
        """The batch on another device."""
        lengths = None if self.lengths is None else self.lengths.to(device)
        genes, values, mask, targets = (
            tensor.to(device) for tensor in (self.genes, self.values, self.mask, self.targets)
        )
        return MaskedBatch(genes, values, mask, lengths, targets)


def masked_batches(
    cells: Cells,
    *,
    batch_size: int,
    max_tokens: int,
    mask_fraction: float = 0.25,
    include_zeros: bool = False,
    seed: int | Sequence[int] = 0,
) -> Iterator[MaskedBatch]:
    """An endless stream of batches, pass after pass over the shuffled cells.

    A cell with more than `max_tokens` expressed genes is represented by a fresh random sample of them in
    each pass. The stream depends on the arguments alone: two models given one seed see the same batches.

    Args:
        cells: Where the tokens come from.
        batch_size: Cells per batch; passes follow on each other inside a batch.
        max_tokens: Longest sequence.
        mask_fraction: Share of every cell's tokens whose value is hidden, in (0, 1]; at least one token.
        include_zeros: Fill shorter cells up with genes they do not express (value 0), after the expressed.
        seed: Of cell order, gene samples and hidden positions; one number or several.

    Yields:
        Batches on the CPU.

    Raises:
        ValueError: A size is below 1 or `mask_fraction` is out of range (at the first batch).

    Example:
        >>> from experiments.cells import synthetic_cells
        >>> cells = synthetic_cells(num_cells=4, num_genes=20, num_types=2, counts_per_cell=30)
        >>> batch = next(masked_batches(cells, batch_size=2, max_tokens=8, mask_fraction=0.5))
        >>> batch.genes.shape, batch.mask.sum(dim=1)
        (torch.Size([2, 8]), tensor([4, 4]))
    """
    if batch_size < 1 or max_tokens < 1:
        raise ValueError(
            f"`batch_size` and `max_tokens` must be at least 1; got {batch_size} and {max_tokens}."
        )
    if not 0 < mask_fraction <= 1:
        raise ValueError(f"`mask_fraction` must lie in (0, 1]; got {mask_fraction}.")
    generator = np.random.default_rng(seed)
    cell_order = _shuffled_forever(len(cells), generator)
    while True:
        sequences = [
            _tokens(cells, next(cell_order), max_tokens, include_zeros, generator) for _ in range(batch_size)
        ]
        yield _collate(sequences, mask_fraction, generator)


def _shuffled_forever(count: int, generator: np.random.Generator) -> Iterator[int]:
    while True:
        yield from generator.permutation(count).tolist()


def _tokens(
    cells: Cells, cell: int, max_tokens: int, include_zeros: bool, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Gene indices and values of one cell, expressed genes first."""
    row = cells.expression[cell]
    genes, values = row.indices.astype(np.int64), row.data
    if len(genes) > max_tokens:
        chosen = generator.choice(len(genes), size=max_tokens, replace=False)
        return genes[chosen], values[chosen]
    if include_zeros:
        silent = np.setdiff1d(np.arange(len(cells.genes)), genes)
        silent = generator.permutation(silent)[: max_tokens - len(genes)]
        genes = np.concatenate([genes, silent])
        values = np.concatenate([values, np.zeros(len(silent), dtype=np.float32)])
    return genes, values


def _collate(
    sequences: list[tuple[NDArray[np.int64], NDArray[np.float32]]],
    mask_fraction: float,
    generator: np.random.Generator,
) -> MaskedBatch:
    lengths = torch.tensor([len(genes) for genes, _ in sequences])
    shape = (len(sequences), int(lengths.max()))
    all_genes = torch.zeros(shape, dtype=torch.int64)
    targets = torch.zeros(shape)
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, (genes, values) in enumerate(sequences):
        all_genes[i, : len(genes)] = torch.from_numpy(genes)
        targets[i, : len(values)] = torch.from_numpy(values)
        num_hidden = max(1, round(mask_fraction * len(genes)))
        mask[i, torch.from_numpy(generator.choice(len(genes), size=num_hidden, replace=False))] = True
    return MaskedBatch(all_genes, targets.masked_fill(mask, 0.0), mask, lengths, targets)

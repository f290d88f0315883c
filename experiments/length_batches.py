"""Batches of cells of like length: as many cells as fill a number of tokens, with little padding.

Cells express 100 to 2,500 genes. A batch of cells at random would be padded to its longest, and a fixed
number of cells would make one batch twenty times the work of another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments.cell_pool import CellPool
from experiments.gene_ranks import RankBatch, RankTask, mask_genes

# Cells are sorted by length times a random factor in 1 ± this: other cells meet in each pass.
_JITTER = 0.1
# Tokens of a batch without a backward pass over those of one with it: small ones let a GPU wait for its host.
FORWARD_ROOM = 4


def length_batches(
    lengths: NDArray[np.int64], max_tokens: int, generator: np.random.Generator | None = None
) -> list[NDArray[np.int64]]:
    """One pass over cells: batches of like length, each as many cells as fit when padded to its longest.

    Args:
        lengths: [cells] tokens of each.
        max_tokens: Cells times the longest of a batch; a longer cell is a batch of its own.
        generator: Decides who meets whom and in which order batches come; None sorts by length.

    Returns:
        Indices of each batch's cells; every cell is in one.

    Example:
        >>> [batch.tolist() for batch in length_batches(np.array([9, 2, 3, 2]), max_tokens=8)]
        [[1, 3], [2], [0]]
    """
    factors = 1.0 if generator is None else generator.uniform(1 - _JITTER, 1 + _JITTER, len(lengths))
    batches: list[list[int]] = []
    longest = 0
    for cell in np.argsort(lengths * factors, kind="stable"):
        longest = max(longest, int(lengths[cell]))
        if not batches or (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
            longest = int(lengths[cell])
        batches[-1].append(int(cell))
    order = np.arange(len(batches)) if generator is None else generator.permutation(len(batches))
    return [np.array(batches[i]) for i in order]


class LengthAwareRankTask(RankTask):
    """Masked-gene prediction in batches of like length, pass after pass over the training cells.

    Batches are a function of seed and step, as those of `RankTask`; model, loss and reference are the same.

    Args:
        pool: The cells.
        batch_size: Cells of `tokens` tokens that a batch has room for; of shorter ones more fit.
        tokens: Longest list; of longer ones the beginning is kept.
        seed: Of the passes and of what is masked.
    """

    def __init__(self, pool: CellPool, *, batch_size: int, tokens: int, seed: int) -> None:
        super().__init__(pool, batch_size=batch_size, tokens=tokens, seed=seed)
        self.max_tokens = batch_size * tokens
        self.max_forward_tokens = FORWARD_ROOM * self.max_tokens
        self._batches: list[NDArray[np.int64]] = []
        self._passes = 0
        self._looks: list[tuple[NDArray[np.int64], RankBatch]] = []

    def batch(self, step: int) -> RankBatch:
        """The batch of a training step, on the CPU."""
        generator = np.random.default_rng([self.seed, step])
        return mask_genes(self.train, self._chosen(step), self.num_genes, generator)

    def validation_batches(self, batch_size: int) -> list[RankBatch]:
        """Every validation cell once, masked alike each time and for every seed."""
        return [batch for _, batch in self.looks()]

    def looks(self) -> list[tuple[NDArray[np.int64], RankBatch]]:
        """The validation batches, each with which cells are in it; larger than those of training."""
        if not self._looks:
            generator = np.random.default_rng(0)
            self._looks = [
                (cells, mask_genes(self.validation, cells, self.num_genes, generator))
                for cells in length_batches(self.validation.lengths, self.max_forward_tokens)
            ]
        return self._looks

    def hidden_losses(self, model: nn.Module, batch: RankBatch) -> Tensor:
        """[k] float32 cross-entropy of each masked gene."""
        logits = model(batch.tokens, batch.hidden, batch.lengths)
        return nn.functional.cross_entropy(logits.float(), batch.genes, reduction="none")

    def tokens_trained(self, steps: int) -> tuple[int, int]:
        """What the first steps see.

        Args:
            steps: How many.

        Returns:
            Tokens of cells, and tokens with the padding.
        """
        lengths = [self.train.lengths[self._chosen(step)] for step in range(steps)]
        return sum(int(each.sum()) for each in lengths), sum(len(each) * int(each.max()) for each in lengths)

    def _chosen(self, step: int) -> NDArray[np.int64]:
        while len(self._batches) <= step:
            generator = np.random.default_rng([self.seed, self._passes, 1])
            self._batches += length_batches(self.train.lengths, self.max_tokens, generator)
            self._passes += 1
        return self._batches[step]

"""Rank-encoded cells: a cell is the list of its expressed genes, the most remarkable first; some are masked.

Genes are sorted by their expression over the median that expressing training cells have of them, so that a
gene that is high everywhere does not lead every list. Some genes of the list are replaced by the mask token
and the model says which they were (masked-gene prediction, cross-entropy).

Source:
    Theodoris et al., Nature 618:616 (2023), Geneformer; Chevalier et al., arXiv 2503.03485, TEDDY-G.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments.cell_pool import CellPool
from experiments.cell_transformer import CellEncoder, CellTransformerConfig
from experiments.cells import Cells

MASK_FRACTION = 0.15
# A rank is told by its group and its place there: 192 learned rows instead of 8,192, for which 162 million
# parameters have no room (axial position embeddings, Kitaev et al., arXiv 2001.04451).
GROUPS, RANKS_PER_GROUP = 64, 128
MAX_TOKENS = GROUPS * RANKS_PER_GROUP
# Frequencies at a rank are drawn towards those over all ranks as if by so many tokens more: of 262,144 tokens
# in a group of ranks each gene has 26 on average, and most have none.
_PRIOR_TOKENS = 10_000


class RankBatch(NamedTuple):
    """Lists of genes, padded to the longest.

    Attributes:
        tokens: [B, n] int64, gene indices, the mask token (= num_genes) where hidden, 0 in the padding.
        hidden: [k] int64, where the masked tokens are in the flattened batch.
        genes: [k] int64, which genes they were.
        lengths: [B] int64, tokens of each cell; None where none is padded.
    """

    tokens: Tensor
    hidden: Tensor
    genes: Tensor
    lengths: Tensor | None


class RankTransformer(CellEncoder):
    """Predicts masked genes of rank-encoded cells; output and input embedding of genes are one.

    Args:
        config: Sizes and attention mechanism; `num_genes` does not count the mask token.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = RankTransformer(CellTransformerConfig.preset("tiny", num_genes=50))
        >>> model(torch.tensor([[3, 50, 7]]), torch.tensor([1]), None).shape
        torch.Size([1, 50])
    """

    gene_embedding: nn.Embedding
    rank_group_embedding: nn.Embedding
    rank_place_embedding: nn.Embedding

    def __init__(self, config: CellTransformerConfig) -> None:
        super().__init__(
            config,
            gene_embedding=nn.Embedding(config.num_genes + 1, config.embed_dim),
            rank_group_embedding=nn.Embedding(GROUPS, config.embed_dim),
            rank_place_embedding=nn.Embedding(RANKS_PER_GROUP, config.embed_dim),
        )
        self.head_bias = nn.Parameter(torch.zeros(config.num_genes))
        self.initialise()

    def forward(self, tokens: Tensor, hidden: Tensor, lengths: Tensor | None) -> Tensor:
        """Scores of every gene for the masked tokens alone: all tokens' would take gigabytes.

        Args:
            tokens: See `RankBatch`.
            hidden: See `RankBatch`.
            lengths: See `RankBatch`.

        Returns:
            [k, num_genes] logits.
        """
        masked = self.states(tokens, lengths).flatten(0, 1).index_select(0, hidden)
        return nn.functional.linear(masked, self.gene_embedding.weight[:-1], self.head_bias)

    def states(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """What the last block knows of every token.

        Args:
            tokens: See `RankBatch`.
            lengths: See `RankBatch`.

        Returns:
            [B, n, embed_dim], normalised; that of padding means nothing.
        """
        rank = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.gene_embedding(tokens)
        x = x + self.rank_group_embedding(rank // RANKS_PER_GROUP)
        x = x + self.rank_place_embedding(rank % RANKS_PER_GROUP)
        return self.encode(x, lengths)


@dataclass(frozen=True)
class RankedCells:
    """Cells as lists of genes.

    Attributes:
        genes: [cells, tokens] int32; 0 behind a cell's end.
        lengths: [cells] int64.
    """

    genes: NDArray[np.int32]
    lengths: NDArray[np.int64]


class RankTask:
    """Masked-gene prediction: model, batches, loss, and the losses of knowing nothing of the cell.

    Args:
        pool: The cells.
        batch_size: Cells per step.
        tokens: Longest list; of longer ones the beginning is kept.
        seed: Of the order of cells and of what is masked; the step is added to it, so that batches depend on
            nothing that came before.

    Raises:
        ValueError: `tokens` exceeds the ranks there are embeddings for.
    """

    metric = "cross-entropy, nats"

    def __init__(self, pool: CellPool, *, batch_size: int, tokens: int, seed: int) -> None:
        if tokens > MAX_TOKENS:
            raise ValueError(f"`tokens` must be at most {MAX_TOKENS}, the ranks embedded; got {tokens}.")
        self.num_genes = len(pool.train.genes)
        self.batch_size = batch_size
        self.seed = seed
        medians = gene_medians(pool.train)
        self.train = rank_genes(pool.train, medians, tokens)
        self.validation = rank_genes(pool.validation, medians, tokens)

    @property
    def reference(self) -> float:
        """Unigram cross-entropy of the training cells: −Σ p ln p, p each gene's share of all their tokens."""
        counts = self._counts_by_rank().sum(axis=0)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    @property
    def without_attention(self) -> float:
        """Cross-entropy on the validation batches of guessing by the training cells' frequencies at the rank.

        All that a hidden token knows as long as no attention tells it of the others.
        """
        counts = self._counts_by_rank()
        unigram = counts.sum(axis=0) + 1.0
        shares = counts + _PRIOR_TOKENS * unigram / unigram.sum()
        shares /= shares.sum(axis=1, keepdims=True)
        losses = []
        for batch in self.validation_batches(self.batch_size):
            ranks = batch.hidden.numpy() % batch.tokens.shape[1]
            losses.append(-np.log(shares[ranks // RANKS_PER_GROUP, batch.genes.numpy()]))
        return float(np.concatenate(losses).mean())

    def model(self, config: CellTransformerConfig) -> RankTransformer:
        """The model of this task."""
        return RankTransformer(replace(config, num_genes=self.num_genes))

    def batch(self, step: int) -> RankBatch:
        """The batch of a training step, on the CPU."""
        generator = np.random.default_rng([self.seed, step])
        chosen = generator.integers(len(self.train.genes), size=self.batch_size)
        return mask_genes(self.train, chosen, self.num_genes, generator)

    def validation_batches(self, batch_size: int) -> list[RankBatch]:
        """Every validation cell once, masked alike each time and for every seed."""
        generator = np.random.default_rng(0)
        count = len(self.validation.genes)
        return [
            mask_genes(
                self.validation,
                np.arange(start, min(start + batch_size, count)),
                self.num_genes,
                generator,
            )
            for start in range(0, count, batch_size)
        ]

    def loss(self, model: nn.Module, batch: RankBatch) -> Tensor:
        """Mean cross-entropy of the masked genes, 0-d float32."""
        logits = model(batch.tokens, batch.hidden, batch.lengths)
        return nn.functional.cross_entropy(logits.float(), batch.genes)

    def _counts_by_rank(self) -> NDArray[np.int64]:
        """[rank groups, genes]: how often each gene is in each group of ranks of the training cells."""
        ranks = np.arange(self.train.genes.shape[1])
        is_token = ranks < self.train.lengths[:, None]
        cells = (ranks // RANKS_PER_GROUP * self.num_genes + self.train.genes)[is_token]
        num_groups = -(-len(ranks) // RANKS_PER_GROUP)
        return np.bincount(cells, minlength=num_groups * self.num_genes).reshape(num_groups, self.num_genes)


def gene_medians(cells: Cells) -> NDArray[np.float64]:
    """Median expression of each gene over the cells that express it, in counts per 10,000.

    Args:
        cells: The training cells.

    Returns:
        [genes]; 1 for genes that no cell expresses.
    """
    by_gene = cells.expression.expm1().tocsc()
    starts = by_gene.indptr
    return np.array(
        [np.median(by_gene.data[start:end]) if end > start else 1.0 for start, end in pairwise(starts)]
    )


def rank_genes(cells: Cells, medians: NDArray[np.float64], tokens: int) -> RankedCells:
    """Each cell's expressed genes by falling expression over the gene's median; equal ones in gene order.

    Args:
        cells: The cells.
        medians: [genes], in counts per 10,000.
        tokens: The longest list.

    Returns:
        The lists.
    """
    lengths = np.minimum(np.diff(cells.expression.indptr), tokens).astype(np.int64)
    genes = np.zeros((len(cells), int(lengths.max())), dtype=np.int32)
    for i, length in enumerate(lengths):
        row = cells.expression[i]
        order = np.argsort(-np.expm1(row.data) / medians[row.indices], kind="stable")
        genes[i, :length] = row.indices[order[:length]]
    return RankedCells(genes, lengths)


def mask_genes(
    cells: RankedCells, chosen: NDArray[np.int64], mask_token: int, generator: np.random.Generator
) -> RankBatch:
    """A batch in which some genes of each list are hidden.

    Args:
        cells: The lists.
        chosen: [B], which of them.
        mask_token: What stands in place of a hidden gene.
        generator: Decides which are hidden.

    Returns:
        The batch, on the CPU.
    """
    lengths = cells.lengths[chosen]
    longest = int(lengths.max())
    tokens = torch.from_numpy(cells.genes[chosen, :longest].astype(np.int64))
    hidden = torch.from_numpy(
        np.concatenate(
            [
                i * longest + generator.choice(length, max(1, round(MASK_FRACTION * length)), replace=False)
                for i, length in enumerate(lengths)
            ]
        )
    )
    genes = tokens.flatten()[hidden]
    tokens.view(-1)[hidden] = mask_token
    is_padded = bool((lengths < longest).any())
    return RankBatch(tokens, hidden, genes, torch.from_numpy(lengths) if is_padded else None)

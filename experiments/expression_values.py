"""Expression values as the task of long runs: masked-value regression, on logarithms or on counts.

The heavy-tailed variant predicts counts, the usual one their logarithm: among counts a few genes carry nearly
all of the variance, and so of the gradient.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from experiments.cell_batches import MaskedBatch, masked_batches
from experiments.cell_pool import CellPool
from experiments.cell_transformer import CellTransformer, CellTransformerConfig, masked_value_loss


class ValueTask:
    """Masked-value regression: model, batches, loss, and the losses of knowing nothing of the cell.

    Args:
        pool: The cells.
        batch_size: Cells per step.
        tokens: Longest sequence; longer cells are sampled.
        seed: Of the order of cells, gene samples and hidden positions; the step is added to it, so that
            batches depend on nothing that came before.
        is_heavy_tailed: Whether the targets are counts, over their standard deviation in training, in place
            of log1p counts. What the model is shown stays logged.
    """

    metric = "mean squared error"

    def __init__(
        self, pool: CellPool, *, batch_size: int, tokens: int, seed: int, is_heavy_tailed: bool = False
    ) -> None:
        self.pool = pool
        self.batch_size = batch_size
        self.tokens = tokens
        self.seed = seed
        self._count_scale = float(np.expm1(pool.train.expression.data).std()) if is_heavy_tailed else None

    @property
    def reference(self) -> float:
        """Mean squared error on the validation batches of predicting the training values' mean."""
        mean = self._target(torch.from_numpy(self.pool.train.expression.data)).double().mean()
        hidden = torch.cat([batch.targets[batch.mask] for batch in self.validation_batches(self.batch_size)])
        return float((hidden.double() - mean).square().mean())

    @property
    def without_attention(self) -> float:
        """Mean squared error on the validation batches of predicting each gene's mean in the training cells.

        All that a hidden token knows as long as no attention tells it of the others.
        """
        expression = self.pool.train.expression
        targets = self._target(torch.from_numpy(expression.data)).double().numpy()
        num_genes = len(self.pool.train.genes)
        counts = np.bincount(expression.indices, minlength=num_genes)
        sums = np.bincount(expression.indices, targets, minlength=num_genes)
        means = torch.from_numpy(np.where(counts > 0, sums / np.maximum(counts, 1), targets.mean()))
        batches = self.validation_batches(self.batch_size)
        errors = [batch.targets[batch.mask].double() - means[batch.genes[batch.mask]] for batch in batches]
        return float(torch.cat(errors).square().mean())

    def model(self, config: CellTransformerConfig) -> CellTransformer:
        """The model of this task."""
        return CellTransformer(replace(config, num_genes=len(self.pool.train.genes)))

    def batch(self, step: int) -> MaskedBatch:
        """The batch of a training step, on the CPU."""
        stream = masked_batches(
            self.pool.train, batch_size=self.batch_size, max_tokens=self.tokens, seed=[self.seed, step]
        )
        return self._prepared(next(stream))

    def validation_batches(self, batch_size: int) -> list[MaskedBatch]:
        """Every validation cell once or, in the last batch, twice; hidden alike for every seed."""
        stream = masked_batches(self.pool.validation, batch_size=batch_size, max_tokens=self.tokens)
        count = -(-len(self.pool.validation) // batch_size)
        return [self._prepared(batch) for batch in islice(stream, count)]

    def loss(self, model: nn.Module, batch: MaskedBatch) -> Tensor:
        """Mean squared error over the hidden values, 0-d float32."""
        predictions = model(batch.genes, batch.values, batch.mask, batch.lengths)
        return masked_value_loss(predictions, batch.targets, batch.mask)

    def _prepared(self, batch: MaskedBatch) -> MaskedBatch:
        # Lengths that say nothing would keep attention from the kernels for dense calls.
        assert batch.lengths is not None
        is_padded = bool((batch.lengths < batch.genes.shape[1]).any())
        return batch._replace(
            targets=self._target(batch.targets), lengths=batch.lengths if is_padded else None
        )

    def _target(self, logged: Tensor) -> Tensor:
        return logged if self._count_scale is None else logged.expm1() / self._count_scale

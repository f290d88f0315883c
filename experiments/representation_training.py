"""A training that ends when validation cells tell it to, and the embeddings of cells that it leads to.

Where the last weights of a long run are the result, here those of the lowest validation loss are. The
embedding of a cell is the mean of its tokens' states after the last block, nothing masked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from experiments.cell_pool import CellPool
from experiments.gene_ranks import RankBatch, RankedCells, RankTransformer
from experiments.length_batches import LengthAwareRankTask, length_batches
from experiments.representation_plan import RepresentationConfig
from experiments.resumable_training import ResumableTraining


class PatientTraining(ResumableTraining):
    """A run that keeps its best weights and ends when they have been the best for too long.

    Args:
        config: The run.
        task: The cells.
        device: "cpu" or "cuda".
        best: File of the best weights so far; it lies beside the checkpoint and is read when a run goes on.
    """

    config: RepresentationConfig
    task: LengthAwareRankTask

    def __init__(
        self, config: RepresentationConfig, task: LengthAwareRankTask, device: str, best: Path
    ) -> None:
        super().__init__(config, task, device)
        self.best = best
        self._validation_batches = task.validation_batches(config.batch_size)

    @property
    def best_step(self) -> int:
        """The step of the lowest validation loss so far, the first of equal ones."""
        return min(self.validation, key=_by_loss)[0]

    @property
    def best_loss(self) -> float:
        """The lowest validation loss so far."""
        return min(self.validation, key=_by_loss)[1]

    def run(self, deadline: float, on_step: Callable[[int], None] = lambda step: None) -> bool:
        """Train until patience, steps or time are at an end.

        Args:
            deadline: In seconds of `time.monotonic`.
            on_step: Called with the number of steps done after each of them.

        Returns:
            Whether the run is finished.
        """
        started, before = time.monotonic(), self.seconds
        if not self.validation:
            self._look()
        while not self._is_done():
            if self._is_told_to_stop or time.monotonic() >= deadline:
                self.seconds = before + time.monotonic() - started
                return False
            self._train_step()
            if self.step % self.config.validate_every == 0 or self.step == self.config.steps:
                self._look()
            on_step(self.step)
        self.seconds = before + time.monotonic() - started
        return True

    def validate(self) -> float:
        """Mean loss of the validation cells' hidden genes, the same ones each time."""
        return self.loss_over(self._validation_batches)

    @torch.no_grad()
    def loss_over(self, batches: list[RankBatch]) -> float:
        """Mean loss of hidden genes, each counted once.

        Args:
            batches: Of the task.

        Returns:
            Nats.
        """
        counts = torch.tensor([len(batch.genes) for batch in batches], device=self.device)
        losses = torch.stack([self._loss(batch) for batch in batches])
        return float((losses * counts).sum() / counts.sum())

    def load_best(self) -> None:
        """Take the best weights in place of the last ones."""
        self.model.load_state_dict(torch.load(self.best, map_location=self.device, weights_only=True))

    @torch.no_grad()
    def embed(self, cells: RankedCells) -> NDArray[np.float32]:
        """Mean state of each cell's tokens after the last block.

        Args:
            cells: Any of the task's vocabulary.

        Returns:
            [cells, embed_dim].
        """
        assert isinstance(self.model, RankTransformer)
        embeddings = np.zeros((len(cells.lengths), self.model.config.embed_dim), np.float32)
        is_autocast = self.config.precision == "autocast"
        for chosen in length_batches(cells.lengths, self.task.max_tokens):
            lengths = torch.from_numpy(cells.lengths[chosen]).to(self.device)
            longest = int(cells.lengths[chosen].max())
            tokens = torch.from_numpy(cells.genes[chosen, :longest].astype(np.int64)).to(self.device)
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=is_autocast):
                states = self.model.states(tokens, lengths)
            is_token = torch.arange(longest, device=self.device) < lengths[:, None]
            # Not a product with 0 and 1: what is computed for padding may be anything.
            sums = states.float().masked_fill(~is_token.unsqueeze(-1), 0.0).sum(dim=1)
            embeddings[chosen] = (sums / lengths[:, None]).cpu().numpy()
        return embeddings

    def _look(self) -> None:
        loss = self.validate()
        is_best = not self.validation or _by_loss((self.step, loss)) < _by_loss((0, self.best_loss))
        self.validation.append((self.step, loss))
        if is_best:
            torch.save(self.model.state_dict(), self.best)

    def _is_done(self) -> bool:
        looks = sum(step > self.best_step for step, _ in self.validation)
        return (
            self.step >= self.config.steps
            or looks >= self.config.patience
            or not math.isfinite(self.table.last_loss)
        )


@contextmanager
def training_of(
    config: RepresentationConfig, pool: CellPool, device: str, best: Path
) -> Iterator[PatientTraining]:
    """A run with its probe attached; the probe is closed at the end.

    Args:
        config: The run.
        pool: Its cells.
        device: "cpu" or "cuda".
        best: See `PatientTraining`.

    Yields:
        The training.
    """
    task = LengthAwareRankTask(pool, batch_size=config.batch_size, tokens=config.tokens, seed=config.seed)
    training = PatientTraining(config, task, device, best)
    with training.probe:
        yield training


def _by_loss(look: tuple[int, Any]) -> float:
    """A loss that is no number is worse than any."""
    return look[1] if math.isfinite(look[1]) else math.inf

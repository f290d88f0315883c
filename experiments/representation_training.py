"""A training that ends when validation cells tell it to, and the embeddings of cells that it leads to.

Where the last weights of a long run are the result, here those of the lowest validation loss are. The
embedding of a cell is the mean of its tokens' states after the last block, nothing masked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
    """

    config: RepresentationConfig
    task: LengthAwareRankTask

    def __init__(self, config: RepresentationConfig, task: LengthAwareRankTask, device: str) -> None:
        super().__init__(config, task, device)
        self._best: dict[str, Tensor] = {}  # weights; in the checkpoint, so that they are of one step with it

    @property
    def best_step(self) -> int:
        """The step of the lowest validation loss so far, the first of equal ones."""
        return min(self.validation, key=_by_loss)[0]

    @property
    def best_loss(self) -> float:
        """The lowest validation loss so far."""
        return min(self.validation, key=_by_loss)[1]

    @property
    def is_diverged(self) -> bool:
        """Whether the training loss was no finite number."""
        return not math.isfinite(self.table.last_loss)

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
        losses, counts = self.cell_losses(self.task)
        return float(losses.sum() / counts.sum())

    @torch.no_grad()
    def cell_losses(self, task: LengthAwareRankTask) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Loss of the hidden genes of each validation cell.

        Args:
            task: Any of the same vocabulary.

        Returns:
            [cells] summed over the cell's hidden genes, nats; [cells] how many are hidden.
        """
        is_autocast = self.config.precision == "autocast"
        batches, losses = task.looks(), []
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=is_autocast):  # casts weights once
            for _, batch in batches:
                ours = RankBatch._make(self._on_device(tensor) for tensor in batch)
                losses.append(task.hidden_losses(self.model, ours))
        each = torch.cat(losses).double().cpu().numpy()  # the one transfer of a look
        cells = np.concatenate([chosen[batch.hidden // batch.tokens.shape[1]] for chosen, batch in batches])
        size = len(task.validation.lengths)
        sums = np.bincount(cells, weights=each, minlength=size).astype(np.float64)
        return sums, np.bincount(cells, minlength=size).astype(np.int64)

    def take_best(self) -> None:
        """Take the best weights in place of the last ones."""
        self.model.load_state_dict(self._best)

    @torch.no_grad()
    def embed(self, cells: RankedCells) -> NDArray[np.float32]:
        """Mean state of each cell's tokens after the last block.

        Args:
            cells: Any of the task's vocabulary.

        Returns:
            [cells, embed_dim].
        """
        assert isinstance(self.model, RankTransformer)
        batches, means = length_batches(cells.lengths, self.task.max_forward_tokens), []
        is_autocast = self.config.precision == "autocast"
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=is_autocast):
            for chosen in batches:
                longest = int(cells.lengths[chosen].max())
                lengths = torch.from_numpy(cells.lengths[chosen]).to(self.device)
                tokens = torch.from_numpy(cells.genes[chosen, :longest].astype(np.int64)).to(self.device)
                states = self.model.states(tokens, lengths).float()
                is_token = torch.arange(longest, device=self.device) < lengths[:, None]
                # Not a product with 0 and 1: what is computed for padding may be anything.
                sums = states.masked_fill(~is_token.unsqueeze(-1), 0.0).sum(dim=1)
                means.append(sums / lengths[:, None])
        embeddings = np.empty((len(cells.lengths), self.model.config.embed_dim), np.float32)
        embeddings[np.concatenate(batches)] = torch.cat(means).cpu().numpy()  # the one transfer
        return embeddings

    def _look(self) -> None:
        loss = self.validate()
        is_best = not self.validation or _by_loss((self.step, loss)) < _by_loss((0, self.best_loss))
        self.validation.append((self.step, loss))
        if is_best:
            self._best = {name: each.detach().clone() for name, each in self.model.state_dict().items()}

    def _is_done(self) -> bool:
        best_step = self.best_step
        looks = sum(step > best_step for step, _ in self.validation)
        return self.step >= self.config.steps or looks >= self.config.patience or self.is_diverged

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "best": self._best}

    def _take_state(self, state: dict[str, Any]) -> None:
        super()._take_state(state)
        self._best = state["best"]


@contextmanager
def training_of(config: RepresentationConfig, pool: CellPool, device: str) -> Iterator[PatientTraining]:
    """A run with its probe attached; the probe is closed at the end.

    Args:
        config: The run.
        pool: Its cells.
        device: "cpu" or "cuda".

    Yields:
        The training.
    """
    task = LengthAwareRankTask(pool, batch_size=config.batch_size, tokens=config.tokens, seed=config.seed)
    training = PatientTraining(config, task, device)
    with training.probe:
        yield training


def _by_loss(look: tuple[int, Any]) -> float:
    """A loss that is no number is worse than any."""
    return look[1] if math.isfinite(look[1]) else math.inf

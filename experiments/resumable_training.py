"""A training that can be cut in pieces: a cell transformer of either task, AdamW, probes attached throughout.

A run is decided by its `RunConfig` alone. Batches are a function of seed and step, so the step is the whole
position in the data. A checkpoint holds model, optimizer, step, random states, probe and detectors, and all
records; on a CPU the piece after it continues bitwise.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import probes
from experiments.cell_transformer import CellTransformerConfig
from experiments.expression_values import ValueTask
from experiments.gene_ranks import RankTask
from experiments.run_config import RunConfig
from experiments.run_records import RecordTable

VALIDATE_EVERY = 250


class ResumableTraining:
    """A run between two steps.

    Args:
        config: The run.
        task: Of `task_of`.
        device: "cpu" or "cuda".
    """

    def __init__(self, config: RunConfig, task: RankTask | ValueTask, device: str) -> None:
        self.config, self.task, self.device = config, task, device
        torch.manual_seed(config.seed)
        sizes = CellTransformerConfig.preset(
            config.preset, num_genes=1, attention=config.mechanism, **config.model
        )
        with torch.device(device):  # a second instead of half a minute for 160 million parameters
            model: Any = task.model(sizes)
        self.model = model.to(torch.bfloat16) if config.precision == "bfloat16" else model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=device == "cuda",
        )
        self.table = RecordTable()
        # The default periods: norms of every layer at each step, attention at each tenth, all at each 200th.
        self.probe = probes.attach(self.model, self.optimizer, sinks=[self.table], on_divergence="ignore")
        self.step = 0
        self.seconds = 0.0
        self.validation: list[tuple[int, float]] = []
        self._is_told_to_stop = False

    def stop(self) -> None:
        """Let the step under way be the piece's last, as if its time were up."""
        self._is_told_to_stop = True

    def run(self, deadline: float, on_step: Callable[[int], None] = lambda step: None) -> bool:
        """Train until the end or the deadline; whoever calls it closes the probe.

        Args:
            deadline: In seconds of `time.monotonic`.
            on_step: Called with the number of steps done after each of them.

        Returns:
            Whether the run is finished: the last step is done, or the loss was no finite number.
        """
        started, before = time.monotonic(), self.seconds
        try:
            # The records come one step late and without waiting for the device.
            while self.step < self.config.steps and math.isfinite(self.table.last_loss):
                if self._is_told_to_stop or time.monotonic() >= deadline:
                    return False
                self._train_step()
                if self.step % VALIDATE_EVERY == 0 or self.step == self.config.steps:
                    self.validation.append((self.step, self.validate()))
                on_step(self.step)
            return True
        finally:
            self.seconds = before + time.monotonic() - started

    @torch.no_grad()
    def validate(self) -> float:
        """Loss over the validation cells, the same masks each time."""
        batches = self.task.validation_batches(self.config.batch_size)
        return float(torch.stack([self._loss(batch) for batch in batches]).mean())

    def save(self, path: Path) -> None:
        """Write a checkpoint; one that is there is replaced in one go."""
        temporary = path.with_suffix(".partial-checkpoint")
        torch.save(self._state(), temporary)
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint.

        Args:
            path: Of `save`.

        Raises:
            ValueError: It is of a run with another configuration.
        """
        # Not weights_only: the records are numpy arrays. Checkpoints are our own, from minutes ago.
        state = torch.load(path, map_location=self.device, weights_only=False)
        ours = asdict(self.config)
        if changed := [name for name, value in ours.items() if state["config"].get(name) != value]:
            raise ValueError(
                f"{path.name} is of a run with another configuration ({', '.join(changed)} differ). "
                "Remove it, or give the run another name."
            )
        self._take_state(state)

    def facts(self, *, is_finished: bool) -> dict[str, Any]:
        """What the records' file says beside the records."""
        return {
            "config": asdict(self.config),
            "steps": self.step,
            "is_finished": is_finished,
            "seconds": round(self.seconds, 2),
            "parameters": self.model.parameter_counts(),
            "metric": self.task.metric,
            "reference": self.task.reference,
            "without_attention": self.task.without_attention,
            "validation": self.validation,
        }

    def _state(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "validation": self.validation,
            "probe": self.probe.state_dict(),  # first: it brings the last step's records to the table
            "records": self.table.arrays(),
            "cpu_random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state() if self.device == "cuda" else None,
        }

    def _take_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.validation = state["step"], state["seconds"], state["validation"]
        self.table.load(state["records"])
        self.probe.load_state_dict(state["probe"])
        torch.set_rng_state(state["cpu_random_state"].cpu())
        if self.device == "cuda":
            torch.cuda.set_rng_state(state["cuda_random_state"].cpu())

    def _train_step(self) -> None:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.rate(self.step)
        loss = self._loss(self.task.batch(self.step))
        self.probe.log(loss=loss)
        loss.backward()
        if config.clip_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
            self.probe.log(unclipped_grad_norm=norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def _loss(self, batch: Any) -> Tensor:
        is_autocast = self.config.precision == "autocast"
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=is_autocast):
            return self.task.loss(self.model, type(batch)(*(self._on_device(tensor) for tensor in batch)))

    def _on_device(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if self.device == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

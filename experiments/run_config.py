"""What decides a long run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from experiments.cell_transformer import Mechanism


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run.

    Attributes:
        name: Of its files.
        mechanism: "softmax" or "sigmoid".
        task: "ranks" (masked genes), "values" (log1p expression) or "counts" (heavy-tailed targets).
        data: "cells" (mixtures of a prepared file) or "synthetic".
        preset: A key of `experiments.cell_transformer.PRESETS`.
        model: Changes to the preset, such as {"norm_position": "post"}.
        precision: "autocast" (bfloat16 where autocast allows it), "bfloat16" (weights and moments too) or
            "float32".
        learning_rate: Of AdamW, after warm-up.
        schedule: "constant", or "cosine" down to zero at the last step.
        warmup_steps: Steps over which the rate rises linearly; 0 starts at full size.
        betas: Of AdamW.
        eps: Of AdamW.
        weight_decay: Of AdamW, on every parameter.
        clip_norm: Largest global gradient norm; None clips nothing. The probes record what the optimizer
            gets.
        batch_size: Cells per step.
        tokens: Tokens per cell.
        steps: Optimizer steps.
        seed: Of weights and batches; alike for both mechanisms.
    """

    name: str
    mechanism: Mechanism
    task: Literal["ranks", "values", "counts"] = "ranks"
    data: Literal["cells", "synthetic"] = "cells"
    preset: str = "160m"
    model: dict[str, Any] = field(default_factory=dict)
    precision: Literal["autocast", "bfloat16", "float32"] = "autocast"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = None
    batch_size: int = 1
    tokens: int = 8192
    steps: int = 1500
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step, the first one being 0.

        Example:
            >>> config = RunConfig(
            ...     "a", "softmax", learning_rate=1.0, warmup_steps=4, steps=12, schedule="cosine"
            ... )
            >>> [round(config.rate(step), 2) for step in (0, 3, 4, 8, 11)]
            [0.25, 1.0, 1.0, 0.5, 0.04]
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

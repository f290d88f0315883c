"""One training run of the stress test: a cell transformer, AdamW, no clipping, probes attached."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import probes
from experiments.cell_batches import MaskedBatch, masked_batches
from experiments.cell_transformer import CellTransformer, CellTransformerConfig, masked_value_loss
from experiments.cells import Cells
from experiments.explosion import Run

BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.01
ALL_LAYERS = "(all)"


@dataclass(frozen=True)
class TrainingSettings:
    """What the runs of one stress test have in common.

    Attributes:
        steps: Optimizer steps.
        warmup_steps: Steps over which the learning rate rises linearly; 0 starts at full size.
        batch_size: Cells per step.
        max_tokens: Longest sequence.
        mask_fraction: Share of hidden values.
        include_zeros: Whether short cells are filled up with genes they do not express.
        device: "cpu" or "cuda"; on "cuda" the forward pass runs under bfloat16 autocast.
    """

    steps: int
    warmup_steps: int
    batch_size: int
    max_tokens: int
    mask_fraction: float
    include_zeros: bool
    device: str


def train(
    cells: Cells,
    model_config: CellTransformerConfig,
    settings: TrainingSettings,
    *,
    learning_rate: float,
    seed: int,
    log_dir: Path,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Run:
    """Train one model until the last step, a non-finite loss, or Ctrl-C; keep what was recorded.

    The seed decides weights and batches, so both mechanisms see the same of both.

    Args:
        cells: Where the batches come from.
        model_config: The model, its mechanism included.
        settings: Shared by all runs of a stress test.
        learning_rate: Of AdamW.
        seed: Of weights and batches.
        log_dir: Receives TensorBoard events; those of an earlier run there are replaced.
        on_step: Called with the loss after each step.

    Returns:
        The recorded series; gradient norms are the probes' own records.

    Raises:
        OSError: `log_dir` cannot be written.
    """
    for stale in log_dir.glob("events.out.tfevents.*"):
        stale.unlink()
    torch.manual_seed(seed)
    model = CellTransformer(model_config).to(settings.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, settings.warmup_steps))
    )
    batches = masked_batches(
        cells,
        batch_size=settings.batch_size,
        max_tokens=settings.max_tokens,
        mask_fraction=settings.mask_fraction,
        include_zeros=settings.include_zeros,
        seed=seed,
    )
    hidden: list[torch.Tensor] = []
    is_interrupted = False
    started = time.perf_counter()
    hparams = {"mechanism": model_config.attention, "learning_rate": learning_rate, "seed": seed}
    probe = probes.attach(model, optimizer, log_dir=log_dir, on_divergence="ignore", hparams=hparams)
    try:
        for _, batch in zip(range(settings.steps), batches, strict=False):
            hidden.append(batch.targets[batch.mask])
            loss = _loss(model, batch.to(settings.device), settings.device)
            probe.log(loss=loss)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            on_step(loss.item())
            if not torch.isfinite(loss):
                break
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        probe.close()
    seconds = time.perf_counter() - started
    norms, losses = _series(probe.records)
    grad_norms = norms.pop(ALL_LAYERS, np.empty(0))
    num_steps = len(grad_norms)  # Ctrl-C may have cut a step after its loss
    return Run(
        mechanism=model_config.attention,
        learning_rate=learning_rate,
        seed=seed,
        losses=losses[:num_steps],
        mean_losses=_losses_of_the_mean(hidden[:num_steps]),
        grad_norms=grad_norms,
        layer_grad_norms={layer: values[:num_steps] for layer, values in norms.items()},
        seconds=seconds,
        is_interrupted=is_interrupted,
    )


def _loss(model: CellTransformer, batch: MaskedBatch, device: str) -> torch.Tensor:
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        predictions = model(batch.genes, batch.values, batch.mask, batch.lengths)
    return masked_value_loss(predictions, batch.targets, batch.mask)


def _series(records: list[probes.Record]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Gradient norms by layer, and losses, step by step."""
    norms: defaultdict[str, list[float]] = defaultdict(list)
    losses = []
    for record in records:
        if record.quantity == "grad_norm":
            norms[record.layer].append(record.value)
        elif record.quantity == "loss":
            losses.append(record.value)
    return {layer: np.array(values) for layer, values in norms.items()}, np.array(losses)


def _losses_of_the_mean(hidden: list[torch.Tensor]) -> np.ndarray:
    """Loss of every batch for the constant prediction that is best over all of them."""
    if not hidden:
        return np.empty(0)
    mean = torch.cat(hidden).mean()
    return np.array([(values - mean).square().mean().item() for values in hidden])

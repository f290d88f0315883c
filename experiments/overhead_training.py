"""The trainings whose cost is measured: a model, its optimizer, batches made beforehand, one step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from experiments.cell_batches import masked_batches
from experiments.cell_transformer import CellTransformer, CellTransformerConfig, masked_value_loss
from experiments.cells import synthetic_cells
from experiments.token_chains import chain_batches
from experiments.token_transformer import TokenTransformer, TokenTransformerConfig

NUM_BATCHES = 16
# Small enough that no configuration's training goes astray, whatever the number of rounds.
LEARNING_RATE = 1e-4

TOKEN_MODELS = {
    "small": TokenTransformerConfig(),
    "160m-tokens": TokenTransformerConfig(max_tokens=8192, embed_dim=1024, num_layers=12, num_heads=16),
    "tiny": TokenTransformerConfig(vocabulary=16, max_tokens=8, embed_dim=8, num_layers=2),
}


@dataclass
class Training:
    """One copy of the training that every configuration gets.

    Attributes:
        model: The model, on its device.
        optimizer: AdamW over all its parameters.
        loss_of: Loss of the model on the batch of a step.
        steps_done: Steps so far.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_of: Callable[[nn.Module, int], Tensor]
    steps_done: int = 0

    def step(self, watch: Callable[[Tensor], None]) -> None:
        """Trains one step.

        Args:
            watch: Called with the loss between backward pass and optimizer step.
        """
        loss = self.loss_of(self.model, self.steps_done)
        loss.backward()
        watch(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1


def token_trainings(device: str, config: TokenTransformerConfig, batch_size: int) -> Callable[[], Training]:
    """Trainings of a language model on fused softmax attention.

    Args:
        device: "cpu" or "cuda"; on "cuda" the forward pass runs under bfloat16 autocast.
        config: The model.
        batch_size: Sequences of `config.max_tokens` a step.

    Returns:
        A function that makes equal trainings: the same weights, the same batches.
    """
    stream = chain_batches(
        vocabulary=config.vocabulary,
        num_chains=2,
        batch_size=batch_size,
        tokens=config.max_tokens + 1,
        seed=0,
    )
    batches = [batch.to(device) for batch in islice(stream, NUM_BATCHES)]

    def loss_of(model: nn.Module, step: int) -> Tensor:
        tokens = batches[step % NUM_BATCHES]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return lambda: _training(lambda: TokenTransformer(config), loss_of, device)


def cell_trainings(
    device: str, preset: str, tokens: int, mechanism: str, batch_size: int
) -> Callable[[], Training]:
    """Trainings of the stress test's cell transformer on synthetic cells.

    Args:
        device: As in :func:`token_trainings`.
        preset: A key of `experiments.cell_transformer.PRESETS`.
        tokens: Genes of a cell.
        mechanism: "softmax" or "sigmoid".
        batch_size: Cells a step.

    Returns:
        As :func:`token_trainings`.
    """
    num_genes = tokens * 6 // 5  # of which a cell expresses nine in ten
    cells = synthetic_cells(num_cells=NUM_BATCHES, num_genes=num_genes, counts_per_cell=40 * num_genes)
    stream = masked_batches(cells, batch_size=batch_size, max_tokens=tokens, include_zeros=True)
    batches = [batch.to(device) for batch in islice(stream, NUM_BATCHES)]
    config = CellTransformerConfig.preset(preset, num_genes=num_genes, attention=mechanism)

    def loss_of(model: nn.Module, step: int) -> Tensor:
        batch = batches[step % NUM_BATCHES]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            predictions = model(batch.genes, batch.values, batch.mask, batch.lengths)
        return masked_value_loss(predictions, batch.targets, batch.mask)

    return lambda: _training(lambda: CellTransformer(config), loss_of, device)


def _training(
    make_model: Callable[[], nn.Module], loss_of: Callable[[nn.Module, int], Tensor], device: str
) -> Training:
    torch.manual_seed(0)
    with torch.device(device):  # a second instead of half a minute for 160 million parameters
        model = make_model()
    return Training(model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), loss_of)

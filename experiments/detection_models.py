"""The trainings of the fault suite: models of two to six layers, data they can learn, an optimizer.

A step takes a few milliseconds on one CPU thread, so that a hundred thousand steps fit in half an hour.
Everything a training does follows from its set-up, its seed and its schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from experiments.cell_batches import masked_batches
from experiments.cell_transformer import CellTransformer, CellTransformerConfig, masked_value_loss
from experiments.cells import synthetic_cells
from experiments.token_chains import chain_batches
from experiments.token_transformer import TokenTransformer, TokenTransformerConfig

NUM_GENES = 60
NUM_FEATURES = 16
NUM_CLASSES = 8
IMAGE_SIZE = 8
WARM_UP_STEPS = 20


class Batch(NamedTuple):
    """One step's data.

    Attributes:
        inputs: What the model reads: int64 tokens or float32 values, [B, ...].
        targets: What it is to say, [B, ...].
        context: Further inputs that no fault touches.
    """

    inputs: Tensor
    targets: Tensor
    context: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Setup:
    """A training but for its seed and schedule.

    Attributes:
        make_model: Builds the model from torch's global seed.
        batches: Endless stream of batches from a seed and a batch size.
        loss: Of a model on a batch.
        optimizer: "adamw" (torch's defaults) or "sgd" (momentum 0.9).
        learning_rate: Its peak.
        batch_size: Samples of a batch.
        first_layers: The layers that read the batch.
    """

    make_model: Callable[[], nn.Module]
    batches: Callable[[int, int], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    optimizer: Literal["adamw", "sgd"]
    learning_rate: float
    batch_size: int
    first_layers: tuple[str, ...]

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over all parameters."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(model.parameters(), lr=self.learning_rate)
        return torch.optim.SGD(model.parameters(), lr=self.learning_rate, momentum=0.9)


class HiddenLayer(nn.Module):
    """Linear and ReLU."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] to [B, out_features]."""
        return nn.functional.relu(self.linear(x))


class MLPClassifier(nn.Module):
    """ReLU layers without normalisation and without residual connections."""

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__()
        sizes = [NUM_FEATURES, *[width] * num_layers]
        self.blocks = nn.ModuleList(HiddenLayer(*pair) for pair in pairwise(sizes))
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, NUM_FEATURES] to logits [B, NUM_CLASSES]."""
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, h, w] to [B, out_channels, h, w]."""
        return nn.functional.relu(self.norm(self.conv(x)))


class CNNClassifier(nn.Module):
    """Convolution blocks, mean over positions, linear head."""

    def __init__(self, num_layers: int, channels: int) -> None:
        super().__init__()
        sizes = [1, *[channels] * num_layers]
        self.blocks = nn.ModuleList(ConvBlock(*pair) for pair in pairwise(sizes))
        self.head = nn.Linear(channels, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 1, h, w] to logits [B, NUM_CLASSES]."""
        x = images
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


class EncoderRegressor(nn.Module):
    """torch's own post-LN encoder (ReLU, dropout 0.1) between two linear layers."""

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(NUM_FEATURES, width)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers)
        for parameter in self.encoder.parameters():  # nn.TransformerEncoder copies one layer
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.head = nn.Linear(width, NUM_FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, NUM_FEATURES] to the same shape."""
        return self.head(self.encoder(self.embedding(x)))


def token_batches(vocabulary: int, tokens: int, seed: int, batch_size: int) -> Iterator[Batch]:
    """Next-token prediction on two Markov chains."""
    stream = chain_batches(
        vocabulary=vocabulary, num_chains=2, batch_size=batch_size, tokens=tokens + 1, seed=seed
    )
    for sequences in stream:
        yield Batch(sequences[:, :-1], sequences[:, 1:])


def cell_batches(seed: int, batch_size: int) -> Iterator[Batch]:
    """Masked-value regression on synthetic cells of 24 tokens."""
    cells = synthetic_cells(num_cells=128, num_genes=NUM_GENES, counts_per_cell=600, seed=seed)
    for batch in masked_batches(cells, batch_size=batch_size, max_tokens=24, seed=seed):
        yield Batch(batch.values, batch.targets, (batch.genes, batch.mask, batch.lengths))


def denoising_batches(seed: int, batch_size: int) -> Iterator[Batch]:
    """Sequences of 16 noisy copies of one vector; the target at every position is another view of it."""
    generator = torch.Generator().manual_seed(seed)
    view = torch.randn(NUM_FEATURES, NUM_FEATURES, generator=generator) / NUM_FEATURES**0.5
    while True:
        hidden = torch.randn(batch_size, 1, NUM_FEATURES, generator=generator)
        noise = torch.randn(batch_size, 16, NUM_FEATURES, generator=generator)
        yield Batch(hidden + noise, (hidden @ view).expand(-1, 16, -1))


def cluster_batches(seed: int, batch_size: int) -> Iterator[Batch]:
    """Classes that are each two Gaussian clusters."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.2 * torch.randn(2 * NUM_CLASSES, NUM_FEATURES, generator=generator)
    while True:
        cluster = torch.randint(2 * NUM_CLASSES, (batch_size,), generator=generator)
        noise = torch.randn(batch_size, NUM_FEATURES, generator=generator)
        yield Batch(centres[cluster] + noise, cluster % NUM_CLASSES)


def image_batches(seed: int, batch_size: int) -> Iterator[Batch]:
    """Waves of one direction and frequency per class, at a random place, under noise."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = 2 * math.pi * torch.randint(-3, 4, (NUM_CLASSES, 2), generator=generator) / IMAGE_SIZE
    positions = torch.cartesian_prod(torch.arange(IMAGE_SIZE), torch.arange(IMAGE_SIZE)).float()
    while True:
        labels = torch.randint(NUM_CLASSES, (batch_size,), generator=generator)
        phases = 2 * math.pi * torch.rand(batch_size, 1, generator=generator)
        waves = torch.cos(frequencies[labels] @ positions.T + phases)
        noise = 0.5 * torch.randn(batch_size, IMAGE_SIZE**2, generator=generator)
        yield Batch((waves + noise).view(batch_size, 1, IMAGE_SIZE, IMAGE_SIZE), labels)


def token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the next token."""
    return nn.functional.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten())


def cell_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Squared error of the hidden values."""
    genes, mask, lengths = batch.context
    return masked_value_loss(model(genes, batch.inputs, mask, lengths), batch.targets, mask)


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error."""
    return nn.functional.mse_loss(model(batch.inputs), batch.targets)


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the class."""
    return nn.functional.cross_entropy(model(batch.inputs), batch.targets)


def _token_setup(config: TokenTransformerConfig, batch_size: int, learning_rate: float) -> Setup:
    return Setup(
        partial(TokenTransformer, config),
        partial(token_batches, config.vocabulary, config.max_tokens),
        token_loss,
        "adamw",
        learning_rate,
        batch_size,
        ("token_embedding", "position_embedding"),
    )


def _small_token_setup(num_layers: int) -> Setup:
    config = TokenTransformerConfig(vocabulary=32, max_tokens=24, embed_dim=32, num_layers=num_layers)
    return _token_setup(config, batch_size=8, learning_rate=3e-3)


def _cell_setup(num_layers: int, mechanism: Literal["softmax", "sigmoid"]) -> Setup:
    config = CellTransformerConfig(
        NUM_GENES, attention=mechanism, embed_dim=32, num_layers=num_layers, num_heads=2, init_std=0.15
    )
    first_layers = ("value_embedding", "gene_embedding", "(root)")  # the root holds the mask embedding
    return Setup(partial(CellTransformer, config), cell_batches, cell_loss, "adamw", 3e-3, 8, first_layers)


def _encoder_setup(num_layers: int) -> Setup:
    make_model = partial(EncoderRegressor, num_layers, 32)
    return Setup(make_model, denoising_batches, squared_error, "adamw", 1e-3, 8, ("embedding",))


def _mlp_setup(num_layers: int, optimizer: Literal["adamw", "sgd"]) -> Setup:
    learning_rate = 0.02 if optimizer == "sgd" else 2e-3
    first_layers = ("blocks.0", "blocks.0.linear")
    make_model = partial(MLPClassifier, num_layers, 48)
    return Setup(make_model, cluster_batches, class_loss, optimizer, learning_rate, 32, first_layers)


def _cnn_setup(num_layers: int, optimizer: Literal["adamw", "sgd"]) -> Setup:
    learning_rate = 0.05 if optimizer == "sgd" else 2e-3
    first_layers = ("blocks.0", "blocks.0.conv")
    make_model = partial(CNNClassifier, num_layers, 12)
    return Setup(make_model, image_batches, class_loss, optimizer, learning_rate, 16, first_layers)


SETUPS: dict[str, Setup] = {
    **{f"token-{n}": _small_token_setup(n) for n in (2, 3, 4, 6)},
    **{f"cell-softmax-{n}": _cell_setup(n, "softmax") for n in (2, 4)},
    **{f"cell-sigmoid-{n}": _cell_setup(n, "sigmoid") for n in (2, 3, 5)},
    **{f"encoder-{n}": _encoder_setup(n) for n in (2, 4)},
    **{f"mlp-{n}-sgd": _mlp_setup(n, "sgd") for n in (4, 6)},
    "mlp-3-adamw": _mlp_setup(3, "adamw"),
    **{f"cnn-{n}-sgd": _cnn_setup(n, "sgd") for n in (3, 5)},
    "cnn-4-adamw": _cnn_setup(4, "adamw"),
    # The model of experiments/overhead_training.py, on short sequences.
    "token-d256": _token_setup(TokenTransformerConfig(max_tokens=32), batch_size=4, learning_rate=5e-4),
}
"""By name: family, number of layers, optimizer where it is not AdamW alone."""

Schedule = Literal["constant", "cosine", "restarts"]


def learning_rate_factor(schedule: Schedule, step: int, num_steps: int) -> float:
    """The learning rate over its peak: after a linear warm-up constant, or one half cosine, or many.

    Args:
        schedule: "constant"; "cosine": down to a tenth at the last step; "restarts": that every 150 steps.
        step: From 0.
        num_steps: Length of the run.

    Example:
        >>> [round(learning_rate_factor("cosine", step, 120), 2) for step in (0, 19, 70, 120)]
        [0.05, 1.0, 0.55, 0.1]
    """
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    if schedule == "constant":
        return 1.0
    period = num_steps - WARM_UP_STEPS if schedule == "cosine" else 150
    position = step - WARM_UP_STEPS
    if schedule == "restarts":
        position %= period
    return 0.1 + 0.9 * (1 + math.cos(math.pi * position / period)) / 2

"""Small models that the probe tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def transformer_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 8))


def inplace_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, 5),
    )


def torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value)


class SelfAttention(nn.Module):
    """One attention layer without anything around it."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.projection = nn.Linear(16, 48)
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.projection(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.attention(query, key, value).transpose(1, 2).flatten(-2)


class Halves(nn.Linear):
    """A layer with two outputs of one operation."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x).chunk(2, -1)


class SecondHalf(nn.Module):
    """Leaves the first of a layer's two outputs unused."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Halves(2, 4)
        self.last = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, second = self.both(x)
        return self.last(second)


def train(
    model: nn.Module, batch: Callable[[], Tensor], optimizer: torch.optim.Optimizer, steps: int
) -> None:
    for _ in range(steps):
        loss = model(batch()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_on_ones(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    """Plain steps of a model that takes [2, 2]; its loss is the sum of what it gives out."""
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 2)).sum().backward()
        optimizer.step()

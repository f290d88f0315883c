"""A small transformer on several ranks, each with its part of a batch: what the tests here train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import probes

WIDTH, HEADS, TOKENS, BATCH, STEPS = 16, 4, 8, 8, 3
EVERYTHING: dict[str, Any] = {
    "activations_every": 1,
    "details_every": 1,
    "attention_every": 1,
    "attention_rows": None,
    "on_divergence": "ignore",
    "flight_recorder": 0,
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # A rank of a tensor-parallel group has some of the heads.
        query, key, value = (
            layer(normed).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Transformer(nn.Module):
    def __init__(self, num_blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer().double()


def batch(step: int) -> Tensor:
    """The whole batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def own_part(whole: Tensor, group: Any = None) -> Tensor:
    """What this rank trains on of it."""
    return whole.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def adamw(trained: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained.parameters(), lr=1e-2)


def mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def train(
    trained: nn.Module,
    part: Callable[[Tensor], Tensor] = lambda whole: whole,
    *,
    loss_of: Callable[[Tensor], Tensor] = mean_square,
    steps: int = STEPS,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> probes.Probe:
    """Trains and returns the probe, closed."""
    optimizer = optimizer or adamw(trained)
    with probes.attach(trained, optimizer, **{**EVERYTHING, **options}) as probe:
        for step in range(steps):
            loss = loss_of(trained(part(batch(step))))
            loss.backward()
            probe.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
    return probe


def as_rows(probe: probes.Probe) -> dict[str, list[Any]]:
    """Records by step, tag and rank: value, standard error, kind."""
    return {f"{r.step} {r.series.tag} {r.rank}": [r.value, r.standard_error, r.kind] for r in probe.records}

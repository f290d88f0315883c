"""A small transformer on several ranks, each with its part of a batch: what the tests here train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import probes

Rows = dict[str, list[Any]]  # step, tag and rank: value, standard error, kind

WIDTH, HEADS, TOKENS, BATCH, STEPS = 16, 4, 8, 8, 3
MORE_PASSES = (1, 1, 2, 2, 2)  # backward passes in each step
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


def is_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def own_group() -> dist.ProcessGroup:
    """A group of this rank alone."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]  # every rank makes all
    return groups[dist.get_rank()]


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
    watched: nn.Module | None = None,
    **options: Any,
) -> probes.Probe:
    """Trains a model, of which a part may be watched instead, and returns the probe, closed."""
    optimizer = adamw(trained)
    with probes.attach(watched or trained, optimizer, **{**EVERYTHING, **options}) as probe:
        for step in range(steps):
            loss = loss_of(trained(part(batch(step))))
            loss.backward()
            probe.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
    return probe


def train_accumulating(
    trained: nn.Module, parts: Callable[[Tensor, int], Sequence[Tensor]], num_passes: Sequence[int]
) -> probes.Probe:
    """Trains with so many backward passes in each step, each on one of the parts of a batch."""
    optimizer = adamw(trained)
    with probes.attach(trained, optimizer, **EVERYTHING) as probe:
        for step, num_parts in enumerate(num_passes):
            for part in parts(batch(step), num_parts):
                (mean_square(trained(part)) / num_parts).backward()
            optimizer.step()
            optimizer.zero_grad()
    return probe


def train_scaled(trained: nn.Module, part: Callable[[Tensor], Tensor] = lambda whole: whole) -> probes.Probe:
    """Trains two steps with a GradScaler."""
    optimizer, scaler = adamw(trained), torch.amp.GradScaler("cpu", init_scale=4.0)
    with probes.attach(trained, optimizer, **EVERYTHING) as probe:
        for step in range(2):
            scaler.scale(mean_square(trained(part(batch(step))))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return probe


def train_step(trained: nn.Module, optimizer: torch.optim.Optimizer, samples: Tensor) -> None:
    """One step; whoever calls it has attached a probe, or none."""
    mean_square(trained(samples)).backward()
    optimizer.step()
    optimizer.zero_grad()


def as_rows(probe: probes.Probe) -> Rows:
    return {f"{r.step} {r.series.tag} {r.rank}": [r.value, r.standard_error, r.kind] for r in probe.records}

"""The model of :mod:`~tests.probes.distributed.trainings` as each kind of parallelism holds it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tests.probes.distributed.trainings import Transformer, model

INTO_PARTS, INTO_THE_WHOLE = ("query", "key", "value", "up"), ("out", "down")


def flat_mesh(device: str = "cpu") -> DeviceMesh:
    """All ranks in one dimension."""
    return init_device_mesh(device, (dist.get_world_size(),))


def ddp_model(device: str = "cpu") -> DistributedDataParallel:
    return DistributedDataParallel(model().to(device))


def fsdp_model(device: str = "cpu", **options: Any) -> Transformer:
    return shard(model().to(device), flat_mesh(device), **options)


def shard(whole: Transformer, mesh: DeviceMesh, **options: Any) -> Transformer:
    """Shards every block, and what is around them, in place."""
    for part in (*whole.blocks, whole):
        fully_shard(part, mesh=mesh, **options)
    return whole


def tensor_parallel_model(mesh: DeviceMesh) -> Transformer:
    divided = model()
    plan = {
        **dict.fromkeys(INTO_PARTS, ColwiseParallel()),
        **dict.fromkeys(INTO_THE_WHOLE, RowwiseParallel()),
    }
    for block in divided.blocks:
        parallelize_module(block, mesh, plan)
    return divided


def sequence_parallel_model() -> Transformer:
    """Between parallel layers a rank has a part of the sequence; gradients of norms are partial sums."""
    divided, mesh = model(), flat_mesh()
    plan: dict[str, ParallelStyle] = {
        "norm": SequenceParallel(sequence_dim=1),
        **dict.fromkeys(INTO_PARTS, ColwiseParallel(input_layouts=Shard(1))),
        **dict.fromkeys(INTO_THE_WHOLE, RowwiseParallel(output_layouts=Shard(1))),
    }
    for block in divided.blocks:
        parallelize_module(block, mesh, plan)
    whole = PrepareModuleInput(
        input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
    )
    parallelize_module(divided, mesh, {"embed": ColwiseParallel(output_layouts=Shard(1)), "head": whole})
    return divided


def local_parts(trained: nn.Module) -> list[Tensor]:
    """What this rank has of each parameter."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in trained.parameters()]


def all_equal(parts: list[Tensor], others: list[Tensor]) -> bool:
    """Bit by bit."""
    return all(torch.equal(part, other) for part, other in zip(parts, others, strict=True))

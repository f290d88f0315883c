"""Trainings whose records are those of one process with the whole batch, and which no probe changes.

Run by :mod:`tests.probes.distributed.launch`.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy

import probes
from tests.probes.distributed.launch import Result, main
from tests.probes.distributed.parallel_models import (
    all_equal,
    ddp_model,
    flat_mesh,
    fsdp_model,
    local_parts,
    sequence_parallel_model,
    shard,
    tensor_parallel_model,
)
from tests.probes.distributed.trainings import (
    EVERYTHING,
    MORE_PASSES,
    STEPS,
    adamw,
    as_rows,
    batch,
    mean_square,
    model,
    own_group,
    own_part,
    train,
    train_accumulating,
    train_scaled,
    train_step,
)


def ddp(directory: Path) -> Result:
    return as_rows(train(ddp_model(), own_part))


def within_ddp(directory: Path) -> Result:
    """Attached to the module that DDP wraps."""
    wrapped = ddp_model()
    return as_rows(train(wrapped, own_part, watched=wrapped.module))


def one_group_each(directory: Path) -> Result:
    """Every rank trains alone, on everything."""
    return as_rows(train(model(), process_group=own_group()))


def sampled_rows(directory: Path) -> Result:
    return as_rows(train(ddp_model(), own_part, attention_rows=2))


def fsdp(directory: Path) -> Result:
    return as_rows(train(fsdp_model(), own_part))


def fsdp_cpu_offload(directory: Path) -> Result:
    return as_rows(train(fsdp_model(offload_policy=CPUOffloadPolicy(pin_memory=False)), own_part))


def hybrid(directory: Path) -> Result:
    """Sharded in pairs, copied over them."""
    shape = (2, dist.get_world_size() // 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))
    return as_rows(train(shard(model(), mesh), own_part))


def tensor_parallel(directory: Path) -> Result:
    return as_rows(train(tensor_parallel_model(flat_mesh())))


def sequence_parallel(directory: Path) -> Result:
    return as_rows(train(sequence_parallel_model()))


def tensor_parallel_and_fsdp(directory: Path) -> Result:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    divided = shard(tensor_parallel_model(mesh["tensor"]), mesh["data"])
    return as_rows(train(divided, lambda whole: own_part(whole, mesh["data"].get_group())))


def uneven(directory: Path) -> Result:
    """The first rank has three times as many samples as the last."""

    def part(whole: Tensor) -> Tensor:
        return whole[:6] if dist.get_rank() == 0 else whole[6:]

    return as_rows(train(ddp_model(), part, steps=1))


def no_sync(directory: Path) -> Result:
    """Two backward passes a step, of which the first stays on the rank."""
    wrapped = ddp_model()
    optimizer = adamw(wrapped)
    with probes.attach(wrapped, optimizer, **EVERYTHING) as probe:
        for step in range(2):
            first, second = own_part(batch(step)).chunk(2)
            with wrapped.no_sync():
                (mean_square(wrapped(first)) / 2).backward()
            (mean_square(wrapped(second)) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    return as_rows(probe)


def growing_accumulation(directory: Path) -> Result:
    return as_rows(
        train_accumulating(ddp_model(), lambda whole, count: own_part(whole).chunk(count), MORE_PASSES)
    )


def grad_scaler(directory: Path) -> Result:
    return as_rows(train_scaled(ddp_model(), own_part))


def fsdp_with_grad_scaler(directory: Path) -> Result:
    return as_rows(train_scaled(fsdp_model(), own_part))


def unchanged(directory: Path) -> Result:
    """Whether weights after training with a probe and without are the same, bit by bit."""
    return {"ddp": _is_unchanged(ddp_model), "fsdp": _is_unchanged(fsdp_model)}


def _is_unchanged(make_model: Callable[[], nn.Module]) -> bool:
    probed, bare = make_model(), make_model()
    train(probed, own_part)
    optimizer = adamw(bare)
    for step in range(STEPS):
        train_step(bare, optimizer, own_part(batch(step)))
    return all_equal(local_parts(probed), local_parts(bare))


def copies(directory: Path) -> Result:
    """A copy of a watched model, in memory and in a file, takes no hook with it."""
    wrapped = ddp_model()
    with probes.attach(wrapped, adamw(wrapped), **EVERYTHING) as probe:
        file = io.BytesIO()
        torch.save(wrapped.module, file)
        file.seek(0)
        for copied in (copy.deepcopy(wrapped.module), torch.load(file, weights_only=False)):
            mean_square(copied(own_part(batch(0)))).backward()
    return {"num_records": len(probe.records)}


if __name__ == "__main__":
    main(globals())

"""Trainings that do not go straight on: from a checkpoint, without an update, or no further.

Run by :mod:`tests.probes.distributed.launch`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import probes
from tests.probes.distributed.program import Result, main, sharded
from tests.probes.distributed.trainings import EVERYTHING, adamw, as_rows, batch, model, own_part

STEPS, SAVED, JUMP, BROKEN = 30, 20, 24, 3
OPTIONS: dict[str, Any] = {**EVERYTHING, "activations_every": 5, "details_every": 10, "attention_every": 5}


def restored(directory: Path) -> Result:
    return _restored(lambda: DistributedDataParallel(model()), directory / "restored.pt")


def fsdp_restored(directory: Path) -> Result:
    return _restored(sharded, directory / "fsdp_restored.pt")


def fsdp_skips(directory: Path) -> Result:
    return _with_nan_in_a_shard(on_divergence="skip", same_step=True)


def fsdp_raises(directory: Path) -> Result:
    return _with_nan_in_a_shard(on_divergence="raise")


def fsdp_raises_in_the_same_step(directory: Path) -> Result:
    return _with_nan_in_a_shard(on_divergence="raise", same_step=True)


def _restored(make_model: Callable[[], nn.Module], path: Path) -> Result:
    """A training as a whole, and again from a checkpoint on, of which the first rank alone saves the probe.

    What the detectors say of the weights that jump after it, they say because of their past.
    """
    trained = make_model()
    optimizer = adamw(trained)
    with probes.attach(trained, optimizer, **OPTIONS) as whole:
        _train(trained, optimizer, 0, SAVED)
        if dist.get_rank() == 0:
            torch.save(whole.state_dict(), path)
        dist.barrier()
        # Each rank has its own part of these.
        weights, moments = copy.deepcopy(trained.state_dict()), copy.deepcopy(optimizer.state_dict())
        _train(trained, optimizer, SAVED, STEPS)

    trained = make_model()
    optimizer = adamw(trained)
    trained.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    with probes.attach(trained, optimizer, **OPTIONS) as again:
        again.load_state_dict(torch.load(path))
        _train(trained, optimizer, SAVED, STEPS)
    return {
        "whole": {"records": as_rows(whole), "alerts": list(map(str, whole.alerts))},
        "again": {"records": as_rows(again), "alerts": list(map(str, again.alerts))},
        "ends_alike": whole.state_dict() == again.state_dict(),
    }


def _train(trained: nn.Module, optimizer: torch.optim.Optimizer, start: int, end: int) -> None:
    """Steps from one to another; before one of them a layer's weights jump."""
    for step in range(start, end):
        if step == JUMP:
            with torch.no_grad():
                getattr(trained, "module", trained).blocks[1].up.weight.mul_(1.5)
        trained(own_part(batch(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _with_nan_in_a_shard(**options: Any) -> Result:
    """Six steps; in one of them an entry of the gradient is NaN, in the part that the last rank has."""
    trained = sharded()
    optimizer = adamw(trained)
    result: Result = {"raised_in": None, "updated": []}
    with probes.attach(trained, optimizer, **{**EVERYTHING, **options}) as probe:
        for step in range(6):
            trained(own_part(batch(step))).square().mean().backward()
            if step == BROKEN and dist.get_rank() == dist.get_world_size() - 1:
                _local(trained.blocks[1].up.weight.grad)[0, 0] = torch.nan
            before = [_local(p).clone() for p in trained.parameters()]
            try:
                optimizer.step()
            except probes.DivergenceError:
                result["raised_in"] = step
            if not all(
                torch.equal(_local(p), old) for p, old in zip(trained.parameters(), before, strict=True)
            ):
                result["updated"].append(step)
            if result["raised_in"] is not None:
                break
            optimizer.zero_grad()
    result["alerts"] = list(map(str, probe.alerts))
    result["weights_are_finite"] = all(bool(_local(p).isfinite().all()) for p in trained.parameters())
    return result


def _local(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


if __name__ == "__main__":
    main(globals())

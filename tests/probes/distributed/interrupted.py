"""Trainings that do not go straight on: from a checkpoint, without an update, or no further.

Run by :mod:`tests.probes.distributed.launch`.
"""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import probes
from tests.probes.distributed.launch import Result, main
from tests.probes.distributed.parallel_models import all_equal, ddp_model, fsdp_model, local_parts
from tests.probes.distributed.trainings import (
    EVERYTHING,
    adamw,
    as_rows,
    batch,
    is_last_rank,
    mean_square,
    model,
    own_part,
    train_step,
)

STEPS, SAVED, JUMP, BROKEN = 30, 20, 24, 3
OPTIONS: dict[str, Any] = {**EVERYTHING, "activations_every": 5, "details_every": 10, "attention_every": 5}


def restored(directory: Path) -> Result:
    return _restored(ddp_model, directory / "restored.pt")


def fsdp_restored(directory: Path) -> Result:
    return _restored(fsdp_model, directory / "fsdp_restored.pt")


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
        train_step(trained, optimizer, own_part(batch(step)))


def _with_nan_in_a_shard(**options: Any) -> Result:
    """Six steps; in one of them an entry of the gradient is NaN, in the part that the last rank has."""
    trained = fsdp_model()
    optimizer = adamw(trained)
    result: Result = {"raised_in": None, "updated": []}
    with probes.attach(trained, optimizer, **{**EVERYTHING, **options}) as probe:
        for step in range(6):
            mean_square(trained(own_part(batch(step)))).backward()
            if step == BROKEN and is_last_rank():
                trained.blocks[1].up.weight.grad.to_local()[0, 0] = torch.nan
            before = [part.clone() for part in local_parts(trained)]
            try:
                optimizer.step()
            except probes.DivergenceError:
                result["raised_in"] = step
            if not all_equal(local_parts(trained), before):
                result["updated"].append(step)
            if result["raised_in"] is not None:
                break
            optimizer.zero_grad()
    result["alerts"] = list(map(str, probe.alerts))
    result["weights_are_finite"] = all(bool(part.isfinite().all()) for part in local_parts(trained))
    return result


def killed(directory: Path) -> Result:
    """The last rank goes without a word."""
    wrapped = ddp_model()
    optimizer = adamw(wrapped)
    sinks = [probes.sinks.JsonLinesSink(directory / f"killed-{dist.get_rank()}.jsonl")]
    with probes.attach(wrapped, optimizer, sinks=sinks, log_dir=directory / "killed"):
        for step in range(100):
            if step == 20 and is_last_rank():
                os.kill(os.getpid(), signal.SIGKILL)
            train_step(wrapped, optimizer, own_part(batch(step)))
    return {}


def hung(directory: Path) -> Result:
    """The last rank goes to sleep; the others have a timeout of three seconds."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    wrapped = DistributedDataParallel(model(), process_group=group)
    optimizer = adamw(wrapped)
    sinks = [probes.sinks.JsonLinesSink(directory / f"hung-{dist.get_rank()}.jsonl")]
    asleep_since = 0.0
    try:
        with probes.attach(wrapped, optimizer, sinks=sinks, process_group=group):
            for step in range(20):
                if step == 10:
                    asleep_since = time.monotonic()
                    time.sleep(20 if is_last_rank() else 0)
                train_step(wrapped, optimizer, own_part(batch(step)))
    except RuntimeError:
        return {"seconds": time.monotonic() - asleep_since}
    return {}


if __name__ == "__main__":
    main(globals())

"""Trainings that meet a NaN on one rank.

Run by :mod:`tests.probes.distributed.launch`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import probes
from tests.probes.distributed.launch import Result, main
from tests.probes.distributed.parallel_models import ddp_model, fsdp_model, local_parts
from tests.probes.distributed.trainings import (
    EVERYTHING,
    adamw,
    batch,
    is_last_rank,
    mean_square,
    own_part,
)

# Of these six steps only the first measures outputs.
RARELY: dict[str, Any] = {"activations_every": 10, "details_every": 0, "attention_every": 10}


def nan_in_forward(directory: Path) -> Result:
    return train_with_nan(nan_input, step_of_nan=2)


def nan_in_forward_between_activations(directory: Path) -> Result:
    return train_with_nan(nan_input, step_of_nan=4, **RARELY)


def nan_in_backward(directory: Path) -> Result:
    return train_with_nan(nan_gradient, step_of_nan=4, **RARELY)


def nan_in_backward_of_fsdp(directory: Path) -> Result:
    return train_with_nan(nan_gradient, step_of_nan=4, make_model=fsdp_model, **RARELY)


def nan_raises(directory: Path) -> Result:
    return train_with_nan(nan_input, step_of_nan=3, on_divergence="raise")


def nan_raises_when_one_rank_saves(directory: Path) -> Result:
    return train_with_nan(nan_input, step_of_nan=3, on_divergence="raise", saves=True)


def nan_is_skipped(directory: Path) -> Result:
    return train_with_nan(nan_input, step_of_nan=3, on_divergence="skip", same_step=True)


def only_first_writes(directory: Path) -> Result:
    log_dir = directory / f"run-{dist.get_rank()}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train_with_nan(
            nan_input,
            step_of_nan=0,
            log_dir=log_dir,
            on_divergence="warn",
            flight_recorder=8,
            sinks=[probes.sinks.JsonLinesSink(log_dir.with_suffix(".jsonl"))],
        )
    told = [w for w in caught if issubclass(w.category, probes.DivergenceWarning)]
    return {**result, "num_warnings": len(told)}


def train_with_nan(
    plant: Callable[[nn.Module], None],
    step_of_nan: int,
    *,
    make_model: Callable[[], nn.Module] = ddp_model,
    saves: bool = False,
    **options: Any,
) -> Result:
    """Trains six steps; the last rank has a NaN in its second block from one of them on."""
    trained = make_model()
    optimizer = adamw(trained)
    device = next(trained.parameters()).device
    result: Result = {"raised_in": None}
    with probes.attach(trained, optimizer, **{**EVERYTHING, **options}) as probe:
        for step in range(6):
            if step == step_of_nan and is_last_rank():
                plant(getattr(trained, "module", trained).blocks[1])
            try:
                mean_square(trained(own_part(batch(step)).to(device))).backward()
                if saves and dist.get_rank() == 0:
                    probe.state_dict()
                optimizer.step()
            except probes.DivergenceError:
                result["raised_in"] = step
                break
            optimizer.zero_grad()
    result["alerts"] = [
        {"step": a.step, "layer": a.layer, "rank": a.rank, "reason": a.reason} for a in probe.alerts
    ]
    result["weights_are_finite"] = all(bool(part.isfinite().all()) for part in local_parts(trained))
    return result


def nan_input(block: nn.Module) -> None:
    block.up.register_forward_pre_hook(lambda module, args: (args[0] * torch.nan,))


def nan_gradient(block: nn.Module) -> None:
    def plant(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * torch.nan)

    block.up.register_forward_hook(plant)


if __name__ == "__main__":
    main(globals())

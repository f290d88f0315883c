"""Ranks that do not measure, log or ask for the same: what is joined, what is left out, what is refused.

Run by :mod:`tests.probes.distributed.launch`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import probes
from probes import parameter_gradients
from probes.activations import Activations
from stability.divergence import EpisodeDetector, LossDetector
from tests.probes.distributed.launch import Result, main
from tests.probes.distributed.parallel_models import (
    all_equal,
    ddp_model,
    fsdp_model,
    local_parts,
    sequence_parallel_model,
    tensor_parallel_model,
)
from tests.probes.distributed.trainings import (
    EVERYTHING,
    WIDTH,
    Rows,
    adamw,
    as_rows,
    batch,
    is_last_rank,
    mean_square,
    model,
    own_group,
    own_part,
    train,
    train_step,
)


def different_lengths(directory: Path) -> Result:
    """The first rank's sequences are long enough that rows are sampled, the others' are not."""
    length, generator = 100 if dist.get_rank() == 0 else 4, torch.Generator().manual_seed(0)
    long_or_short = torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64)

    def trained_in(group: dist.ProcessGroup | None) -> Rows:
        options = {"attention_rows": 64, "details_every": 0, "process_group": group}
        return as_rows(train(model(), lambda whole: long_or_short, steps=1, **options))

    return {"own": trained_in(own_group()), "joined": trained_in(None)}


def gives_up(directory: Path) -> Result:
    """The last rank runs out of memory in the third step's gradients."""
    with _failing_norms(call=5):  # a step measures gradients and weights
        return as_rows(train(ddp_model(), own_part, steps=6, details_every=0))


def gives_up_inputs(directory: Path) -> Result:
    """From the third step on the last rank does not look at the inputs of one layer."""
    whole, calls = Activations.see_input, itertools.count()

    def failing(activations: Activations, layer: str, inputs: object) -> None:
        if layer == "blocks.0.up" and is_last_rank() and next(calls) == 2:
            raise RuntimeError("planted")
        whole(activations, layer, inputs)

    with mock.patch.object(Activations, "see_input", failing):
        return as_rows(train(ddp_model(), own_part, steps=4))


def sequence_parallel_gives_up(directory: Path) -> Result:
    """Ranks add up partial sums of gradients, whatever has failed on one of them."""
    trained, bare = sequence_parallel_model(), sequence_parallel_model()
    with _failing_norms(call=3):
        probe = train(trained, steps=5)
    optimizer = adamw(bare)
    for step in range(5):
        train_step(bare, optimizer, batch(step))
    is_unchanged = all_equal(local_parts(trained), local_parts(bare))
    return {"is_unchanged": is_unchanged, "records": as_rows(probe)}


@contextmanager
def _failing_norms(call: int) -> Iterator[None]:
    """On the last rank, the n-th time that norms of gradients or weights are computed fails."""
    whole, calls = parameter_gradients.tensor_norms_by_device, itertools.count(1)

    def failing(tensors: list[Tensor]) -> list[tuple[list[int], Tensor]]:
        if next(calls) == call and is_last_rank():
            raise torch.OutOfMemoryError("planted")
        return whole(tensors)

    with mock.patch.object(parameter_gradients, "tensor_norms_by_device", failing):
        yield


def mixed(directory: Path) -> Result:
    """Ranks log different things: one always, one from step 4 on, one only between recorded steps."""
    wrapped = ddp_model()
    optimizer = adamw(wrapped)
    options = {**EVERYTHING, "every": 2, "activations_every": 2, "details_every": 0, "attention_every": 2}
    with probes.attach(wrapped, optimizer, **options) as probe:
        for step in range(12):
            mean_square(wrapped(own_part(batch(step)))).backward()
            if dist.get_rank() == 0:
                probe.log(first=torch.tensor(float(step)))
                if step == 4:
                    probe.log(once=torch.tensor(4.0))
            else:
                probe.log(second=float(step))
                if step >= 4:
                    probe.log(late=float(step))
            optimizer.step()
            optimizer.zero_grad()
    return as_rows(probe)


def unfrozen(directory: Path) -> Result:
    """A layer whose parameters are trained from the third step on."""
    wrapped = ddp_model()
    optimizer = adamw(wrapped)
    options = {**EVERYTHING, "activations_every": 0, "details_every": 0, "attention_every": 0}
    with probes.attach(wrapped, optimizer, **options) as probe:
        for step in range(6):
            mean_square(wrapped(own_part(batch(step)))).backward()
            if step < 2:
                wrapped.module.embed.weight.grad = wrapped.module.embed.bias.grad = None
            optimizer.step()
            optimizer.zero_grad()
    return as_rows(probe)


def refused(directory: Path) -> Result:
    """Messages of attach where ranks differ, and of what is not covered."""
    is_first = dist.get_rank() == 0
    watched = DistributedDataParallel(nn.Linear(2, 1))
    of_first, of_second = dist.new_group([0]), dist.new_group([1])
    alone = of_first if is_first else of_second
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    divided = tensor_parallel_model(mesh["tensor"])
    watching = probes.attach(watched)
    small, large = nn.Linear(2, 1), nn.Linear(2, 1 + dist.get_rank())

    def message(attach: Callable[[], object]) -> str:
        try:
            attach()
        except ValueError as error:
            return str(error)
        return "nothing was refused"

    messages = {
        "watched": message(lambda: probes.attach(watched)),
        "schedule": message(lambda: probes.attach(small, every=1 if is_first else 2)),
        "detectors": message(
            lambda: probes.attach(
                small, detectors=[EpisodeDetector([LossDetector(window=20 if is_first else 30)])]
            )
        ),
        "settings": message(lambda: probes.attach(small, on_divergence="warn" if is_first else "raise")),
        "model": message(lambda: probes.attach(large)),
        "jacobians": message(lambda: probes.attach(fsdp_model(), layer_jacobian_every=1)),
        "replicas": message(lambda: probes.attach(DistributedDataParallel(small, process_group=alone))),
        "divided": message(lambda: probes.attach(DistributedDataParallel(divided, device_mesh=mesh["data"]))),
        "member": "" if is_first else message(lambda: probes.attach(small, process_group=of_first)),
    }
    state = {**watching.state_dict(), "step": 4 + dist.get_rank()}
    messages["step"] = message(lambda: watching.load_state_dict(state))
    watching.close()
    return messages


def joined(directory: Path) -> Result:
    """Under a context in which ranks may have different numbers of batches."""
    wrapped = ddp_model()
    try:
        with wrapped.join():
            train(wrapped, own_part)
    except RuntimeError as error:
        return {"message": str(error)}
    return {"message": "nothing was refused"}


if __name__ == "__main__":
    main(globals())

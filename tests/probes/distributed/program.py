"""One rank of the trainings that the tests here look at.

Run by :mod:`tests.probes.distributed.launch`.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
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

import probes
from probes import parameter_gradients
from probes.activations import Activations
from stability.divergence import EpisodeDetector, LossDetector
from tests.probes.distributed.trainings import (
    EVERYTHING,
    STEPS,
    WIDTH,
    adamw,
    as_rows,
    batch,
    model,
    own_part,
    train,
)

Result = dict[str, Any]


def ddp(directory: Path) -> Result:
    return as_rows(train(DistributedDataParallel(model()), own_part))


def within_ddp(directory: Path) -> Result:
    """Attached to the module that DDP wraps."""
    wrapped = DistributedDataParallel(model())
    optimizer = adamw(wrapped)
    with probes.attach(wrapped.module, optimizer, **EVERYTHING) as probe:
        for step in range(STEPS):
            loss = wrapped(own_part(batch(step))).square().mean()
            loss.backward()
            probe.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
    return as_rows(probe)


def one_group_each(directory: Path) -> Result:
    """Every rank trains alone, on everything."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return as_rows(train(model(), process_group=groups[dist.get_rank()]))


def copies(directory: Path) -> Result:
    """A copy of a watched model, in memory and in a file, takes no hook with it."""
    wrapped = DistributedDataParallel(model())
    with probes.attach(wrapped, adamw(wrapped), **EVERYTHING) as probe:
        file = io.BytesIO()
        torch.save(wrapped.module, file)
        file.seek(0)
        for copied in (copy.deepcopy(wrapped.module), torch.load(file, weights_only=False)):
            copied(own_part(batch(0))).square().mean().backward()
    return {"num_records": len(probe.records)}


def sampled_rows(directory: Path) -> Result:
    return as_rows(train(DistributedDataParallel(model()), own_part, attention_rows=2))


def fsdp(directory: Path) -> Result:
    return as_rows(train(sharded(), own_part))


def ddp_on_gpus(directory: Path) -> Result:
    return as_rows(train(DistributedDataParallel(model().cuda()), lambda whole: own_part(whole).cuda()))


def fsdp_on_gpus(directory: Path) -> Result:
    return as_rows(train(sharded("cuda"), lambda whole: own_part(whole).cuda()))


def nan_in_backward_on_gpus(directory: Path) -> Result:
    options = {"activations_every": 10, "details_every": 0, "attention_every": 10}
    return _with_nan(_nan_gradient, step_of_nan=4, wrap=lambda bare: sharded("cuda"), **options)


def fsdp_cpu_offload(directory: Path) -> Result:
    return as_rows(train(sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)), own_part))


def hybrid(directory: Path) -> Result:
    """Sharded in pairs, copied over them."""
    shape = (2, dist.get_world_size() // 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))
    return as_rows(train(sharded(mesh=mesh), own_part))


def tensor_parallel(directory: Path) -> Result:
    return as_rows(train(_divided(init_device_mesh("cpu", (dist.get_world_size(),)))))


def sequence_parallel(directory: Path) -> Result:
    """Between parallel layers a rank has a part of the sequence; gradients of norms are partial sums."""
    return as_rows(train(_sequence_parallel()))


def _sequence_parallel() -> nn.Module:
    divided = model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    column, row = ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel(output_layouts=Shard(1))
    plan: dict[str, ParallelStyle] = {"norm": SequenceParallel(sequence_dim=1)}
    plan |= dict.fromkeys(("query", "key", "value", "up"), column) | dict.fromkeys(("out", "down"), row)
    for block in divided.blocks:
        parallelize_module(block, mesh, plan)
    whole = PrepareModuleInput(
        input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
    )
    parallelize_module(divided, mesh, {"embed": ColwiseParallel(output_layouts=Shard(1)), "head": whole})
    return divided


def tensor_parallel_and_fsdp(directory: Path) -> Result:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    divided = _divided(mesh["tensor"])
    for block in divided.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(divided, mesh=mesh["data"])
    return as_rows(train(divided, lambda whole: own_part(whole, mesh["data"].get_group())))


def uneven(directory: Path) -> Result:
    """The first rank has three times as many samples as the last."""

    def part(whole: Tensor) -> Tensor:
        return whole[:6] if dist.get_rank() == 0 else whole[6:]

    return as_rows(train(DistributedDataParallel(model()), part, steps=1))


def no_sync(directory: Path) -> Result:
    """Two backward passes a step, of which the first stays on the rank."""
    wrapped = DistributedDataParallel(model())
    optimizer = adamw(wrapped)
    with probes.attach(wrapped, optimizer, **EVERYTHING) as probe:
        for step in range(2):
            first, second = own_part(batch(step)).chunk(2)
            with wrapped.no_sync():
                (wrapped(first).square().mean() / 2).backward()
            (wrapped(second).square().mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    return as_rows(probe)


def growing_accumulation(directory: Path) -> Result:
    """One backward pass in the first two steps, two in the others."""
    wrapped = DistributedDataParallel(model())
    optimizer = adamw(wrapped)
    with probes.attach(wrapped, optimizer, **EVERYTHING) as probe:
        for step in range(5):
            parts = own_part(batch(step)).chunk(1 if step < 2 else 2)
            for part in parts:
                (wrapped(part).square().mean() / len(parts)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return as_rows(probe)


def different_lengths(directory: Path) -> Result:
    """The first rank's sequences are long enough that rows are sampled, the others' are not."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    long_or_short = torch.randn(2, 100 if dist.get_rank() == 0 else 4, WIDTH, dtype=torch.float64)
    trained = [
        train(
            model(),
            lambda whole: long_or_short,
            steps=1,
            attention_rows=64,
            details_every=0,
            process_group=group,
        )
        for group in (groups[dist.get_rank()], None)
    ]
    return {"own": as_rows(trained[0]), "joined": as_rows(trained[1])}


def gives_up(directory: Path) -> Result:
    """The last rank runs out of memory in the third step's gradients."""
    with _failing_norms(call=5):  # a step measures gradients and weights
        return as_rows(train(DistributedDataParallel(model()), own_part, steps=6, details_every=0))


def gives_up_inputs(directory: Path) -> Result:
    """From the third step on the last rank does not look at the inputs of one layer."""
    whole = Activations.see_input

    def failing(activations: Activations, layer: str, inputs: object) -> None:
        is_last = dist.get_rank() == dist.get_world_size() - 1
        if layer == "blocks.0.up" and is_last and next(calls) == 2:
            raise RuntimeError("planted")
        whole(activations, layer, inputs)

    calls = itertools.count()
    with mock.patch.object(Activations, "see_input", failing):
        return as_rows(train(DistributedDataParallel(model()), own_part, steps=4))


def sequence_parallel_gives_up(directory: Path) -> Result:
    """Ranks add up partial sums of gradients, whatever has failed on one of them."""
    trained = _sequence_parallel()
    with _failing_norms(call=3):
        probe = train(trained, steps=5)
    bare = _sequence_parallel()
    optimizer = adamw(bare)
    for step in range(5):
        bare(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = zip(trained.parameters(), bare.parameters(), strict=True)
    is_unchanged = all(torch.equal(p.to_local(), q.to_local()) for p, q in pairs if isinstance(p, DTensor))
    return {"is_unchanged": is_unchanged, "records": as_rows(probe)}


@contextmanager
def _failing_norms(call: int) -> Iterator[None]:
    """On the last rank, the n-th time that norms of gradients or weights are computed fails."""
    whole, calls = parameter_gradients.tensor_norms_by_device, itertools.count(1)

    def failing(tensors: list[Tensor]) -> list[tuple[list[int], Tensor]]:
        if next(calls) == call and dist.get_rank() == dist.get_world_size() - 1:
            raise torch.OutOfMemoryError("planted")
        return whole(tensors)

    with mock.patch.object(parameter_gradients, "tensor_norms_by_device", failing):
        yield


def grad_scaler(directory: Path) -> Result:
    return _with_grad_scaler(DistributedDataParallel(model()))


def fsdp_with_grad_scaler(directory: Path) -> Result:
    return _with_grad_scaler(sharded())


def _with_grad_scaler(wrapped: nn.Module) -> Result:
    optimizer, scaler = adamw(wrapped), torch.amp.GradScaler("cpu", init_scale=4.0)
    with probes.attach(wrapped, optimizer, **EVERYTHING) as probe:
        for step in range(2):
            loss = wrapped(own_part(batch(step))).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return as_rows(probe)


def unchanged(directory: Path) -> Result:
    """Whether weights after training with a probe and without are the same, bit by bit."""
    return {
        "ddp": _is_unchanged(lambda: DistributedDataParallel(model())),
        "fsdp": _is_unchanged(sharded),
    }


def _is_unchanged(make_model: Callable[[], nn.Module]) -> bool:
    weights = []
    for is_probed in (True, False):
        wrapped = make_model()
        if is_probed:
            train(wrapped, own_part)
        else:
            optimizer = adamw(wrapped)
            for step in range(3):
                wrapped(own_part(batch(step))).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        weights.append([p.to_local() if isinstance(p, DTensor) else p for p in wrapped.parameters()])
    return all(torch.equal(probed, bare) for probed, bare in zip(*weights, strict=True))


def nan_in_forward(directory: Path) -> Result:
    return _with_nan(_nan_input, step_of_nan=2)


def nan_in_forward_between_activations(directory: Path) -> Result:
    return _with_nan(_nan_input, step_of_nan=4, activations_every=10, details_every=0, attention_every=10)


def nan_in_backward(directory: Path) -> Result:
    return _with_nan(_nan_gradient, step_of_nan=4, activations_every=10, details_every=0, attention_every=10)


def nan_in_backward_of_fsdp(directory: Path) -> Result:
    options = {"activations_every": 10, "details_every": 0, "attention_every": 10}
    return _with_nan(_nan_gradient, step_of_nan=4, wrap=lambda bare: sharded(), **options)


def nan_raises(directory: Path) -> Result:
    return _with_nan(_nan_input, step_of_nan=3, on_divergence="raise")


def nan_raises_when_one_rank_saves(directory: Path) -> Result:
    return _with_nan(_nan_input, step_of_nan=3, on_divergence="raise", saves=True)


def nan_is_skipped(directory: Path) -> Result:
    return _with_nan(_nan_input, step_of_nan=3, on_divergence="skip", same_step=True)


def only_first_writes(directory: Path) -> Result:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = _with_nan(
            _nan_input,
            log_dir=directory / f"run-{dist.get_rank()}",
            on_divergence="warn",
            flight_recorder=8,
            sinks=[probes.sinks.JsonLinesSink(directory / f"run-{dist.get_rank()}.jsonl")],
        )
    told = [w for w in caught if issubclass(w.category, probes.DivergenceWarning)]
    return {**result, "num_warnings": len(told)}


def mixed(directory: Path) -> Result:
    """Ranks log different things: one always, one from step 4 on, one only between recorded steps."""
    wrapped = DistributedDataParallel(model())
    optimizer = adamw(wrapped)
    options = {**EVERYTHING, "every": 2, "activations_every": 2, "details_every": 0, "attention_every": 2}
    with probes.attach(wrapped, optimizer, **options) as probe:
        for step in range(12):
            wrapped(own_part(batch(step))).square().mean().backward()
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


def refused(directory: Path) -> Result:
    """Messages of attach where ranks differ, and of what is not covered."""
    is_first = dist.get_rank() == 0
    watched = DistributedDataParallel(nn.Linear(2, 1))
    of_first, of_second = dist.new_group([0]), dist.new_group([1])
    alone = of_first if is_first else of_second
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    divided = _divided(mesh["tensor"])
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
        "jacobians": message(lambda: probes.attach(sharded(), layer_jacobian_every=1)),
        "replicas": message(lambda: probes.attach(DistributedDataParallel(small, process_group=alone))),
        "divided": message(lambda: probes.attach(DistributedDataParallel(divided, device_mesh=mesh["data"]))),
        "member": "" if is_first else message(lambda: probes.attach(small, process_group=of_first)),
    }
    state = {**watching.state_dict(), "step": 4 + dist.get_rank()}
    messages["step"] = message(lambda: watching.load_state_dict(state))
    watching.close()
    return messages


def unfrozen(directory: Path) -> Result:
    """A layer whose parameters are trained from the third step on."""
    wrapped = DistributedDataParallel(model())
    optimizer = adamw(wrapped)
    options = {**EVERYTHING, "activations_every": 0, "details_every": 0, "attention_every": 0}
    with probes.attach(wrapped, optimizer, **options) as probe:
        for step in range(6):
            wrapped(own_part(batch(step))).square().mean().backward()
            if step < 2:
                wrapped.module.embed.weight.grad = wrapped.module.embed.bias.grad = None
            optimizer.step()
            optimizer.zero_grad()
    return as_rows(probe)


def joined(directory: Path) -> Result:
    """Under a context in which ranks may have different numbers of batches."""
    wrapped = DistributedDataParallel(model())
    try:
        with wrapped.join():
            train(wrapped, own_part)
    except RuntimeError as error:
        return {"message": str(error)}
    return {"message": "nothing was refused"}


def killed(directory: Path) -> Result:
    """The last rank goes without a word."""
    wrapped = DistributedDataParallel(model())
    optimizer = adamw(wrapped)
    sinks = [probes.sinks.JsonLinesSink(directory / f"killed-{dist.get_rank()}.jsonl")]
    with probes.attach(wrapped, optimizer, sinks=sinks, log_dir=directory / "killed") as probe:
        for step in range(100):
            if step == 20 and dist.get_rank() == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            wrapped(own_part(batch(step))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return as_rows(probe)


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
                    time.sleep(20 if dist.get_rank() == dist.get_world_size() - 1 else 0)
                wrapped(own_part(batch(step))).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    except RuntimeError as error:
        return {"seconds": time.monotonic() - asleep_since, "error": str(error)}
    return {}


def sharded(device: str = "cpu", mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    model_in_parts = model().to(device)
    mesh = mesh or init_device_mesh(device, (dist.get_world_size(),))
    for block in model_in_parts.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model_in_parts, mesh=mesh, **options)
    return model_in_parts


def _divided(mesh: Any) -> nn.Module:
    divided = model()
    plan = {
        **dict.fromkeys(("query", "key", "value", "up"), ColwiseParallel()),
        **dict.fromkeys(("out", "down"), RowwiseParallel()),
    }
    for block in divided.blocks:
        parallelize_module(block, mesh, plan)
    return divided


def _with_nan(
    plant: Callable[[nn.Module], None],
    step_of_nan: int = 0,
    saves: bool = False,
    wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel,
    **options: Any,
) -> Result:
    """Trains six steps; the last rank has a NaN in its second block from one of them on."""
    wrapped = wrap(model())
    optimizer = adamw(wrapped)
    result: Result = {"raised_in": None}
    with probes.attach(wrapped, optimizer, **{**EVERYTHING, **options}) as probe:
        for step in range(6):
            if step == step_of_nan and dist.get_rank() == dist.get_world_size() - 1:
                plant(getattr(wrapped, "module", wrapped).blocks[1])
            try:
                part = own_part(batch(step)).to(next(wrapped.parameters()).device)
                wrapped(part).square().mean().backward()
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
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in wrapped.parameters()]
    result["weights_are_finite"] = all(bool(part.isfinite().all()) for part in parts)
    return result


def _nan_input(block: nn.Module) -> None:
    block.up.register_forward_pre_hook(lambda module, args: (args[0] * torch.nan,))


def _nan_gradient(block: nn.Module) -> None:
    block.up.register_forward_hook(
        lambda module, args, output: output.register_hook(lambda gradient: gradient * torch.nan) and None
    )


def main(scenarios: Mapping[str, Callable[[Path], Result]]) -> None:
    """Starts the process group and runs scenarios in it."""
    backend = "gloo"
    if sys.argv[-1].endswith("_on_gpus"):
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(seconds=30))
    run_scenarios(scenarios)
    dist.destroy_process_group()
    leave()


def run_scenarios(scenarios: Mapping[str, Callable[[Path], Result]]) -> None:
    """Runs those that the command line names: DIRECTORY SCENARIO... writes DIRECTORY/SCENARIO-RANK.json."""
    directory, *names = sys.argv[1:]
    for name in names:
        result = scenarios[name](Path(directory))
        (Path(directory) / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(result))


def leave() -> None:
    """Ends the process without ending the interpreter.

    DTensor's caches keep a mesh's process group whatever is destroyed, and gloo's threads with it. One that
    lets go of a tensor only while the interpreter ends asks for the GIL, for which Python unwinds the thread
    through a destructor: "terminate called without an active exception". Nothing can wait for those threads.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(globals())

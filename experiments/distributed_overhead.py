r"""What probes cost on several GPUs: DDP and FSDP2 training with them against bare training, interleaved.

Every configuration trains its own copy of the model. In each round all of them take their turn, in an order
that rotates: 33 steps that are not timed, in which a fresh probe meets every kind of step, the ranks agree on
what they exchange and TensorBoard's first pictures are drawn, then --steps-per-round timed ones. A turn lasts
as long as its slowest rank. One round goes before the --rounds that count.
Reported is the median over rounds of the ratio to bare training in the same round, with a 95 % bootstrap
interval; "bare, a second copy" shows what no difference looks like. Not timed are steps of `details_every`,
and pictures, which the first rank draws whenever the number of recorded steps has doubled: turns of up to 30
steps hold none.

    torchrun --nproc-per-node 2 -m experiments.distributed_overhead --device cuda
    torchrun --nproc-per-node 2 -m experiments.distributed_overhead --preset tiny --rounds 1

The first rank writes `distributed_overhead.json` below --out and prints the table.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import probes
from experiments.command_line import (
    add_device,
    check_device,
    experiment_parser,
    positive_int,
    report_console,
    run_facts,
    write_json,
)
from experiments.overhead_report import Kind, overhead_table, overheads
from experiments.overhead_training import LEARNING_RATE, TOKEN_MODELS, Training, token_trainings

DEFAULT_OUT = Path("runs/distributed-overhead")
# One of every kind (steps 0 and 10 are special), and past the pictures after 16 and 32 recorded steps: in a
# short turn they would cost more than all the rest; a million steps have twenty.
UNTIMED_STEPS = 33
BARE, SECOND, PROBED = "bare", "bare, a second copy", "probes, attention every 10th step"
KINDS: dict[str, Kind] = {BARE: "bare", SECOND: "bare", PROBED: "ours"}
PRESETS = ("160m-tokens", "tiny")


def wrap_ddp(model: nn.Module, device: str) -> nn.Module:
    """The model on every rank, gradients averaged."""
    return DistributedDataParallel(
        model, device_ids=[torch.cuda.current_device()] if device == "cuda" else None
    )


def wrap_fsdp(model: nn.Module, device: str) -> nn.Module:
    """The model divided between the ranks, block by block."""
    for block in model.get_submodule("blocks").children():
        fully_shard(block)
    fully_shard(model)
    return model


WRAPPINGS: dict[str, Callable[[nn.Module, str], nn.Module]] = {"ddp": wrap_ddp, "fsdp2": wrap_fsdp}


def distributed_trainings(wrapping: str, preset: str, device: str, batch_size: int) -> Callable[[], Training]:
    """Trainings of this rank, on other sequences of the longest length than the other ranks'.

    Args:
        wrapping: A key of `WRAPPINGS`.
        preset: One of `PRESETS`.
        device: "cpu" or "cuda".
        batch_size: Sequences a step and rank.

    Returns:
        A function that makes equal trainings.
    """
    make_training = token_trainings(device, TOKEN_MODELS[preset], batch_size)

    def make() -> Training:
        training = make_training()
        model = WRAPPINGS[wrapping](training.model, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        return Training(model, optimizer, training.loss_of, steps_done=dist.get_rank())

    return make


def time_turn(training: Training, steps: int, device: str, log_dir: Path | None) -> float:
    """Seconds of the timed steps of one turn, on the slowest rank.

    Args:
        training: Whose turn it is.
        steps: How many are timed.
        device: "cpu" or "cuda".
        log_dir: Where probes write; None: there are none.
    """
    if log_dir is None:
        return _time_steps(training, steps, device, lambda loss: None)
    with probes.attach(
        training.model, training.optimizer, log_dir=log_dir, on_divergence="ignore", attention_every=10
    ) as probe:
        return _time_steps(training, steps, device, lambda loss: probe.log(loss=loss))


def _time_steps(training: Training, steps: int, device: str, watch: Callable[[torch.Tensor], None]) -> float:
    for _ in range(UNTIMED_STEPS):
        training.step(watch)
    gc.collect()  # as in `overhead_benchmark.time_turn`
    _wait_for_all(device)
    started = time.perf_counter()
    for _ in range(steps):
        training.step(watch)
    _wait_for_all(device)
    seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def _wait_for_all(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def measure(wrapping: str, options: argparse.Namespace, scratch: Path) -> dict[str, list[float]]:
    """All rounds of one wrapping.

    Args:
        wrapping: A key of `WRAPPINGS`.
        options: The command line.
        scratch: Where probes write.

    Returns:
        Name → seconds per turn, round by round.
    """
    names = list(KINDS)
    make_training = distributed_trainings(wrapping, options.preset, options.device, options.batch_size)
    trainings = {name: make_training() for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(options.rounds + 1):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            log_dir = scratch / f"{wrapping}-{number}" if name == PROBED else None
            taken = time_turn(trainings[name], options.steps_per_round, options.device, log_dir)
            if number:  # in the first round, allocators and caches find their size
                seconds[name].append(taken)
    return seconds


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags; argparse exits with status 2 on a bad one."""
    parser = experiment_parser("distributed_overhead", __doc__)
    add = parser.add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="160m-tokens",
        help="160m-tokens: language model with 160M parameters, 8,192 tokens a rank; tiny is for tests",
    )
    add_device(parser, help_text="cuda: NCCL and bfloat16; cpu: gloo")
    add("--batch-size", type=positive_int, default=1, help="sequences a step and rank (default 1)")
    add("--wrappings", nargs="+", choices=WRAPPINGS, default=list(WRAPPINGS), help="default both")
    add("--rounds", type=positive_int, default=5, help="turns of each configuration that count (default 5)")
    add("--steps-per-round", type=positive_int, default=30, help="timed steps of a turn (default 30)")
    add("--out", type=Path, default=DEFAULT_OUT, help=f"where to write (default {DEFAULT_OUT})")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    if "LOCAL_RANK" not in os.environ:
        parser.error(
            "start it with torchrun: torchrun --nproc-per-node 2 -m experiments.distributed_overhead"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report. Exit status 0."""
    options = parse_arguments(arguments)
    started = time.time()
    torch.set_num_threads(1)
    if options.device == "cuda":
        gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(gpu)
        dist.init_process_group("nccl", device_id=gpu)  # or every barrier asks for it
    else:
        dist.init_process_group("gloo")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            seconds = {name: measure(name, options, Path(scratch)) for name in options.wrappings}
        if dist.get_rank() == 0:
            _report(seconds, options, run_facts("distributed_overhead", arguments, started, options.device))
    finally:
        dist.destroy_process_group()
    return 0


def _report(
    seconds: dict[str, dict[str, list[float]]], options: argparse.Namespace, facts: dict[str, object]
) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    console = report_console()
    num_ranks = dist.get_world_size()
    measured = {name: overheads(turns, KINDS, options.steps_per_round) for name, turns in seconds.items()}
    for wrapping, of_wrapping in measured.items():
        title = f"Cost of watching: {wrapping}, {options.preset}, {num_ranks} ranks, {options.device}"
        note = (
            f"{options.rounds} rounds of {options.steps_per_round} steps, batch {options.batch_size} a rank."
        )
        console.print(overhead_table(of_wrapping, title, note))
    path = options.out / "distributed_overhead.json"
    content = {
        "schema_version": 1,
        **facts,
        "ranks": num_ranks,
        "rounds": options.rounds,
        "steps_per_round": options.steps_per_round,
        "batch_size": options.batch_size,
        "overheads": {name: [asdict(each) for each in found] for name, found in measured.items()},
        "seconds_per_turn": seconds,
    }
    write_json(path, content)
    console.print(f"Written: {path}")


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Not sys.exit: after FSDP2, threads of gloo outlive their group and can abort an interpreter that ends.
    os._exit(status)

r"""What probes cost: training with them and with peers against bare training, interleaved in one process.

Every configuration trains its own copy of the model on the same batches. In each round all of them take
their turn, in an order that rotates from round to round, each attached for its turn only: a warm-up step,
then --steps-per-round timed ones; two hundred hold each default period of the probes a whole number of times.
Shorter turns see less of a clock that drifts; probes go on counting from turn to turn, so that all rounds
together hold their rare steps.
Reported is the median over rounds of the ratio to bare training in the same round, with a 95 % bootstrap
interval, and the ratio of all rounds together. "bare, a second copy" shows what no difference looks like.

    python -m experiments.overhead_benchmark --rounds 5       # one CPU thread, on a machine left alone
    python -m experiments.overhead_benchmark --contenders "bare*" "idle*" "detached*" \
        --rounds 50 --steps-per-round 10
    PYTHONPATH=. python -m experiments.overhead_benchmark --preset 160m-tokens --device cuda
    PYTHONPATH=. python -m experiments.overhead_benchmark --preset 160m --mechanism sigmoid --device cuda

Writes `overhead.json` and `overhead.png` below --out. Ctrl-C reports the rounds that were completed (exit
status 130).
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import torch

from experiments.cell_transformer import MECHANISMS
from experiments.command_line import (
    add_device,
    add_threads,
    check_device,
    experiment_parser,
    fail,
    positive_int,
    progress_bar,
    report_console,
    run_facts,
    write_json,
)
from experiments.overhead_contenders import BARE, Contender, contenders, missing_peers
from experiments.overhead_report import draw_figure, overhead_table, overheads
from experiments.overhead_training import TOKEN_MODELS, Training, cell_trainings, token_trainings

DEFAULT_OUT = Path("runs/overhead")
DEFAULT_STEPS = 200  # the longest of the periods of probes.attach, a multiple of the others

# Makes the trainings of a preset, from device, mechanism and batch size.
PRESETS: dict[str, Callable[[str, str, int], Callable[[], Training]]] = {
    "small": lambda device, mechanism, batch: token_trainings(device, TOKEN_MODELS["small"], batch),
    "160m": lambda device, mechanism, batch: cell_trainings(device, "160m", 8192, mechanism, batch),
    "160m-tokens": lambda device, mechanism, batch: token_trainings(
        device, TOKEN_MODELS["160m-tokens"], batch
    ),
    "tiny": lambda device, mechanism, batch: token_trainings(device, TOKEN_MODELS["tiny"], batch),
    "tiny-cells": lambda device, mechanism, batch: cell_trainings(device, "tiny", 32, mechanism, batch),
}
DEFAULT_BATCH_SIZES = {"small": 8, "160m": 1, "160m-tokens": 1, "tiny": 8, "tiny-cells": 1}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
PRESETS_WITH_MECHANISMS = ("160m", "tiny-cells")


def time_turn(
    contender: Contender, training: Training, steps: int, device: str, clock: Callable[[], float]
) -> float:
    """One turn of a contender.

    Args:
        contender: What watches.
        training: Its copy.
        steps: Timed steps, after one that is not.
        device: Waited for before and after, if "cuda".
        clock: Gives the time in seconds.

    Returns:
        Seconds of the timed steps.
    """
    with contender.watch(training) as watch:
        training.step(watch)
        # Attaching anew at each turn leaves garbage that a training does not have. Python would clear it away
        # in the middle of somebody's turn, a few hundred milliseconds long.
        gc.collect()
        _wait_for(device)
        started = clock()
        for _ in range(steps):
            training.step(watch)
        _wait_for(device)
        return clock() - started


def measure(
    competitors: Sequence[Contender],
    make_training: Callable[[], Training],
    *,
    rounds: int,
    steps: int,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
    on_turn: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """All rounds, or those that Ctrl-C leaves complete.

    A peer that cannot watch this model is left out from then on.

    Args:
        competitors: Who takes part.
        make_training: Makes each one's copy.
        rounds: How often each has its turn, after a first round that is not counted.
        steps: Timed steps of a turn.
        device: "cpu" or "cuda".
        clock: Gives the time in seconds.
        on_turn: Called with the contender's name before each turn.

    Returns:
        Name → seconds per turn, round by round, as many for each; name of each peer that failed → its error.
    """
    failed: dict[str, str] = {}
    trainings = {contender.name: make_training() for contender in competitors}
    seconds: dict[str, list[float]] = {contender.name: [] for contender in competitors}
    try:
        for number in range(rounds + 1):
            first = number % len(competitors)
            this_round = {}
            for contender in [*competitors[first:], *competitors[:first]]:
                name = contender.name
                on_turn(name)
                if name in failed:
                    continue
                try:
                    this_round[name] = time_turn(contender, trainings[name], steps, device, clock)
                except Exception as error:
                    if contender.kind != "peer":
                        raise
                    failed[name] = repr(error)
                    del seconds[name]
            if number:  # in the first, allocators and caches find their size
                for name, value in this_round.items():
                    seconds[name].append(value)
    except KeyboardInterrupt:
        pass
    return seconds, failed


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags; argparse exits with status 2 on a bad one."""
    parser = experiment_parser("overhead_benchmark", __doc__)
    add = parser.add_argument
    add(
        "--preset",
        choices=PRESETS,
        default="small",
        help="small: language model on torch's fused attention, 3.45M parameters, 8 × 128 tokens; "
        "160m-tokens: the same with 160M, 8,192 tokens; 160m: the stress test's model, 8,192 tokens; the "
        "tiny ones are for tests (default small)",
    )
    add_device(parser, help_text="cuda trains under bfloat16 autocast")
    add(
        "--batch-size",
        type=positive_int,
        help="sequences or cells a step (default 8; 1 of cells and at 160m)",
    )
    add("--mechanism", choices=MECHANISMS, default="softmax", help="attention of 160m (default softmax)")
    add("--contenders", nargs="+", metavar="PATTERN", help="only those, beside bare (default all)")
    add("--rounds", type=positive_int, default=20, help="turns of each configuration (default 20)")
    add(
        "--steps-per-round",
        type=positive_int,
        default=DEFAULT_STEPS,
        help=f"timed steps of a turn; where probes record, a multiple of {DEFAULT_STEPS} (the default)",
    )
    add(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="processor: time of the process on the CPU, which other programs disturb less (default wall)",
    )
    add_threads(parser)
    add("--out", type=Path, default=DEFAULT_OUT, help=f"where to write (default {DEFAULT_OUT})")
    options = parser.parse_args(arguments)
    if options.batch_size is None:
        options.batch_size = DEFAULT_BATCH_SIZES[options.preset]
    if options.mechanism != "softmax" and options.preset not in PRESETS_WITH_MECHANISMS:
        parser.error(f"--mechanism {options.mechanism} needs --preset 160m; {options.preset} is softmax.")
    if options.clock == "processor" and options.device != "cpu":
        parser.error("--clock processor does not see what a GPU does; use it with --device cpu.")
    check_device(parser, options.device)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report. Exit status: 0, 130 after Ctrl-C, 2 if nothing can be written to --out."""
    options = parse_arguments(arguments)
    console = report_console()
    torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return fail("overhead_benchmark", error)
    started = time.time()
    with tempfile.TemporaryDirectory() as scratch, progress_bar(console) as progress:
        competitors = [c for c in contenders(Path(scratch)) if c.name == BARE or _is_wanted(c.name, options)]
        task = progress.add_task("", total=(options.rounds + 1) * len(competitors))
        seconds, failed = measure(
            competitors,
            PRESETS[options.preset](options.device, options.mechanism, options.batch_size),
            rounds=options.rounds,
            steps=options.steps_per_round,
            device=options.device,
            clock=CLOCKS[options.clock],
            on_turn=lambda name: progress.update(task, description=name, advance=1),
        )
    num_rounds = len(seconds[BARE])
    if not num_rounds:
        console.print("Interrupted before the first round was complete; nothing is measured.")
        return 130

    kinds = {contender.name: contender.kind for contender in competitors}
    measured = overheads(seconds, kinds, options.steps_per_round)
    title = f"Cost of watching: {options.preset}, {options.mechanism}, {options.device}, {options.clock} time"
    note = f"{num_rounds} rounds of {options.steps_per_round} steps, batch {options.batch_size}."
    if missing := missing_peers():
        note += f" Not installed: {', '.join(missing)}."
    if failed:
        note += f" Failed on this model: {', '.join(failed)}."
    json_path, figure_path = options.out / "overhead.json", options.out / "overhead.png"
    write_json(
        json_path,
        {
            "schema_version": 1,
            **run_facts("overhead_benchmark", arguments, started, options.device),
            "rounds": num_rounds,
            "steps_per_round": options.steps_per_round,
            "batch_size": options.batch_size,
            "overheads": [asdict(overhead) for overhead in measured],
            "missing_peers": missing,
            "failed_peers": failed,
            "seconds_per_turn": seconds,
        },
    )
    draw_figure(figure_path, measured, title)
    console.print(overhead_table(measured, title, note))
    console.print(f"Written: {json_path}, {figure_path}")
    if num_rounds < options.rounds:
        console.print(f"Interrupted: {num_rounds} of {options.rounds} rounds measured.")
        return 130
    return 0


def _is_wanted(name: str, options: argparse.Namespace) -> bool:
    return options.contenders is None or any(fnmatch(name, pattern) for pattern in options.contenders)


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())

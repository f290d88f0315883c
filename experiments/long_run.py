"""One planned run, or a piece of it: from its checkpoint if there is one, to its end or until time is up.

A piece ends at the run's last step, at a loss that is no finite number, or when its time is up or SIGTERM
comes; the last two leave a checkpoint for the next piece. A checkpoint of 160 million parameters takes 2 GB
and stays on its machine; what is carried home is the file of records, which is written however a piece ends.

    python -m experiments.long_run rate-1e-3-softmax-seed0 --minutes 9 --device cuda

One run of `experiments.stress_plan` by hand; `experiments.stress_queue` works through many of them.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiments.cell_pool import CellPool, real_pool, synthetic_pool
from experiments.command_line import (
    add_device,
    add_threads,
    check_device,
    experiment_parser,
    fail,
    positive_float,
)
from experiments.expression_values import ValueTask
from experiments.gene_ranks import RankTask
from experiments.provenance import provenance
from experiments.resumable_training import ResumableTraining
from experiments.run_config import RunConfig
from experiments.run_records import read_facts, write_run
from experiments.stress_plan import SCALES, planned_runs

TRAIN_CELLS, VALIDATION_CELLS = 2048, 32
DEFAULT_CELLS = Path("runs/cells.npz")
DEFAULT_WORK = Path("runs/long")


def pool_of(config: RunConfig, cells: Path) -> CellPool:
    """The cells of a run.

    Args:
        config: The run.
        cells: A file of `python -m experiments.prepare_cells`, read where the run asks for real cells.

    Returns:
        The pool, the same for every run of its length and data.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if config.data == "cells":
        return real_pool(cells, tokens=config.tokens, num_train=TRAIN_CELLS, num_validation=VALIDATION_CELLS)
    num_genes = config.tokens * 5 // 4
    return synthetic_pool(num_genes=num_genes, num_train=TRAIN_CELLS, num_validation=VALIDATION_CELLS)


def task_of(config: RunConfig, pool: CellPool) -> RankTask | ValueTask:
    """The task of a run."""
    sizes = {"batch_size": config.batch_size, "tokens": config.tokens, "seed": config.seed}
    if config.task == "ranks":
        return RankTask(pool, **sizes)
    return ValueTask(pool, **sizes, is_heavy_tailed=config.task == "counts")


class RunPaths(NamedTuple):
    """Where a run's files are.

    Attributes:
        checkpoint: What the next piece reads; gone when the run is finished.
        records: What is carried home.
        log: What the run's process printed.
    """

    checkpoint: Path
    records: Path
    log: Path

    @classmethod
    def of(cls, name: str, work: Path) -> RunPaths:
        """The paths of a run, by its name, below a directory."""
        return cls(*(work / f"{name}.{suffix}" for suffix in ("pt", "npz", "log")))


def finished_facts(config: RunConfig, work: Path) -> dict[str, Any] | None:
    """What the records of a run say, if it is finished.

    Args:
        config: The run.
        work: Directory of checkpoints and records.

    Returns:
        The facts; None of a run that is yet to begin or to be continued.

    Raises:
        ValueError: The records are of a run with another configuration.
    """
    path = RunPaths.of(config.name, work).records
    if not path.exists():
        return None
    facts = read_facts(path)
    if facts["config"] != json.loads(json.dumps(asdict(config))):  # where tuples are lists
        raise ValueError(
            f"{path} is of a run with another configuration than the plan's. Remove it, or give "
            "another --work."
        )
    return facts if facts["is_finished"] else None


def train_piece(
    config: RunConfig,
    *,
    cells: Path,
    work: Path,
    device: str,
    minutes: float,
    on_step: Callable[[int], None] = lambda step: None,
) -> bool:
    """One piece of a run, from its checkpoint if there is one: train, then write checkpoint and records.

    The records are written of a run that fails or is interrupted, too, as far as it came; SIGTERM ends the
    piece like its time. Signals are handled on the main thread, so call it there.

    Args:
        config: The run.
        cells: See `pool_of`.
        work: Directory of checkpoints and records.
        device: "cpu" or "cuda".
        minutes: Time for training in this piece; writing comes on top.
        on_step: See `ResumableTraining.run`.

    Returns:
        Whether the run is finished; its checkpoint is then removed.
    """
    deadline = time.monotonic() + 60 * minutes
    work.mkdir(parents=True, exist_ok=True)
    paths = RunPaths.of(config.name, work)
    training = ResumableTraining(config, task_of(config, pool_of(config, cells)), device)
    is_finished = False
    with sigterm_stops(training):
        try:
            with training.probe:
                if paths.checkpoint.exists():
                    training.load(paths.checkpoint)
                is_finished = training.run(deadline, on_step)
                if not is_finished:
                    training.save(paths.checkpoint)
        finally:
            if training.step > 0:  # otherwise an earlier piece's records say more
                facts = {**training.facts(is_finished=is_finished), **provenance(device)}
                write_run(paths.records, facts, training.table.arrays())
    if is_finished:
        paths.checkpoint.unlink(missing_ok=True)
    return is_finished


@contextmanager
def sigterm_stops(training: ResumableTraining) -> Iterator[None]:
    """Let SIGTERM end a piece like its time; on the main thread alone."""
    before = signal.signal(signal.SIGTERM, lambda *_: training.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one planned run, or a piece of it. Exit status: 0, 2 for input that cannot be used."""
    parser = experiment_parser("long_run", __doc__)
    add_training_flags(parser)
    parser.add_argument("name", help="of a run in `python -m experiments.stress_plan`")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    runs = planned_runs(options.preset)
    if options.name not in runs:
        parser.error(f"there is no run {options.name!r} in the plan; its runs are {', '.join(runs)}")
    torch.set_num_threads(options.threads)
    _, config = runs[options.name]
    try:
        is_finished = train_piece(
            config, cells=options.cells, work=options.work, device=options.device, minutes=options.minutes
        )
    except (OSError, ValueError) as error:
        return fail("long_run", error)
    print(f"{config.name}: {'finished' if is_finished else 'to be continued by the same command'}")
    return 0


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that a single run and the queue have in common."""
    add = parser.add_argument
    add("--preset", choices=SCALES, default="160m", help="160m is the plan; the others try it on a CPU")
    add_device(parser)
    add("--minutes", type=positive_float, default=9.0, help="training time of this call (default 9)")
    add("--cells", type=Path, default=DEFAULT_CELLS, help=f"prepared cells (default {DEFAULT_CELLS})")
    add(
        "--work",
        type=Path,
        default=DEFAULT_WORK,
        help=f"checkpoints and records (default {DEFAULT_WORK}); runs found there are continued. A "
        "checkpoint of 160m takes 2 GB: it can be continued as long as its machine is held, and cannot be "
        "taken along",
    )
    add_threads(parser, "CPU threads of a run (default 1)")


if __name__ == "__main__":
    sys.exit(main())

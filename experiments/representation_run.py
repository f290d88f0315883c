"""One run of the representation experiment, or a piece of it: training, then embeddings of held-out cells.

    python -m experiments.representation_run --dataset pbmc3k_human_blood --mechanism sigmoid --seed 0 \
        --rate 1e-3 --device cuda

`experiments.representations` works through all of them. A run that its time is too short for leaves a
checkpoint, and the same command continues it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.cell_pool import CellPool
from experiments.cell_transformer import MECHANISMS
from experiments.command_line import (
    add_device,
    add_threads,
    check_device,
    experiment_parser,
    fail,
    positive_float,
)
from experiments.length_batches import LengthAwareRankTask
from experiments.long_run import RunPaths, sigterm_stops
from experiments.prepare_representations import DEFAULT_OUT
from experiments.provenance import provenance
from experiments.representation_data import PreparedCells, read_prepared
from experiments.representation_plan import NUM_SEEDS, SCALES, RepresentationConfig, run_config
from experiments.representation_training import PatientTraining, training_of
from experiments.run_records import Arrays, write_run
from probes.record import ALL_LAYERS, Series

DEFAULT_WORK = Path("runs/representations")
UNTRAINED_SEEDS = 3  # of so many of the seeds the untrained embeddings are kept, too: they fill half a file


def train_piece(
    config: RepresentationConfig, data: PreparedCells, *, work: Path, device: str, minutes: float
) -> bool:
    """A piece of a run, from its checkpoint if there is one; the last piece writes the run's file.

    SIGTERM ends the piece like its time; a run that has ended by then still writes its file. Signals are
    handled on the main thread, so call it there.

    Args:
        config: The run.
        data: Its data set.
        work: Folder of checkpoints and results.
        device: "cpu" or "cuda".
        minutes: Time for training in this piece.

    Returns:
        Whether the run is finished.
    """
    deadline = time.monotonic() + 60 * minutes
    work.mkdir(parents=True, exist_ok=True)
    paths = RunPaths.of(config.name, work)
    pool = CellPool(data.side(data.split.is_train), data.side(data.split.is_validation))
    # Cells to judge stand where validation cells do in training: ranked by its medians, masked alike for all.
    judged = LengthAwareRankTask(
        CellPool(pool.train, data.side(data.split.is_test)),
        batch_size=config.batch_size,
        tokens=config.tokens,
        seed=0,
    )
    is_final = config.purpose == "final"
    arrays: Arrays = {}
    with ExitStack() as signals:  # which outlast the training, until its file is written
        with training_of(config, pool, device) as training:
            signals.enter_context(sigterm_stops(training))
            if is_final and config.seed % NUM_SEEDS < UNTRAINED_SEEDS:
                arrays |= _embeddings(training, judged, "untrained")
            if paths.checkpoint.exists():
                training.load(paths.checkpoint)
            if not training.run(deadline):
                training.save(paths.checkpoint)
                return False
        training.take_best()
        facts = {**_facts(training), **provenance(device)}
        arrays |= _kept_records(training.table.arrays())
        if is_final:
            losses, counts = training.cell_losses(judged)
            facts["held_out_loss"] = float(losses.sum() / counts.sum())
            facts |= {"split": data.split.rule, "source": data.cells.source, "is_control": data.is_control}
            arrays |= _embeddings(training, judged, "embeddings") | held_out_names(data)
            arrays |= {"losses": losses.astype(np.float32), "hidden": counts.astype(np.uint16)}
        write_run(paths.records, facts, arrays)
        paths.checkpoint.unlink(missing_ok=True)
    return True


def held_out_names(data: PreparedCells) -> Arrays:
    """Types of the held-out cells, and their donors or batches where these are told."""
    is_test = data.split.is_test
    names = {"labels": np.asarray(data.side(is_test).labels)}
    return names if data.groups is None else {**names, "groups": data.groups[is_test]}


def _embeddings(training: PatientTraining, judged: LengthAwareRankTask, name: str) -> Arrays:
    """Held-out cells in half precision: eleven bits are more than what bfloat16 computed them with.

    With them the mean over the training cells, about which directions are judged.
    """
    return {
        name: training.embed(judged.validation).astype(np.float16),
        f"{name}_centre": training.embed(judged.train).mean(axis=0),
    }


def _facts(training: PatientTraining) -> dict[str, Any]:
    tokens, padded = training.task.tokens_trained(training.step)
    return {
        **training.facts(is_finished=True),
        "best_step": training.best_step,
        "validation_loss": training.best_loss,
        "tokens": tokens,
        "tokens_per_second": tokens / training.seconds,
        "padding": 1 - tokens / padded if padded else 0.0,
        "is_diverged": training.is_diverged,
        "is_stopped_by_patience": training.step < training.config.steps and not training.is_diverged,
    }


def _kept_records(arrays: Arrays) -> Arrays:
    """Loss, gradient norm, attention and Adam's steps of whole layers: a tenth of what the probes record."""
    names = [Series(*fields) for fields in json.loads(str(arrays["names"]))]
    kept = [
        i
        for i, series in enumerate(names)
        if series.head is None
        and (
            series.quantity.startswith("attention/")
            or series.quantity == "adam_update_rms"  # tells of layers that are frozen
            or (series.layer == ALL_LAYERS and series.quantity in ("loss", "grad_norm"))
        )
    ]
    is_kept = np.isin(arrays["series"], kept)
    return {
        **arrays,
        "step": arrays["step"][is_kept],
        "series": np.searchsorted(kept, arrays["series"][is_kept]).astype(np.uint16),
        "value": arrays["value"][is_kept],
        "names": np.array(json.dumps([list(names[i]) for i in kept])),
    }


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that a single run and all of them have in common."""
    add = parser.add_argument
    add("--preset", choices=SCALES, default="full", help="laptop ends in minutes (default full, the plan)")
    add_device(parser)
    add("--minutes", type=positive_float, default=9.0, help="time for training of this call (default 9)")
    add(
        "--work",
        type=Path,
        default=DEFAULT_WORK,
        help=f"checkpoints and the runs' files (default {DEFAULT_WORK}); what is there is continued",
    )
    add_threads(parser, "CPU threads of a run (default 1)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one run, or a piece of it. Exit status: 0, 2 for input that cannot be used."""
    parser = experiment_parser("representation_run", __doc__)
    add_training_flags(parser)
    add = parser.add_argument
    add("--prepared", type=Path, default=DEFAULT_OUT, help=f"cells (default {DEFAULT_OUT})")
    add("--dataset", required=True, help="of the prepared file")
    add("--mechanism", choices=MECHANISMS, required=True, help="of attention")
    add("--rate", type=positive_float, required=True, help="learning rate")
    add("--seed", type=int, required=True, help="of initial weights, order of cells and masks")
    add("--purpose", choices=["selection", "final"], default="final", help="selection tries the rate")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    torch.set_num_threads(options.threads)
    try:
        data = read_prepared(options.prepared, options.dataset)
        config = run_config(
            options.preset, options.dataset, options.mechanism, options.purpose,
            seed=options.seed, learning_rate=options.rate, data_digest=data.digest,
        )  # fmt: skip
        is_finished = train_piece(
            config, data, work=options.work, device=options.device, minutes=options.minutes
        )
    except (OSError, ValueError) as error:
        return fail("representation_run", error)
    print(f"{config.name}: {'finished' if is_finished else 'to be continued by the same command'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

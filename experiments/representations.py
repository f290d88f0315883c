"""Does sigmoid attention learn better representations of cells? All runs of the experiment, in pieces.

On two CPU cores, one data set, one seed and both mechanisms, a few minutes:

    python -m experiments.representations --datasets cortexculture_human_fetal_brain --preset laptop --seeds 1
    python -m experiments.representations_report runs/representations/results --out runs/report

A file of your own: --data FILE --label COLUMN, and --group COLUMN with its donors or batches. The whole plan,
on a GPU machine that has neither the data nor anndata (docs/representations.md), until nothing is left:

    python -m experiments.prepare_representations --out cells.npz            # before, where the data are
    python -m experiments.representations --prepared cells.npz --device cuda --minutes 8.8 --out results

First learning rates are tried, then final runs follow with the rate of the lowest validation loss, seed by
seed. The models are small and wait for the host, so several share a device. Each call continues what the one
before left in --work, and writes the runs that it finished into --out as it goes: archives, and `done.json`.
On another machine, --done with that file goes on from there. SIGTERM ends a call like its time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.command_line import check_device, experiment_parser, fail, positive_int
from experiments.long_run import RunPaths
from experiments.prepare_representations import add_data_flags, chosen_datasets, prepare
from experiments.representation_data import (
    PreparedCells,
    check_files,
    prepared_names,
    read_prepared,
    write_prepared,
)
from experiments.representation_plan import NUM_SEEDS, RepresentationConfig
from experiments.representation_progress import Plan, Progress
from experiments.representation_run import add_training_flags, held_out_names
from experiments.run_records import RecordTable, read_facts, write_run
from experiments.side_by_side import Running, SideBySide, only_queue, sigterm_exits
from experiments.stress_archives import Archives

# Python, torch and CUDA start before a run's first step: no run is begun that would see little more.
START_SECONDS = 20
# What a run may take beyond the call's end to write its checkpoint, and once more when it is told to stop.
GRACE_SECONDS = 30.0
DONE = "done.json"


class Queue:
    """The runs of one call.

    Args:
        plan: Which runs there are.
        progress: Which of them are finished.
        options: The command line's.
        began: When the call began, in seconds since the epoch.
        num_gpus: Over how many devices runs are spread; 0 without.
    """

    def __init__(
        self, plan: Plan, progress: Progress, options: argparse.Namespace, *, began: float, num_gpus: int
    ) -> None:
        self.plan, self.progress, self.options = plan, progress, options
        self.processes = SideBySide(options.side_by_side, num_gpus, options.threads)
        self.ends = began + 60 * options.minutes
        stamp = time.strftime("%H%M%S", time.gmtime(began))
        self.archives = Archives(options.out, stamp, options.work / "carried.json")
        self.failed: list[str] = []
        self._waiting = self._unfinished()
        self._carry()  # what an earlier call had no room for, and baselines

    def work(self) -> None:
        """Keep every place busy until time is up or nothing is left."""
        try:
            while time.time() < self.ends + GRACE_SECONDS:
                self._collect(self.processes.ended())
                while self._waiting and self.ends - time.time() > START_SECONDS:
                    if not (slots := self.processes.free_slots()):
                        break
                    self._start(self._waiting.pop(0), slots)
                if not self.processes.running:
                    return
                time.sleep(0.2)
        finally:
            self._collect(self.processes.stop(GRACE_SECONDS), is_told=True)

    def _carry(self) -> None:
        """Put finished runs that were not carried home yet into the archives, then say which are in them."""
        files = [file for file in self.options.work.glob("*.npz") if file.stem not in self.progress.unusable]
        for file in sorted(files, key=lambda file: file.stat().st_mtime):
            self.archives.add(file, 1)  # written when a run is finished: there are no parts of one
        carried = {file.stem for file in files} - {file.stem for file in self.archives.left_out}
        self.progress.write(self.options.out / DONE, carried)

    def _unfinished(self) -> list[RepresentationConfig]:
        loss_of = self.progress.validation_loss
        open_runs = [config for config in self.plan.known(loss_of) if loss_of(config) is None]
        busy = {run.name for run in self.processes.running} | set(self.failed) | self.progress.unusable.keys()
        return [config for config in open_runs if config.name not in busy]

    def _start(self, config: RepresentationConfig, slots: list[int]) -> None:
        options = self.options
        command: list[Any] = [sys.executable, "-m", "experiments.representation_run"]
        command += ["--dataset", config.dataset, "--mechanism", config.mechanism]
        command += ["--rate", config.learning_rate, "--preset", options.preset, "--device", options.device]
        command += ["--prepared", options.prepared[config.dataset], "--work", options.work]
        command += ["--threads", options.threads, "--minutes", f"{(self.ends - time.time()) / 60:.3f}"]
        command += ["--seed", config.seed, "--purpose", config.purpose]
        self.processes.start(config.name, command, slots, RunPaths.of(config.name, options.work).log)

    def _collect(self, ended: Sequence[Running], *, is_told: bool = False) -> None:
        """Take up what the runs that ended leave; those that were told to end have not failed."""
        for run in ended:
            status = run.process.returncode
            print(f"{time.strftime('%H:%M:%S')} {run.name}: ended with status {status}", flush=True)
            if status and not is_told:
                self.failed.append(run.name)
                print(run.last_words(), flush=True)
        if ended:  # the last trial of a rate makes other runs known
            self._waiting = self._unfinished()
            self._carry()


def write_baseline(data: PreparedCells, dataset: str, work: Path) -> None:
    """The baseline's embeddings as the file of a run, so that a report needs nothing but runs.

    Args:
        data: The data set.
        dataset: Its name.
        work: Folder of the finished runs.

    Raises:
        ValueError: There is a file of other cells, or of another split.
    """
    path = work / f"{dataset}-pca.npz"
    config = {"name": path.stem, "dataset": dataset, "mechanism": "pca", "purpose": "baseline"}
    config["data_digest"] = data.digest
    if path.exists():
        if read_facts(path)["config"] != config:
            raise ValueError(f"{path} is of other cells or another split. Give another --work.")
        return
    facts = {
        "config": config,
        "split": data.split.rule,
        "source": data.cells.source,
        "is_control": data.is_control,
    }
    centre = np.zeros(data.pca.shape[1], np.float32)  # components are about the training cells' mean
    arrays = {"embeddings": data.pca, "embeddings_centre": centre, **held_out_names(data)}
    write_run(path, facts, {**RecordTable().arrays(), **arrays})


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the data sets as `chosen`; argparse exits with status 2 on a bad one."""
    parser = experiment_parser("representations", __doc__)
    add_training_flags(parser)
    add_data_flags(parser)
    add = parser.add_argument
    add("--prepared", type=Path, help="read the cells from this file of `prepare_representations`")
    add("--seeds", type=positive_int, default=NUM_SEEDS, help=f"final runs of each (default {NUM_SEEDS})")
    add(
        "--done", type=Path, nargs="+", default=[],
        help=f"{DONE} of an earlier machine, or archives: their runs are not repeated",
    )  # fmt: skip
    add("--out", type=Path, help="archives of finished runs (default: results below --work)")
    add("--side-by-side", type=positive_int, default=1, help="runs that share a device (default 1)")
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    options.out = options.out or options.work / "results"
    options.chosen = chosen_datasets(parser, options)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train for one call and write its results.

    Exit status: 0, 1 if a run failed, 2 for input that cannot be used.
    """
    options = parse_arguments(arguments)
    began = time.time()
    try:
        options.work.mkdir(parents=True, exist_ok=True)
        options.out.mkdir(parents=True, exist_ok=True)
        with only_queue(options.work), sigterm_exits():
            return _work(options, began)
    except (OSError, ValueError, ImportError) as error:
        return fail("representations", error)


def _work(options: argparse.Namespace, began: float) -> int:
    options.prepared = _prepared(options)
    digests = {}
    for dataset, prepared in options.prepared.items():
        data = read_prepared(prepared, dataset)
        digests[dataset] = data.digest
        write_baseline(data, dataset, options.work)
    plan, progress = Plan(options.preset, digests, options.seeds), Progress(options.work, options.done)
    num_gpus = torch.cuda.device_count() if options.device == "cuda" else 0
    queue = Queue(plan, progress, options, began=began, num_gpus=num_gpus)
    try:
        queue.work()
    finally:
        loss_of = progress.validation_loss
        finished = [config for config in plan.known(loss_of) if loss_of(config) is not None]
        print(f"{len(finished)} of {plan.size(loss_of)} runs are finished; archives in {options.out}.")
        if left_out := queue.archives.left_out:
            print(f"{len(left_out)} runs had no room in the archives; the next call carries them.")
    return 1 if queue.failed or progress.unusable else 0


def _prepared(options: argparse.Namespace) -> dict[str, Path]:
    """The prepared file of each data set; without --prepared, one is written for each."""
    chosen = {dataset.name: dataset for dataset in options.chosen}
    if options.prepared is not None:
        there = prepared_names(options.prepared)
        if missing := [name for name in chosen if name not in there]:
            raise ValueError(
                f"Expected {', '.join(missing)} in {options.prepared}; it holds {', '.join(there)}. Prepare "
                "it anew, or leave them out with --datasets."
            )
        return dict.fromkeys(chosen, options.prepared)
    check_files(options.chosen)
    files = {}
    for name, dataset in chosen.items():
        files[name] = options.work / f"{name}.prepared"
        write_prepared(files[name], {name: prepare(dataset)})
    return files


if __name__ == "__main__":
    sys.exit(main())

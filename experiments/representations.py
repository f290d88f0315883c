"""Does sigmoid attention learn better representations of cells? All runs of the experiment, in pieces.

On two CPU cores, one data set, one seed and both mechanisms, a few minutes:

    python -m experiments.representations --datasets cortexculture_human_fetal_brain --preset laptop --seeds 1
    python -m experiments.representations_report runs/representations/results --out runs/report

A file of your own: --data FILE --label COLUMN, and --group COLUMN with its donors or batches. The whole plan,
on a GPU machine that has neither the data nor anndata (docs/representations.md), until nothing is left:

    python -m experiments.prepare_representations --out cells.npz            # before, where the data are
    python -m experiments.representations --prepared cells.npz --device cuda --minutes 8.8 --out results

First each learning rate of the grid is tried, then final runs follow with the rate of the lowest validation
loss, seed by seed. The models are small and wait for the host, so several share a device. Each call continues
what the one before left in --work, and writes the runs that it finished into --out, archives, as it goes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.command_line import check_device, experiment_parser, fail, positive_int
from experiments.long_run import RunPaths, finished_facts
from experiments.prepare_representations import add_data_flags, chosen_datasets, prepare
from experiments.representation_data import (
    check_files,
    prepared_names,
    read_prepared,
    write_prepared,
)
from experiments.representation_plan import (
    NUM_SEEDS,
    SCALES,
    RepresentationConfig,
    best_rate,
    pairs,
    run_config,
    selection_runs,
)
from experiments.representation_run import add_training_flags
from experiments.run_records import RecordTable, write_run
from experiments.side_by_side import SideBySide
from experiments.stress_archives import Archives

# Python, torch and CUDA start before a run's first step: no run is begun that would see little more.
START_SECONDS = 20
GRACE_SECONDS = 5


@dataclass(frozen=True)
class Plan:
    """Which runs there are.

    Attributes:
        scale: A key of `SCALES`.
        datasets: Names, of the prepared file.
        num_seeds: Final runs of each data set and mechanism.
    """

    scale: str
    datasets: Sequence[str]
    num_seeds: int

    @property
    def size(self) -> int:
        """Number of runs."""
        rates = len(SCALES[self.scale].learning_rates)
        return len(list(pairs(self.datasets))) * (rates + self.num_seeds)

    def known(self, work: Path) -> Iterator[RepresentationConfig]:
        """The runs that can be named by now: of final ones, those whose learning rate has been chosen.

        Args:
            work: Folder of the finished runs.

        Yields:
            Runs in order: grids first, then seed by seed, so that what is cut is the last seeds of all.
        """
        rates: dict[tuple[str, str], float] = {}
        for dataset, mechanism in pairs(self.datasets):
            losses = {}
            grid = selection_runs(self.scale, dataset, mechanism)
            for config in grid:
                yield config
                if (facts := finished_facts(config, work)) is not None:
                    losses[config.learning_rate] = float(facts["validation_loss"])
            if len(losses) == len(grid):
                rates[dataset, mechanism] = best_rate(losses)
        for seed in range(self.num_seeds):
            for dataset, mechanism in pairs(self.datasets):
                if (rate := rates.get((dataset, mechanism))) is not None:
                    yield run_config(self.scale, dataset, mechanism, "final", seed=seed, learning_rate=rate)


class Queue:
    """The runs of one call.

    Args:
        plan: Which runs there are.
        options: The command line's.
        began: When the call began, in seconds since the epoch.
        num_gpus: Over how many devices runs are spread; 0 without.
    """

    def __init__(self, plan: Plan, options: argparse.Namespace, *, began: float, num_gpus: int) -> None:
        self.plan, self.options = plan, options
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
            while True:
                self._collect()
                while self._waiting and self.ends - time.time() > START_SECONDS:
                    if not (slots := self.processes.free_slots()):
                        break
                    self._start(self._waiting.pop(0), slots)
                if not self.processes.running:
                    return
                time.sleep(0.2)
        finally:
            self.processes.stop(GRACE_SECONDS)

    def _carry(self) -> None:
        """Put finished runs that were not carried home yet into the archives."""
        for file in sorted(self.options.work.glob("*.npz"), key=lambda file: file.stat().st_mtime):
            self.archives.add(file, 1)  # written when a run is finished: there are no parts of one

    def _unfinished(self) -> list[RepresentationConfig]:
        busy = {run.name for run in self.processes.running} | set(self.failed)
        return [
            config
            for config in self.plan.known(self.options.work)
            if config.name not in busy and finished_facts(config, self.options.work) is None
        ]

    def _start(self, config: RepresentationConfig, slots: list[int]) -> None:
        options = self.options
        command: list[Any] = [sys.executable, "-m", "experiments.representation_run"]
        command += ["--dataset", config.dataset, "--mechanism", config.mechanism]
        command += ["--rate", config.learning_rate, "--preset", options.preset, "--device", options.device]
        command += ["--prepared", options.prepared[config.dataset], "--work", options.work]
        command += ["--threads", options.threads, "--minutes", f"{(self.ends - time.time()) / 60:.3f}"]
        if config.purpose == "final":
            command += ["--seed", config.seed]
        self.processes.start(config.name, command, slots, RunPaths.of(config.name, options.work).log)

    def _collect(self) -> None:
        ended = self.processes.ended()
        for run in ended:
            status = run.process.returncode
            print(f"{time.strftime('%H:%M:%S')} {run.name}: ended with status {status}", flush=True)
            if status:
                self.failed.append(run.name)
                print(run.last_words(), flush=True)
        if ended:  # the end of a grid makes final runs known
            self._waiting = self._unfinished()
            self._carry()


def write_baseline(prepared: Path, dataset: str, work: Path) -> None:
    """The baseline's embeddings as the file of a run, so that a report needs nothing but runs.

    Args:
        prepared: Of `python -m experiments.prepare_representations`.
        dataset: Of that file.
        work: Folder of the finished runs.
    """
    path = work / f"{dataset}-pca.npz"
    if path.exists():
        return
    data = read_prepared(prepared, dataset)
    facts = {
        "config": {"name": path.stem, "dataset": dataset, "mechanism": "pca", "purpose": "baseline"},
        "split": data.split.rule,
        "source": data.cells.source,
        "is_control": data.is_control,
    }
    labels = np.asarray(data.side(data.split.is_test).labels)
    write_run(path, facts, {**RecordTable().arrays(), "embeddings": data.pca, "labels": labels})


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the data sets as `chosen`; argparse exits with status 2 on a bad one."""
    parser = experiment_parser("representations", __doc__)
    add_training_flags(parser)
    add_data_flags(parser)
    add = parser.add_argument
    add("--prepared", type=Path, help="read the cells from this file of `prepare_representations`")
    add("--seeds", type=positive_int, default=NUM_SEEDS, help=f"final runs of each (default {NUM_SEEDS})")
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
        options.prepared = _prepared(options)
        for dataset, prepared in options.prepared.items():
            write_baseline(prepared, dataset, options.work)
        num_gpus = torch.cuda.device_count() if options.device == "cuda" else 0
        plan = Plan(options.preset, list(options.prepared), options.seeds)
        queue = Queue(plan, options, began=began, num_gpus=num_gpus)
    except (OSError, ValueError, ImportError) as error:
        return fail("representations", error)
    queue.work()
    finished = [config for config in plan.known(options.work) if finished_facts(config, options.work)]
    print(f"{len(finished)} of {plan.size} runs are finished; archives in {options.out}.")
    if left_out := queue.archives.left_out:
        print(f"{len(left_out)} runs had no room in the archives; the next call carries them.")
    return 1 if queue.failed else 0


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

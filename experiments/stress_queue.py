"""Works through the plan's runs in pieces, several side by side, inside one lease of a GPU machine.

    python -m experiments.stress_queue --session 1 --device cuda --minutes 8.8 --out results

Each call trains for --minutes and leaves checkpoints behind; the same command again continues them. No run
begins that the lease (which started with the first call) cannot see the end of, except those that the plan
lets be cut. Every call writes the records that it added to into --out, a few archives, with the ledger of
all runs so far. Checkpoints stay in --work: a run that a lost machine cuts counts as far as its last
archive, and begins anew.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from experiments.command_line import check_device, experiment_parser, positive_float, positive_int
from experiments.long_run import RunPaths, add_training_flags
from experiments.run_config import RunConfig
from experiments.run_records import read_run
from experiments.stress_ledger import write_ledger
from experiments.stress_plan import LEASE_MINUTES, START_SECONDS, Question, estimated_seconds, planned_runs

ARCHIVE_BYTES = 15 * 2**20


@dataclass
class Running:
    """One run under way.

    Attributes:
        name: Of the run.
        slot: Which of the places side by side it has.
        process: Its process.
    """

    name: str
    slot: int
    process: subprocess.Popen[bytes]


class Queue:
    """The runs of one call, from the first start to the last end.

    Args:
        runs: What is to be done, in this order.
        options: The command line's.
        num_slots: How many runs are trained side by side.
        num_gpus: Over how many devices they are spread; 0 without.
        lease_ends: In seconds since the epoch.
    """

    def __init__(
        self,
        runs: dict[str, tuple[Question, RunConfig]],
        options: argparse.Namespace,
        *,
        num_slots: int,
        num_gpus: int,
        lease_ends: float,
    ) -> None:
        self.runs, self.options = runs, options
        self.num_slots, self.num_gpus = num_slots, num_gpus
        self.lease_ends = lease_ends
        self.call_ends = min(time.time() + 60 * options.minutes, lease_ends)
        self.running: list[Running] = []
        self.failed: list[str] = []
        self.pace = self._measured_pace()
        # A finished run has records and no checkpoint; so has one that another machine cut, which is let be.
        self.waiting = [name for name in runs if self._is_cut(name) or not self._paths(name).records.exists()]

    def work(self) -> None:
        """Keep every slot busy until the call's time is up or nothing is left that could be begun."""
        try:
            while True:
                self._collect()
                free = sorted(set(range(self.num_slots)) - {run.slot for run in self.running})
                for slot in free:
                    if (name := self._next()) is not None:
                        self._start(name, slot)
                if not self.running:
                    return
                time.sleep(0.2)
        finally:
            for run in self.running:
                run.process.terminate()

    def _next(self) -> str | None:
        now = time.time()
        if self.call_ends - now < START_SECONDS:
            return None
        for name in self.waiting:
            question, config = self.runs[name]
            seconds = START_SECONDS + estimated_seconds(config) * self.pace
            if self._is_cut(name) or question.may_be_cut or now + seconds <= self.lease_ends:
                return name
        return None

    def _start(self, name: str, slot: int) -> None:
        options = self.options
        self.waiting.remove(name)
        minutes = (self.call_ends - time.time()) / 60
        command: list[Any] = [sys.executable, "-m", "experiments.long_run", name]
        command += ["--preset", options.preset, "--device", options.device, "--minutes", f"{minutes:.3f}"]
        command += ["--cells", options.cells, "--work", options.work, "--threads", options.threads]
        environment = dict(os.environ)
        if self.num_gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % self.num_gpus)
        with (options.work / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
        self.running.append(Running(name, slot, process))
        print(f"{time.strftime('%H:%M:%S')} slot {slot}: {name}", flush=True)

    def _collect(self) -> None:
        for run in list(self.running):
            if (status := run.process.poll()) is None:
                continue
            self.running.remove(run)
            self.pace = self._measured_pace()
            print(f"{time.strftime('%H:%M:%S')} slot {run.slot}: {run.name} ended ({status})", flush=True)
            if status:
                self.failed.append(run.name)
                log = self.options.work / f"{run.name}.log"
                print(log.read_text(errors="replace")[-3000:], flush=True)

    def _measured_pace(self) -> float:
        """Measured over estimated training time, from the runs that are finished."""
        ratios = []
        for name, (_, config) in self.runs.items():
            records = self._paths(name).records
            if records.exists() and not self._is_cut(name):
                facts = read_run(records).facts
                share = facts["steps"] / config.steps  # below 1 where the loss was no finite number
                ratios.append(facts["seconds"] / (share * estimated_seconds(config)))
        return median(ratios) if ratios else 1.0

    def _is_cut(self, name: str) -> bool:
        return self._paths(name).checkpoint.exists()

    def _paths(self, name: str) -> RunPaths:
        return RunPaths.of(name, self.options.work)


def pack(files: Sequence[Path], out: Path, stamp: str) -> list[Path]:
    """Put files into archives of at most `ARCHIVE_BYTES` each (a larger file has one of its own).

    Args:
        files: Compressed already.
        out: Folder of the archives.
        stamp: Part of their names.

    Returns:
        The archives.
    """
    groups: list[list[Path]] = []
    size = 0
    for file in files:
        if not groups or size + file.stat().st_size > ARCHIVE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.stat().st_size
    archives = []
    for number, group in enumerate(groups):
        archives.append(out / f"runs-{stamp}-{number}.zip")
        with zipfile.ZipFile(archives[-1], "w", zipfile.ZIP_STORED) as archive:
            for file in group:
                archive.write(file, file.name)
    return archives


def main(arguments: Sequence[str] | None = None) -> int:
    """Train for one call and write its results.

    Args:
        arguments: Command line without the program name; None reads `sys.argv`.

    Returns:
        Exit status: 0, 1 if a run failed, 2 for input that cannot be used.
    """
    options = parse_arguments(arguments)
    began = time.time()
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    lease = options.work / "lease"  # its age is that of the first call on this machine
    if not lease.exists():
        lease.touch()
    lease_ends = lease.stat().st_mtime + 60 * options.lease_minutes
    num_gpus = torch.cuda.device_count() if options.device == "cuda" else 0
    queue = Queue(
        options.planned,
        options,
        num_slots=options.side_by_side * max(1, num_gpus),
        num_gpus=num_gpus,
        lease_ends=lease_ends,
    )
    queue.work()
    records = [RunPaths.of(name, options.work).records for name in options.planned]
    changed = [file for file in records if file.exists() and file.stat().st_mtime >= began]
    archives = pack(changed, options.out, time.strftime("%H%M%S", time.gmtime(began)))
    if any(file.exists() for file in records):
        print(write_ledger([file for file in records if file.exists()], options.out))
    left = [name for name in options.planned if not _is_finished(name, options.work)]
    print(f"{len(archives)} archives in {options.out}. Left: {', '.join(left) or 'nothing'}.")
    return 1 if queue.failed else 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the chosen runs as `planned`.

    Args:
        arguments: Command line without the program name; None reads `sys.argv`.

    Returns:
        The settings; argparse exits with status 2 on a bad one.
    """
    parser = experiment_parser("stress_queue", __doc__)
    add_training_flags(parser)
    add = parser.add_argument
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--session", nargs="+", type=int, help="sessions of the plan (default: all, in order)"
    )
    chosen.add_argument("--runs", nargs="+", help="names of runs, in place of sessions")
    add("--out", type=Path, default=Path("runs/results"), help="archives and ledger (default runs/results)")
    add("--side-by-side", type=positive_int, default=2, help="runs that share a device (default 2)")
    add(
        "--lease-minutes",
        type=positive_float,
        default=LEASE_MINUTES,
        help=f"how long the machine is held from the first call on (default {LEASE_MINUTES:g})",
    )
    options = parser.parse_args(arguments)
    check_device(parser, options.device)
    runs = planned_runs(options.preset)
    if options.runs and (unknown := set(options.runs) - runs.keys()):
        parser.error(f"the plan has no runs {sorted(unknown)}; it has {', '.join(runs)}")
    options.planned = {
        name: (question, config)
        for name, (question, config) in runs.items()
        if (not options.runs or name in options.runs)
        and (not options.session or question.session in options.session)
    }
    if not options.planned:
        parser.error(f"the plan has no session {options.session}")
    needs_cells = any(config.data == "cells" for _, config in options.planned.values())
    if needs_cells and not options.cells.is_file():
        parser.error(
            f"there are no prepared cells at {options.cells}; where ../shared/cells is, run "
            f"`python -m experiments.prepare_cells --out {options.cells}` and take the file along"
        )
    return options


def _is_finished(name: str, work: Path) -> bool:
    paths = RunPaths.of(name, work)
    return paths.records.exists() and not paths.checkpoint.exists()


if __name__ == "__main__":
    sys.exit(main())

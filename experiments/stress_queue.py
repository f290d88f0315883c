"""Works through the plan's runs in pieces, several side by side on each GPU, within the lease of a machine.

    python -m experiments.stress_queue --session 1 --device cuda --minutes 8 --lease-minutes 27 --out results

Each call trains for --minutes and leaves checkpoints behind; the same command again continues them. With
--lease-minutes, counted from the first call in --work, no run begins that the lease cannot see the end of,
except those that the plan lets be cut. The records of a run go into --out when it is finished, those of runs
that were cut at the end of the call, with the ledger of all runs so far. Checkpoints stay in --work: a run
that a lost machine cuts begins anew. SIGTERM ends a call like its time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from experiments.command_line import check_device, experiment_parser, fail, positive_float, positive_int
from experiments.long_run import RunPaths, add_training_flags, finished_facts
from experiments.run_config import RunConfig
from experiments.run_records import read_facts
from experiments.side_by_side import Running, SideBySide, only_queue, sigterm_exits
from experiments.stress_archives import Archives
from experiments.stress_ledger import write_ledger
from experiments.stress_plan import SIDE_BY_SIDE, START_SECONDS, estimated_seconds, planned_runs
from experiments.stress_questions import Question

# What a run may take beyond the call's end to write its checkpoint, and once more when it is told to stop.
GRACE_SECONDS = 60.0


class Queue:
    """The runs of one call, from the first start to the last end.

    Args:
        runs: What is to be done, in this order, but what was cut before goes first.
        options: The command line's.
        archives: Get the records of the runs.
        num_gpus: Over how many devices they are spread; 0 without.
        lease_ends: In seconds since the epoch.
    """

    def __init__(
        self,
        runs: dict[str, tuple[Question, RunConfig]],
        options: argparse.Namespace,
        archives: Archives,
        *,
        num_gpus: int,
        lease_ends: float,
    ) -> None:
        self.runs, self.options, self.archives = runs, options, archives
        self.lease_ends = lease_ends
        self.places = SideBySide(options.side_by_side, num_gpus, options.threads)
        self.call_ends = min(time.time() + 60 * options.minutes, lease_ends)
        self.failed: list[str] = []
        self.finished = self._finished()
        waiting = [name for name in runs if name not in self.finished]
        self.waiting = sorted(waiting, key=lambda name: not self._is_cut(name))

    def work(self) -> None:
        """Keep every slot busy until the call's time is up or nothing is left that could be begun."""
        try:
            while time.time() < self.call_ends + GRACE_SECONDS:
                self._collect(self.places.ended())
                while (start := self._next()) is not None:
                    self._start(*start)
                if not self.places.running:
                    return
                time.sleep(0.2)
        finally:
            # They write a checkpoint first, if they can.
            self._collect(self.places.stop(GRACE_SECONDS), is_told=True)
            for _, config in self.runs.values():  # what was cut, or had no room before; most important first
                records = self._paths(config).records
                if records.exists():
                    self.archives.add(records, read_facts(records)["steps"])

    def _next(self) -> tuple[str, list[int]] | None:
        """What to start now, and on which slots."""
        now = time.time()
        if self.call_ends - now < START_SECONDS:
            return None
        pace = self._measured_pace()
        for name in self.waiting:
            question, _ = self.runs[name]
            seconds = START_SECONDS + self._estimated_seconds(name) * pace
            may_begin = self._is_cut(name) or question.may_be_cut or now + seconds <= self.lease_ends
            width = self.places.per_gpu if self._is_alone(question) else 1
            if may_begin and (slots := self.places.free_slots(width)):
                return name, slots
        return None

    def _start(self, name: str, slots: list[int]) -> None:
        options, paths = self.options, self._paths(self.runs[name][1])
        self.waiting.remove(name)
        minutes = (self.call_ends - time.time()) / 60
        command: list[Any] = [sys.executable, "-m", "experiments.long_run", name]
        command += ["--preset", options.preset, "--device", options.device, "--minutes", f"{minutes:.3f}"]
        command += ["--cells", options.cells, "--work", options.work, "--threads", options.threads]
        self.places.start(name, command, slots, paths.log)
        self._say(slots, name)

    def _collect(self, ended: Sequence[Running], *, is_told: bool = False) -> None:
        """Take up what the runs that ended leave; those that were told to end have not failed."""
        for run in ended:
            status = run.process.returncode
            self._say(run.slots, f"{run.name} ended ({status})")
            _, config = self.runs[run.name]
            if (facts := finished_facts(config, self.options.work)) is not None:
                self.finished[run.name] = facts
                self.archives.add(self._paths(config).records, facts["steps"])
            elif status and not is_told:
                self.failed.append(run.name)
                print(run.last_words(), flush=True)

    def _finished(self) -> dict[str, dict[str, Any]]:
        facts = {name: finished_facts(config, self.options.work) for name, (_, config) in self.runs.items()}
        return {name: known for name, known in facts.items() if known is not None}

    def _measured_pace(self) -> float:
        """Measured over estimated training time, from the runs that are finished."""
        ratios = []
        for name, facts in self.finished.items():
            share = facts["steps"] / self.runs[name][1].steps  # below 1 where the loss was no finite number
            ratios.append(facts["seconds"] / (share * self._estimated_seconds(name)))
        return median(ratios) if ratios else 1.0

    def _estimated_seconds(self, name: str) -> float:
        question, config = self.runs[name]
        return estimated_seconds(config, 1 if self._is_alone(question) else self.options.side_by_side)

    def _is_alone(self, question: Question) -> bool:
        return question.takes_whole_gpu and self.places.num_gpus > 1

    def _is_cut(self, name: str) -> bool:
        return self._paths(self.runs[name][1]).checkpoint.exists()

    def _paths(self, config: RunConfig) -> RunPaths:
        return RunPaths.of(config.name, self.options.work)

    def _say(self, slots: list[int], text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {self.places.place(slots)}: {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train for one call and write its results.

    Exit status: 0, 1 if a run failed, 2 for input that cannot be used.
    """
    options = parse_arguments(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with only_queue(options.work):
            return _work(options)
    except (OSError, ValueError) as error:
        return fail("stress_queue", error)


def _work(options: argparse.Namespace) -> int:
    stamp = time.strftime("%H%M%S", time.gmtime())
    archives = Archives(options.out, stamp, options.work / "carried.json")
    num_gpus = torch.cuda.device_count() if options.device == "cuda" else 0
    lease_ends = _lease_ends(options)
    queue = Queue(options.planned, options, archives, num_gpus=num_gpus, lease_ends=lease_ends)
    try:
        with sigterm_exits():
            queue.work()
    finally:
        records = [RunPaths.of(config.name, options.work).records for _, config in options.planned.values()]
        if written := [file for file in records if file.exists()]:
            print(write_ledger(written, options.out))
        left = [name for name in options.planned if name not in queue.finished]
        print(f"{len(archives.paths)} archives in {options.out}. Left: {', '.join(left) or 'nothing'}.")
        if archives.left_out:
            names = ", ".join(file.name for file in archives.left_out)
            print(f"No room in this call's archives for {names}; the next call carries them.")
        if queue.failed:
            print(f"Failed: {', '.join(queue.failed)}.")
    return 1 if queue.failed else 0


def _lease_ends(options: argparse.Namespace) -> float:
    """In seconds since the epoch; the lease begins with the first call that names one."""
    if options.lease_minutes is None:
        return float("inf")
    lease = options.work / "lease"
    if not lease.exists():
        lease.touch()
    ends = lease.stat().st_mtime + 60 * options.lease_minutes
    left = (ends - time.time()) / 60
    if left > 0:
        print(f"{left:.1f} minutes of the lease are left.", flush=True)
    else:
        print(
            f"The lease of {options.lease_minutes:g} minutes is over since {-left:.1f} minutes: nothing "
            f"begins. Remove {lease} for a new one, or leave --lease-minutes out.",
            flush=True,
        )
    return ends


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the chosen runs as `planned`; argparse exits with status 2 on a bad one."""
    parser = experiment_parser("stress_queue", __doc__)
    add_training_flags(parser)
    add = parser.add_argument
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--session", nargs="+", type=int, help="sessions of the plan (default: all, in order)"
    )
    chosen.add_argument("--runs", nargs="+", help="names of runs, in place of sessions")
    add("--out", type=Path, default=Path("runs/results"), help="archives and ledger (default runs/results)")
    add("--side-by-side", type=positive_int, default=SIDE_BY_SIDE, help="runs that share a GPU (default 2)")
    add(
        "--lease-minutes",
        type=positive_float,
        help="how long the machine is held from the first call on: what would outlast it is not begun "
        "(default: no end)",
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


if __name__ == "__main__":
    sys.exit(main())

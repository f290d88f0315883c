"""Processes side by side on the GPUs of one machine, a bounded number on each; how a queue of them ends."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Every thread pool of a process; the processes fill the machine, not their threads.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Running:
    """One run under way.

    Attributes:
        name: Of the run.
        slots: Which of the places side by side it has.
        process: Its process.
        log: File with what it printed.
    """

    name: str
    slots: list[int]
    process: subprocess.Popen[bytes]
    log: Path

    def last_words(self, characters: int = 3000) -> str:
        """The end of what it printed."""
        return self.log.read_text(errors="replace")[-characters:]


class SideBySide:
    """Places for processes. Slot i is on GPU i // per_gpu, so that a pair begun together shares a GPU.

    Args:
        per_gpu: How many processes a GPU has, or the CPU where there is none.
        num_gpus: Over how many GPUs they are spread; 0 without.
        threads: CPU threads of each process.
    """

    def __init__(self, per_gpu: int, num_gpus: int, threads: int) -> None:
        self.per_gpu, self.num_gpus, self.threads = per_gpu, num_gpus, threads
        self.num_slots = per_gpu * max(1, num_gpus)
        self.running: list[Running] = []

    def free_slots(self, width: int = 1) -> list[int]:
        """The first free places for one process: `width` of them on one GPU, or none."""
        taken = {slot for run in self.running for slot in run.slots}
        for first in range(0, self.num_slots, width):
            slots = list(range(first, first + width))
            if not taken.intersection(slots):
                return slots
        return []

    def start(self, name: str, command: Sequence[object], slots: list[int], log: Path) -> None:
        """Begin a process that sees one GPU.

        Args:
            name: Of the run.
            command: Program and arguments.
            slots: Of `free_slots`.
            log: Gets what it prints, after what is there.
        """
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        if self.num_gpus > 0:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            gpus = visible.split(",") if visible else [str(gpu) for gpu in range(self.num_gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slots[0] // self.per_gpu]
        with log.open("ab") as file:
            process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, env=environment)
        self.running.append(Running(name, slots, process, log))

    def ended(self) -> list[Running]:
        """The processes that have ended since the last call; their places are free."""
        gone = [run for run in self.running if run.process.poll() is not None]
        self.running = [run for run in self.running if run not in gone]
        return gone

    def stop(self, grace_seconds: float) -> list[Running]:
        """Tell all that still run to end, and end those that do not.

        Args:
            grace_seconds: How long they may take.

        Returns:
            As `ended`.
        """
        for run in self.running:
            run.process.terminate()
        ends = time.monotonic() + grace_seconds
        for run in self.running:
            try:
                run.process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                run.process.kill()
                run.process.wait()
        return self.ended()

    def place(self, slots: list[int]) -> str:
        """Where a process runs, in words."""
        gpu = f"GPU {slots[0] // self.per_gpu}" if self.num_gpus else "CPU"
        return f"{gpu}, slot {slots[0]}"


@contextmanager
def only_queue(work: Path) -> Iterator[None]:
    """Keep other queues out of a folder of checkpoints: two would write over each other's.

    Args:
        work: The folder.

    Raises:
        BlockingIOError: Another queue works in it.
    """
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(f"another queue works in {work}; wait for its end") from error
        yield


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Let SIGTERM end the program the way Ctrl-C does, through every `finally`."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

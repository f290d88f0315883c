"""Trains and is killed, again and again: the program behind test_kill.py.

``python -m tests.probes.killed_trainings DIRECTORY DELAY...`` forks one training a delay, in DIRECTORY/0 and
so on, and kills it that many seconds later. It prints, a JSON line each, when each of its steps ended, in
seconds before the kill.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import struct
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import probes
from probes.sinks import JsonLinesSink
from stability.divergence import Alert, Readings

MAX_STEPS = 20_000


class Alarm:
    """Speaks every 120 steps, so that incidents are being written."""

    def update(self, step: int, readings: Readings) -> list[Alert]:
        is_time = step % 120 == 40
        return [Alert(step, "0", "grad_norm", "divergence", 1.0, None, "it is time.")] if is_time else []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


QUIET: dict[str, Any] = {"detectors": [Alarm()], "on_divergence": "ignore"}


def attach(directory: Path) -> tuple[nn.Module, torch.optim.Optimizer, probes.Probe]:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sinks = [JsonLinesSink(directory / "run.jsonl")]
    probe = probes.attach(model, optimizer, log_dir=directory, sinks=sinks, **QUIET)
    return model, optimizer, probe


def train(directory: Path, ends: mmap.mmap, num_steps: int = MAX_STEPS) -> None:
    """Trains, until it is killed as a rule; notes when each step ended."""
    model, optimizer, probe = attach(directory)
    for step in range(num_steps):
        optimizer.zero_grad()
        model(torch.ones(4, 8)).square().mean().backward()
        optimizer.step()
        struct.pack_into("d", ends, 8 * step, time.monotonic())
    probe.close()


def main() -> None:
    """Forks and kills."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    train(Path(sys.argv[1]) / "warm-up", mmap.mmap(-1, 8 * MAX_STEPS), num_steps=3)  # what it imports
    for index, delay in enumerate(sys.argv[2:]):
        ends = mmap.mmap(-1, 8 * MAX_STEPS)
        child = os.fork()
        if child == 0:
            try:
                train(Path(sys.argv[1]) / str(index), ends)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        time.sleep(float(delay))
        os.kill(child, signal.SIGKILL)
        killed = time.monotonic()
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit("a training ended before it was killed")
        print(json.dumps([killed - end for (end,) in struct.iter_unpack("d", ends) if end]), flush=True)
        ends.close()


if __name__ == "__main__":
    main()

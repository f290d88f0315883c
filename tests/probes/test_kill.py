"""What ``kill -9`` costs: at most two recorded steps, and no file that cannot be read."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import probes
from tests.probes.killed_trainings import attach

ROOT = Path(__file__).parent.parent.parent
FILES = {"report.md", "report.html", "series.npz", "environment.json", "rng_states.pt"}


def kill(directory: Path, delays: list[float]) -> list[list[float]]:
    """Kills a training after each delay; when its steps had ended, in seconds before the kill."""
    command = [sys.executable, "-m", "tests.probes.killed_trainings", str(directory), *map(str, delays)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    assert not done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def recorded_steps(path: Path) -> list[int]:
    if not path.exists():
        return []
    series = probes.read(path).get("grad_norm/(all)")
    return [] if series is None else series.steps.tolist()


def check(directory: Path, ages: list[float]) -> None:
    """Everything that a killed training left is whole, and nearly all it recorded is there."""
    num_steps = len(ages)
    recorder = directory / "flight_recorder.bin"
    events = next(directory.glob("events.out.tfevents.*"), directory / "none")
    whole_run = recorded_steps(directory) if recorder.exists() else []
    for steps, num_may_be_missing in (
        (recorded_steps(directory / "run.jsonl"), 2),
        (recorded_steps(recorder), 2),
        (recorded_steps(events), 2),
        (whole_run, 2),
    ):
        assert steps == list(range(steps[0], steps[-1] + 1)) if steps else True
        assert num_steps - 1 - (steps[-1] if steps else -1) <= num_may_be_missing
    for folder in directory.glob("incidents/step-*"):
        assert {file.name for file in folder.iterdir()} == FILES
        assert probes.read(folder / "series.npz")["grad_norm/(all)"].steps.size
        json.loads((folder / "environment.json").read_text())
        assert torch.load(folder / "rng_states.pt", weights_only=True)["checkpoint"]["step"] == 0
        assert (folder / "report.html").read_text().endswith("</html>\n")
    take_up_again(directory, num_steps)


def take_up_again(directory: Path, num_steps: int) -> None:
    """A new process goes on in the same directory, and sweeps away what was being written."""
    before = recorded_steps(directory / "flight_recorder.bin")
    model, optimizer, probe = attach(directory)
    probe.load_state_dict({**probe.state_dict(), "step": num_steps})
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    probe.close()
    assert recorded_steps(directory / "flight_recorder.bin") == [*before, num_steps][-512:]
    assert recorded_steps(directory / "run.jsonl")[-1] == num_steps
    names = {path.name for path in directory.rglob("*") if not path.name.startswith(("events.", "step-"))}
    assert names <= FILES | {"run.jsonl", "flight_recorder.bin", "incidents"}


def test_a_killed_training_leaves_what_it_recorded(tmp_path: Path) -> None:
    for index, ages in enumerate(kill(tmp_path, [0.02, 0.6])):
        check(tmp_path / str(index), ages)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    rng = random.Random(0)
    delays = [rng.uniform(0.0, 0.6) for _ in range(75)] + [rng.uniform(1.2, 1.8) for _ in range(25)]
    all_ages = kill(tmp_path, delays)
    for index, ages in enumerate(all_ages):
        check(tmp_path / str(index), ages)
    assert len(all_ages) == 100
    # The kills did come at many moments: while attaching, while training, while an incident was written.
    assert np.unique([len(ages) for ages in all_ages]).size > 30
    assert any(not ages for ages in all_ages)
    assert any((tmp_path / str(index) / "incidents").exists() for index in range(100))

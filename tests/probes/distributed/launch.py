"""Both ends of torchrun: what a test starts and reads, and what its program does on every rank.

A program is a file of this folder, a scenario a function in it that takes a directory. One torchrun
runs many of them, since processes take seconds to start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.probes.distributed.trainings import Rows

Result = dict[str, Any]
Scenarios = Mapping[str, Callable[[Path], Result]]


def launch(
    directory: Path, num_ranks: int, program: str, scenarios: list[str]
) -> subprocess.CompletedProcess[str]:
    """Runs scenarios, one after the other, in one set of processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    module = ["-m", f"tests.probes.distributed.{program}", str(directory), *scenarios]
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *torchrun, *module],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def run(directory: Path, num_ranks: int, program: str, scenarios: list[str]) -> Path:
    """Runs scenarios that have to end well, and returns the directory."""
    finished = launch(directory, num_ranks, program, scenarios)
    assert finished.returncode == 0, finished.stderr[-5000:]
    return directory


def results(directory: Path, num_ranks: int, scenario: str) -> list[Result]:
    """What each rank has written."""
    return [json.loads((directory / f"{scenario}-{rank}.json").read_text()) for rank in range(num_ranks)]


def rows(directory: Path, num_ranks: int, scenario: str) -> Rows:
    """The records, which have to be the same on every rank."""
    first, *others = results(directory, num_ranks, scenario)
    assert all(other == first for other in others)
    return first


def main(scenarios: Scenarios, backend: str = "gloo") -> None:
    """Starts the process group and runs scenarios in it."""
    dist.init_process_group(backend, timeout=timedelta(seconds=30))
    run_scenarios(scenarios)
    dist.destroy_process_group()
    leave()


def run_scenarios(scenarios: Scenarios) -> None:
    """Runs those that the command line names: DIRECTORY SCENARIO... writes DIRECTORY/SCENARIO-RANK.json."""
    directory, *names = sys.argv[1:]
    for name in names:
        result = scenarios[name](Path(directory))
        (Path(directory) / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(result))


def leave() -> None:
    """Ends the process without ending the interpreter.

    DTensor's caches keep a mesh's process group whatever is destroyed, and gloo's threads with it. One that
    lets go of a tensor only while the interpreter ends asks for the GIL, for which Python unwinds the thread
    through a destructor: "terminate called without an active exception". Nothing can wait for those threads.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

"""Running the programs of this folder under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def launch(
    directory: Path, num_ranks: int, scenarios: list[str], *, program: str = "program"
) -> subprocess.CompletedProcess[str]:
    """Runs scenarios, one after the other, in one set of processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    module = ["-m", f"tests.probes.distributed.{program}", str(directory), *scenarios]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        [sys.executable, *torchrun, *module],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def results(directory: Path, num_ranks: int, scenario: str) -> list[dict[str, Any]]:
    """What each rank has written."""
    return [json.loads((directory / f"{scenario}-{rank}.json").read_text()) for rank in range(num_ranks)]

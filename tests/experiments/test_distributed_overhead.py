from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from experiments.distributed_overhead import BARE, PROBED, SECOND, parse_arguments


def test_it_asks_for_torchrun(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit, match="2"):
        parse_arguments([])
    assert "start it with torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_measure_both_wrappings(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = ["--preset", "tiny", "--rounds", "1", "--steps-per-round", "2", "--out", str(tmp_path)]
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, *torchrun, "-m", "experiments.distributed_overhead", *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    written = json.loads((tmp_path / "distributed_overhead.json").read_text())
    assert written["ranks"] == 2
    for wrapping in ("ddp", "fsdp2"):
        assert [overhead["name"] for overhead in written["overheads"][wrapping]] == [BARE, SECOND, PROBED]
        assert all(len(turns) == 1 for turns in written["seconds_per_turn"][wrapping].values())

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from experiments.cell_pool import synthetic_pool
from experiments.expression_values import ValueTask
from experiments.gene_ranks import RankTask
from experiments.long_run import main, pool_of, task_of, train_piece
from experiments.run_config import RunConfig
from experiments.run_records import read_run
from experiments.stress_plan import planned_runs


def test_a_run_of_the_plan_by_hand(tmp_path, capsys):
    name = "tiny-healthy-values-sigmoid-seed2"
    assert main([name, "--preset", "tiny", "--work", str(tmp_path)]) == 0
    assert f"{name}: finished" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.npz"]
    facts = read_run(tmp_path / f"{name}.npz").facts
    assert facts["config"]["seed"] == 2
    assert facts["steps"] == 12
    assert facts["parameters"]["total"] > 0
    assert facts["versions"]["torch"]


@pytest.fixture
def pieces(tmp_path):
    """A piece of a tiny run, with what is to happen after its steps."""
    _, config = planned_runs("tiny")["tiny-rate-1e-3-softmax-seed0"]

    def piece(on_step: Callable[[int], None]) -> bool:
        return train_piece(config, cells=tmp_path, work=tmp_path, device="cpu", minutes=5, on_step=on_step)

    return piece


def test_sigterm_leaves_a_checkpoint_and_records(tmp_path, pieces):
    before = signal.getsignal(signal.SIGTERM)
    assert not pieces(lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == 5 else None)
    assert signal.getsignal(signal.SIGTERM) == before
    records = read_run(tmp_path / "tiny-rate-1e-3-softmax-seed0.npz")
    assert (records.facts["steps"], records.facts["is_finished"]) == (5, False)
    assert len(records.values("loss")) == 5
    seen = []
    assert pieces(seen.append)
    assert seen == list(range(6, 13))
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_keeps_its_records(tmp_path, pieces, error):
    def fail(done: int) -> None:
        if done == 7:
            raise error("out of memory")

    with pytest.raises(error):
        pieces(fail)
    records = read_run(tmp_path / "tiny-rate-1e-3-softmax-seed0.npz")
    assert (records.facts["steps"], records.facts["is_finished"]) == (7, False)
    assert len(records.values("grad_norm")) == 7
    assert records.facts["seconds"] > 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]
    assert pieces(lambda done: None)  # anew


def test_a_checkpoint_that_cannot_be_read_leaves_the_records_alone(tmp_path, pieces):
    pieces(lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == 5 else None)
    (tmp_path / "tiny-rate-1e-3-softmax-seed0.pt").write_bytes(b"no checkpoint")
    with pytest.raises(Exception, match="."):
        pieces(lambda done: None)
    assert read_run(tmp_path / "tiny-rate-1e-3-softmax-seed0.npz").facts["steps"] == 5


def test_cells_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"experiments\.prepare_cells"):
        pool_of(RunConfig("a", "softmax"), tmp_path / "cells.npz")


def test_a_name_that_is_not_in_the_plan(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["no-such-run"])
    assert "there is no run 'no-such-run' in the plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "kind"), [("ranks", RankTask), ("values", ValueTask), ("counts", ValueTask)]
)
def test_tasks(task, kind):
    pool = synthetic_pool(num_genes=20, num_train=8, num_validation=2)
    assert isinstance(task_of(RunConfig("a", "softmax", task=task, tokens=16), pool), kind)

from __future__ import annotations

import pytest

from experiments.cell_pool import synthetic_pool
from experiments.expression_values import ValueTask
from experiments.gene_ranks import RankTask
from experiments.long_run import main, pool_of, task_of
from experiments.run_config import RunConfig
from experiments.run_records import read_run


def test_a_run_of_the_plan_by_hand(tmp_path, capsys):
    name = "healthy-values-sigmoid-seed2"
    assert main([name, "--preset", "tiny", "--work", str(tmp_path)]) == 0
    assert f"{name}: finished" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.npz"]
    facts = read_run(tmp_path / f"{name}.npz").facts
    assert facts["config"]["seed"] == 2
    assert facts["steps"] == 12
    assert facts["parameters"]["total"] > 0
    assert facts["versions"]["torch"]


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

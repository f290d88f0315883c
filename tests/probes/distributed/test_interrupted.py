"""Several ranks that go on from a checkpoint, leave an update out, or stop: together, or as one is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import probes
from tests.probes.distributed.launch import launch, results, run

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without it"),
    pytest.mark.slow,
]

SAVED = 20  # the step at which the programs save


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scenarios = ["restored", "fsdp_restored", "fsdp_skips", "fsdp_raises", "fsdp_raises_in_the_same_step"]
    return run(tmp_path_factory.mktemp("of_two"), 2, "interrupted", scenarios)


@pytest.mark.parametrize("scenario", ["restored", "fsdp_restored"])
def test_a_training_from_a_checkpoint_on_is_the_uninterrupted_one(of_two: Path, scenario: str) -> None:
    first, second = results(of_two, 2, scenario)
    assert first == second
    whole, again = first["whole"], first["again"]
    rest = {name: row for name, row in whole["records"].items() if int(name.split()[0]) >= SAVED}
    assert len(rest) > 500
    assert again["records"] == rest
    (alert,) = again["alerts"]
    assert alert.startswith("step 24: warning in blocks.1.up: weight norm went")
    assert whole["alerts"] == [alert]
    assert first["ends_alike"]


def test_ranks_leave_an_update_out_because_of_a_shard_that_one_of_them_has(of_two: Path) -> None:
    for result in results(of_two, 2, "fsdp_skips"):
        assert result["updated"] == [0, 1, 2, 4, 5]
        (alert,) = result["alerts"]
        assert alert.startswith("step 3: divergence in blocks.1.up: its gradient holds nan")
        assert result["weights_are_finite"]


def test_ranks_raise_together_because_of_a_shard_that_one_of_them_has(of_two: Path) -> None:
    assert [result["raised_in"] for result in results(of_two, 2, "fsdp_raises")] == [4, 4]
    for result in results(of_two, 2, "fsdp_raises_in_the_same_step"):
        assert result["raised_in"] == 3
        assert result["updated"] == [0, 1, 2]
        assert result["weights_are_finite"]


def test_a_killed_rank_ends_the_others_and_leaves_the_records(tmp_path: Path) -> None:
    finished = launch(tmp_path, 2, "interrupted", ["killed"])
    assert finished.returncode != 0
    of_run = probes.read(tmp_path / "killed-0.jsonl")
    assert set(of_run["grad_norm/(all)"].steps.tolist()) >= set(range(19))
    assert "DivergenceError" not in finished.stderr


def test_a_rank_that_hangs_ends_the_others_by_the_timeout(tmp_path: Path) -> None:
    # Nobody has died by then, so it is not torchrun that ends the first rank.
    launch(tmp_path, 2, "interrupted", ["hung"])
    result = json.loads((tmp_path / "hung-0.json").read_text())
    assert 2 < result["seconds"] < 15  # it sleeps for twenty
    assert set(probes.read(tmp_path / "hung-0.jsonl")["grad_norm/(all)"].steps.tolist()) >= set(range(9))

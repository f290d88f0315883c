"""Several ranks that go on from a checkpoint, leave an update out, or stop: all of them alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.probes.distributed.launch import launch, results

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without it"),
    pytest.mark.slow,
]

SAVED = 20  # the step at which the programs save


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("of_two")
    scenarios = ["restored", "fsdp_restored", "fsdp_skips", "fsdp_raises", "fsdp_raises_in_the_same_step"]
    finished = launch(directory, 2, scenarios, program="interrupted")
    assert finished.returncode == 0, finished.stderr[-5000:]
    return directory


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

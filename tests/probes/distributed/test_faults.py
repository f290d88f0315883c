"""A NaN on one rank: who is blamed, and that all ranks act alike and the first writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import probes
from tests.probes.distributed.launch import Result, results, run

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without it")

OF_TWO = [
    "nan_in_forward_between_activations",
    "nan_in_backward",
    "nan_in_backward_of_fsdp",
    "nan_raises_when_one_rank_saves",
    "nan_is_skipped",
    "only_first_writes",
]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is always run."""
    return run(tmp_path_factory.mktemp("few"), 2, "faults", ["nan_in_forward", "nan_raises"])


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("of_two"), 2, "faults", OF_TWO)


def assert_blamed(result: Result, step: int, layer: str, quantity: str) -> None:
    """One alert, of the last of two ranks."""
    [alert] = result["alerts"]
    assert (alert["step"], alert["layer"], alert["rank"]) == (step, layer, 1)
    assert f"({quantity})" in alert["reason"]
    assert alert["reason"].endswith("(first on rank 1).")


def test_a_nan_is_blamed_on_rank_and_layer_on_every_rank(few: Path) -> None:
    for result in results(few, 2, "nan_in_forward"):
        assert_blamed(result, 2, "blocks.1.up", "activation_rms")


def test_every_rank_raises_at_the_same_step(few: Path) -> None:
    assert [result["raised_in"] for result in results(few, 2, "nan_raises")] == [4, 4]


@pytest.mark.slow
class TestMoreFaults:
    def test_a_rank_is_named_where_no_layer_can_be(self, of_two: Path) -> None:
        # At a step that measures no output, a broken forward pass shows in every gradient.
        for result in results(of_two, 2, "nan_in_forward_between_activations"):
            assert_blamed(result, 4, "(all)", "grad_norm")

    @pytest.mark.parametrize("scenario", ["nan_in_backward", "nan_in_backward_of_fsdp"])
    def test_a_broken_backward_pass(self, of_two: Path, scenario: str) -> None:
        for result in results(of_two, 2, scenario):
            assert_blamed(result, 4, "blocks.1.up", "grad_norm")

    def test_every_rank_raises_at_the_same_step_also_if_one_saves_a_checkpoint(self, of_two: Path) -> None:
        both = results(of_two, 2, "nan_raises_when_one_rank_saves")
        assert [result["raised_in"] for result in both] == [4, 4]

    def test_every_rank_leaves_the_same_updates_out(self, of_two: Path) -> None:
        for result in results(of_two, 2, "nan_is_skipped"):
            assert [alert["step"] for alert in result["alerts"]] == [3, 4, 5]
            assert result["weights_are_finite"]

    def test_only_the_first_rank_writes_and_warns(self, of_two: Path) -> None:
        first, second = results(of_two, 2, "only_first_writes")
        assert (first["num_warnings"], second["num_warnings"]) == (1, 0)
        assert first["alerts"] == second["alerts"]
        assert list((of_two / "run-0").glob("incidents/*/report.html"))
        assert (of_two / "run-0" / "flight_recorder.bin").exists()
        assert not (of_two / "run-1").exists()
        assert len(probes.read(of_two / "run-0.jsonl").alerts) == 1
        assert not probes.read(of_two / "run-1.jsonl")  # opened by the script itself

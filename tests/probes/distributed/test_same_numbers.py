"""Training on several ranks: every record equals that of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.probes.distributed.launch import results, rows, run
from tests.probes.distributed.trainings import (
    MORE_PASSES,
    Rows,
    as_rows,
    mean_square,
    model,
    train,
    train_accumulating,
    train_scaled,
)

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without it")

OF_TWO = [
    "within_ddp",
    "one_group_each",
    "sampled_rows",
    "fsdp_cpu_offload",
    "tensor_parallel",
    "sequence_parallel",
    "uneven",
    "no_sync",
    "growing_accumulation",
    "grad_scaler",
    "fsdp_with_grad_scaler",
    "unchanged",
    "copies",
]
OF_FOUR = ["ddp", "sampled_rows", "hybrid", "tensor_parallel", "tensor_parallel_and_fsdp"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is always run."""
    return run(tmp_path_factory.mktemp("few"), 2, "same_numbers", ["ddp", "fsdp"])


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("of_two"), 2, "same_numbers", OF_TWO)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("of_four"), 4, "same_numbers", OF_FOUR)


@pytest.fixture(scope="module")
def expected() -> Rows:
    return as_rows(train(model()))


def assert_close(measured: Rows, expected: Rows, tolerance: float = 1e-6) -> None:
    assert measured.keys() == expected.keys()
    for name, (value, error, kind) in expected.items():
        assert measured[name][2] == kind, name
        assert measured[name][0] == pytest.approx(value, rel=tolerance, abs=1e-14), name
        assert measured[name][1] == (error and pytest.approx(error, rel=tolerance)), name


def without_split_inputs(expected: Rows) -> Rows:
    """Where a layer's input is split between ranks, the gradient there is not measured."""
    return {
        name: row
        for name, row in expected.items()
        if "gradient_gain" not in name or not any(layer in name for layer in (".out", ".down"))
    }


def parts_of_two_ranks(whole: Tensor, num_passes: int) -> list[Tensor]:
    """What two ranks together have in each of several backward passes."""
    of_ranks = [of_rank.chunk(num_passes) for of_rank in whole.chunk(2)]
    return [torch.cat(parts) for parts in zip(*of_ranks, strict=True)]


@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_every_record_equals_that_of_one_process(few: Path, expected: Rows, scenario: str) -> None:
    assert len(expected) > 600
    assert_close(rows(few, 2, scenario), expected)


@pytest.mark.slow
class TestTwoRanks:
    @pytest.mark.parametrize("scenario", ["within_ddp", "fsdp_cpu_offload", "one_group_each"])
    def test_on_two_ranks(self, of_two: Path, expected: Rows, scenario: str) -> None:
        assert_close(rows(of_two, 2, scenario), expected)

    def test_with_sampled_rows(self, of_two: Path) -> None:
        assert_close(rows(of_two, 2, "sampled_rows"), as_rows(train(model(), attention_rows=2)))

    def test_with_tensor_parallelism(self, of_two: Path, expected: Rows) -> None:
        assert_close(rows(of_two, 2, "tensor_parallel"), without_split_inputs(expected))

    def test_with_sequence_parallelism(self, of_two: Path, expected: Rows) -> None:
        # Gradients at ordinary tensors are not known to be of parts of a sequence.
        def known(of_run: Rows) -> Rows:
            unknown = ("activation_grad_norm", "gradient_gain")
            return {name: row for name, row in of_run.items() if not any(q in name for q in unknown)}

        assert_close(known(rows(of_two, 2, "sequence_parallel")), known(expected))

    def test_with_uneven_batches(self, of_two: Path) -> None:
        def loss_of(output: Tensor) -> Tensor:  # what DDP trains: the mean over ranks
            return (mean_square(output[:6]) + mean_square(output[6:])) / 2

        assert_close(rows(of_two, 2, "uneven"), as_rows(train(model(), steps=1, loss_of=loss_of)))

    def test_with_accumulated_gradients(self, of_two: Path) -> None:
        of_one = train_accumulating(model(), parts_of_two_ranks, (2, 2))
        assert_close(rows(of_two, 2, "no_sync"), as_rows(of_one))

    def test_with_more_accumulated_gradients_from_some_step_on(self, of_two: Path) -> None:
        of_one = train_accumulating(model(), parts_of_two_ranks, MORE_PASSES)
        assert_close(rows(of_two, 2, "growing_accumulation"), as_rows(of_one))

    @pytest.mark.parametrize("scenario", ["grad_scaler", "fsdp_with_grad_scaler"])
    def test_with_a_grad_scaler(self, of_two: Path, scenario: str) -> None:
        assert_close(rows(of_two, 2, scenario), as_rows(train_scaled(model())))

    def test_training_is_unchanged(self, of_two: Path) -> None:
        for result in results(of_two, 2, "unchanged"):
            assert result == {"ddp": True, "fsdp": True}

    def test_copies_of_the_model_are_not_watched(self, of_two: Path) -> None:
        for result in results(of_two, 2, "copies"):
            assert result == {"num_records": 0}


@pytest.mark.slow
class TestFourRanks:
    @pytest.mark.parametrize("scenario", ["ddp", "hybrid"])
    def test_on_four_ranks(self, of_four: Path, expected: Rows, scenario: str) -> None:
        assert_close(rows(of_four, 4, scenario), expected)

    @pytest.mark.parametrize("scenario", ["tensor_parallel", "tensor_parallel_and_fsdp"])
    def test_with_tensor_parallelism_on_four_ranks(
        self, of_four: Path, expected: Rows, scenario: str
    ) -> None:
        assert_close(rows(of_four, 4, scenario), without_split_inputs(expected))

    def test_with_sampled_rows_on_four_ranks(self, of_four: Path) -> None:
        assert_close(rows(of_four, 4, "sampled_rows"), as_rows(train(model(), attention_rows=2)))

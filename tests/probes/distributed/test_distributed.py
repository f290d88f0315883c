"""Training on several ranks: the numbers, verdicts and actions of one process with the whole batch.

Each file of results is one torchrun of several scenarios, since processes take seconds to start.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import probes
from probes.distributed import gathering_device
from tests.probes.distributed.launch import launch, results
from tests.probes.distributed.trainings import (
    EVERYTHING,
    adamw,
    as_rows,
    batch,
    mean_square,
    model,
    train,
)

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without it")

Rows = dict[str, list[Any]]
# The few that are always run, those that take a minute, and what takes four processes.
FEW = ["ddp", "fsdp", "nan_in_forward", "nan_raises"]
OF_TWO = [
    "within_ddp",
    "sampled_rows",
    "fsdp_cpu_offload",
    "tensor_parallel",
    "sequence_parallel",
    "uneven",
    "no_sync",
    "growing_accumulation",
    "different_lengths",
    "gives_up",
    "gives_up_inputs",
    "sequence_parallel_gives_up",
    "grad_scaler",
    "fsdp_with_grad_scaler",
    "one_group_each",
    "unchanged",
    "copies",
    "nan_in_forward_between_activations",
    "nan_in_backward",
    "nan_in_backward_of_fsdp",
    "nan_raises_when_one_rank_saves",
    "nan_is_skipped",
    "only_first_writes",
    "mixed",
    "unfrozen",
    "refused",
    "joined",
]
OF_FOUR = ["ddp", "sampled_rows", "hybrid", "tensor_parallel", "tensor_parallel_and_fsdp"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("few"), 2, FEW)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("of_two"), 2, OF_TWO)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("of_four"), 4, OF_FOUR)


def run(directory: Path, num_ranks: int, scenarios: list[str]) -> Path:
    finished = launch(directory, num_ranks, scenarios)
    assert finished.returncode == 0, finished.stderr[-5000:]
    return directory


def rows(directory: Path, num_ranks: int, scenario: str) -> Rows:
    """The records, which have to be the same on every rank."""
    first, *others = results(directory, num_ranks, scenario)
    assert all(other == first for other in others)
    return first


def assert_close(measured: Rows, expected: Rows, tolerance: float = 1e-6) -> None:
    assert measured.keys() == expected.keys()
    for name, (value, error, kind) in expected.items():
        assert measured[name][2] == kind, name
        assert measured[name][0] == pytest.approx(value, rel=tolerance, abs=1e-14), name
        assert measured[name][1] == (error and pytest.approx(error, rel=tolerance)), name


def assert_blamed(result: dict[str, Any], step: int, layer: str, quantity: str) -> None:
    """One alert, of the last of two ranks."""
    [alert] = result["alerts"]
    assert (alert["step"], alert["layer"], alert["rank"]) == (step, layer, 1)
    assert f"({quantity})" in alert["reason"]
    assert alert["reason"].endswith("(first on rank 1).")


@pytest.fixture(scope="module")
def expected() -> Rows:
    return as_rows(train(model()))


@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_every_record_equals_that_of_one_process(few: Path, expected: Rows, scenario: str) -> None:
    assert len(expected) > 600
    assert_close(rows(few, 2, scenario), expected)


def test_a_nan_is_blamed_on_rank_and_layer_on_every_rank(few: Path) -> None:
    for result in results(few, 2, "nan_in_forward"):
        assert_blamed(result, 2, "blocks.1.up", "activation_rms")


def test_every_rank_raises_at_the_same_step(few: Path) -> None:
    assert [result["raised_in"] for result in results(few, 2, "nan_raises")] == [4, 4]


@pytest.mark.slow
class TestNumbers:
    """Every record of a run equals that of one process with the whole batch."""

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
        trained = model()
        optimizer = adamw(trained)
        with probes.attach(trained, optimizer, **EVERYTHING) as probe:
            for step in range(2):
                for half in (0, 1):
                    of_ranks = [whole.chunk(2)[half] for whole in batch(step).chunk(2)]
                    (mean_square(trained(torch.cat(of_ranks))) / 2).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert_close(rows(of_two, 2, "no_sync"), as_rows(probe))

    def test_with_more_accumulated_gradients_from_some_step_on(self, of_two: Path) -> None:
        trained = model()
        optimizer = adamw(trained)
        with probes.attach(trained, optimizer, **EVERYTHING) as probe:
            for step in range(5):
                count = 1 if step < 2 else 2
                for index in range(count):
                    of_ranks = [whole.chunk(count)[index] for whole in batch(step).chunk(2)]
                    (mean_square(trained(torch.cat(of_ranks))) / count).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert_close(rows(of_two, 2, "growing_accumulation"), as_rows(probe))

    def test_means_over_sampled_rows_and_all_rows_are_weighted_by_rows(self, of_two: Path) -> None:
        first, second = results(of_two, 2, "different_lengths")
        assert first["joined"] == second["joined"]
        name = "0 attention/entropy/blocks.0 None"
        (sampled, error, kind), (whole, _, other_kind) = first["own"][name], second["own"][name]
        assert (kind, other_kind) == ("estimate", "exact")
        joined, joined_error, joined_kind = first["joined"][name]
        assert joined == pytest.approx((100 * sampled + 4 * whole) / 104)
        assert joined_error == pytest.approx(100 * error / 104)
        assert joined_kind == "estimate"

    def test_what_one_rank_gives_up_is_recorded_of_none(self, of_two: Path) -> None:
        of_run = rows(of_two, 2, "gives_up")
        assert {f"{step} weight_norm/embed None" for step in range(6)} <= of_run.keys()
        for quantity in ("grad_norm/(all)", "grad_norm/embed", "activation_grad_norm/blocks.0"):
            steps = [step for step in range(6) if f"{step} {quantity} None" in of_run]
            assert steps == [0, 1], quantity

    def test_a_gain_is_recorded_of_none_where_one_rank_does_not_see_the_inputs(self, of_two: Path) -> None:
        of_run = rows(of_two, 2, "gives_up_inputs")
        for name, expected in (
            ("gradient_gain/blocks.0.up", [0, 1]),
            ("gradient_gain/blocks.0.down", [0, 1, 2, 3]),
            ("activation_rms/blocks.0.up", [0, 1, 2, 3]),
        ):
            assert [step for step in range(4) if f"{step} {name} None" in of_run] == expected, name

    def test_a_rank_that_gives_up_takes_part_in_partial_sums(self, of_two: Path) -> None:
        for result in results(of_two, 2, "sequence_parallel_gives_up"):
            assert result["is_unchanged"]
            assert "4 weight_norm/blocks.0.norm None" in result["records"]
            assert "4 grad_norm/blocks.0.norm None" not in result["records"]

    @pytest.mark.parametrize("scenario", ["grad_scaler", "fsdp_with_grad_scaler"])
    def test_with_a_grad_scaler(self, of_two: Path, scenario: str) -> None:
        trained = model()
        optimizer, scaler = adamw(trained), torch.amp.GradScaler("cpu", init_scale=4.0)
        with probes.attach(trained, optimizer, **EVERYTHING) as probe:
            for step in range(2):
                scaler.scale(mean_square(trained(batch(step)))).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        assert_close(rows(of_two, 2, scenario), as_rows(probe))

    def test_training_is_unchanged(self, of_two: Path) -> None:
        for result in results(of_two, 2, "unchanged"):
            assert result == {"ddp": True, "fsdp": True}

    def test_copies_of_the_model_are_not_watched(self, of_two: Path) -> None:
        for result in results(of_two, 2, "copies"):
            assert result == {"num_records": 0}

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


def without_split_inputs(expected: Rows) -> Rows:
    """Where a layer's input is split between ranks, the gradient there is not measured."""
    return {
        name: row
        for name, row in expected.items()
        if "gradient_gain" not in name or not any(layer in name for layer in (".out", ".down"))
    }


@pytest.mark.slow
class TestVerdicts:
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

    def test_ranks_that_log_different_things_do_not_wait_for_each_other(self, of_two: Path) -> None:
        first, second = results(of_two, 2, "mixed")
        # Of what it logs alone, the first rank writes what was not joined, under its own name.
        assert {name: row for name, row in first.items() if name.endswith("None")} == second
        log = {name: row[0] for name, row in first.items() if "/(all)" in name and "grad" not in name}
        assert log == {
            **{f"{step} first/(all) None": step for step in (0, 2, 4, 6, 8, 10)},
            **{f"{step} first/(all) 0": step for step in (1, 3, 5, 7, 9, 11)},
            **{f"{step} second/(all) None": step for step in (0, 2, 4, 6, 8, 10)},
            # New at step 4: the ranks agree on it at the next recorded step but one.
            **{f"{step} late/(all) None": step for step in (8, 10)},
            "4 once/(all) 0": 4.0,
        }

    def test_a_part_of_the_gradient_is_not_taken_for_the_whole(self, of_two: Path) -> None:
        of_run = results(of_two, 2, "unfrozen")[0]
        assert {"2 grad_norm/embed 0", "3 grad_norm/embed 0", "4 grad_norm/embed None"} <= of_run.keys()
        whole = [name for name in of_run if "grad_norm/(all)" in name]
        assert whole == [f"{step} grad_norm/(all) None" for step in (0, 1, 4, 5)]

    def test_what_differs_between_ranks_is_refused_on_all(self, of_two: Path) -> None:
        for result in results(of_two, 2, "refused"):
            assert "`model` is watched already" in result["watched"]
            assert "`schedule` must be the same on every rank; rank 0 has" in result["schedule"]
            assert "`detectors` must be the same on every rank" in result["detectors"]
            assert "`step` must be the same on every rank; rank 0 has 4 and rank 1 5." in result["step"]
            assert "`on_divergence` must be the same on every rank" in result["settings"]
            assert "ranks 0 and 1 hold different models" in result["model"]
            assert "`layer_jacobian_every` runs a layer again" in result["jacobians"]
            assert "`model` is tensor parallel within DistributedDataParallel" in result["divided"]
        for rank, result in enumerate(results(of_two, 2, "refused")):
            assert f"`model` is trained by ranks [{rank}] (Distr" in result["replicas"]
        assert "`process_group` must contain this process" in results(of_two, 2, "refused")[1]["member"]

    def test_ranks_that_end_at_different_steps_are_refused(self, of_two: Path) -> None:
        for result in results(of_two, 2, "joined"):
            assert "with model.join()" in result["message"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus(tmp_path: Path, expected: Rows) -> None:
    run(tmp_path, 2, ["ddp_on_gpus", "fsdp_on_gpus", "nan_in_backward_on_gpus"])
    for scenario in ("ddp_on_gpus", "fsdp_on_gpus"):
        assert_close(rows(tmp_path, 2, scenario), expected, tolerance=1e-4)
    for result in results(tmp_path, 2, "nan_in_backward_on_gpus"):
        assert_blamed(result, 4, "blocks.1.up", "grad_norm")


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_leaves_the_records(tmp_path: Path) -> None:
    finished = launch(tmp_path, 2, ["killed"])
    assert finished.returncode != 0
    run = probes.read(tmp_path / "killed-0.jsonl")
    assert set(run["grad_norm/(all)"].steps.tolist()) >= set(range(19))
    assert "DivergenceError" not in finished.stderr


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_others_by_the_timeout(tmp_path: Path) -> None:
    # Nobody has died by then, so it is not torchrun that ends the first rank.
    launch(tmp_path, 2, ["hung"])
    result = json.loads((tmp_path / "hung-0.json").read_text())
    assert 2 < result["seconds"] < 15  # it sleeps for twenty
    assert set(probes.read(tmp_path / "hung-0.jsonl")["grad_norm/(all)"].steps.tolist()) >= set(range(9))


class TestOneProcess:
    @pytest.mark.parametrize("backends", ["cpu:gloo,cuda:nccl", "gloo"])
    def test_ranks_gather_where_the_model_is(self, backends: str) -> None:
        assert gathering_device(backends, model()) == torch.device("cpu")

    def test_ranks_gather_on_the_gpu_of_the_model_whichever_is_current(self) -> None:
        on_third = mock.Mock(parameters=lambda: iter([mock.Mock(device=torch.device("cuda:2"))]))
        assert gathering_device("cpu:gloo,cuda:nccl", on_third) == torch.device("cuda:2")

    def test_other_backends_are_refused(self) -> None:
        with pytest.raises(ValueError, match="must use nccl or gloo; it uses mpi"):
            gathering_device("mpi", model())

    def test_a_group_without_torch_distributed_is_refused(self) -> None:
        with pytest.raises(ValueError, match="torch.distributed is not initialized"):
            probes.attach(model(), process_group=object())  # type: ignore[arg-type]

"""Ranks that do not measure, log or ask for the same: what is joined, what is left out, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.probes.distributed.launch import results, rows, run

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without it"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scenarios = [
        "different_lengths",
        "gives_up",
        "gives_up_inputs",
        "sequence_parallel_gives_up",
        "mixed",
        "unfrozen",
        "refused",
        "joined",
    ]
    return run(tmp_path_factory.mktemp("of_two"), 2, "differing_ranks", scenarios)


def test_means_over_sampled_rows_and_all_rows_are_weighted_by_rows(of_two: Path) -> None:
    first, second = results(of_two, 2, "different_lengths")
    assert first["joined"] == second["joined"]
    name = "0 attention/entropy/blocks.0 None"
    (sampled, error, kind), (whole, _, other_kind) = first["own"][name], second["own"][name]
    assert (kind, other_kind) == ("estimate", "exact")
    joined, joined_error, joined_kind = first["joined"][name]
    assert joined == pytest.approx((100 * sampled + 4 * whole) / 104)
    assert joined_error == pytest.approx(100 * error / 104)
    assert joined_kind == "estimate"


def test_what_one_rank_gives_up_is_recorded_of_none(of_two: Path) -> None:
    of_run = rows(of_two, 2, "gives_up")
    assert {f"{step} weight_norm/embed None" for step in range(6)} <= of_run.keys()
    for quantity in ("grad_norm/(all)", "grad_norm/embed", "activation_grad_norm/blocks.0"):
        steps = [step for step in range(6) if f"{step} {quantity} None" in of_run]
        assert steps == [0, 1], quantity


def test_a_gain_is_recorded_of_none_where_one_rank_does_not_see_the_inputs(of_two: Path) -> None:
    of_run = rows(of_two, 2, "gives_up_inputs")
    for name, expected in (
        ("gradient_gain/blocks.0.up", [0, 1]),
        ("gradient_gain/blocks.0.down", [0, 1, 2, 3]),
        ("activation_rms/blocks.0.up", [0, 1, 2, 3]),
    ):
        assert [step for step in range(4) if f"{step} {name} None" in of_run] == expected, name


def test_a_rank_that_gives_up_takes_part_in_partial_sums(of_two: Path) -> None:
    for result in results(of_two, 2, "sequence_parallel_gives_up"):
        assert result["is_unchanged"]
        assert "4 weight_norm/blocks.0.norm None" in result["records"]
        assert "4 grad_norm/blocks.0.norm None" not in result["records"]


def test_ranks_that_log_different_things_do_not_wait_for_each_other(of_two: Path) -> None:
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


def test_a_part_of_the_gradient_is_not_taken_for_the_whole(of_two: Path) -> None:
    of_run = results(of_two, 2, "unfrozen")[0]
    assert {"2 grad_norm/embed 0", "3 grad_norm/embed 0", "4 grad_norm/embed None"} <= of_run.keys()
    whole = [name for name in of_run if "grad_norm/(all)" in name]
    assert whole == [f"{step} grad_norm/(all) None" for step in (0, 1, 4, 5)]


def test_what_differs_between_ranks_is_refused_on_all(of_two: Path) -> None:
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


def test_ranks_that_end_at_different_steps_are_refused(of_two: Path) -> None:
    for result in results(of_two, 2, "joined"):
        assert "with model.join()" in result["message"]

"""The rule by which each quantity joins over ranks, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from probes.collective import slots_at_once
from probes.rank_reduction import RankReduction
from probes.record import series_of


def join(
    quantity: str, values: list[float], weights: list[float], *, is_error: bool = False
) -> tuple[float, float, float]:
    reduction = RankReduction([series_of("layer", quantity)], [is_error], torch.device("cpu"))
    columns = (torch.tensor(column, dtype=torch.float64)[:, None] for column in (values, weights))
    value, weight, first_broken = reduction(*columns)[:, 0].tolist()
    return value, weight, first_broken


@pytest.mark.parametrize(
    ("quantity", "values", "weights", "expected"),
    [
        ("grad_norm", [3.0, 4.0], [1, 1], 5.0),  # shards
        ("grad_norm", [5.0, 5.0], [0.5, 0.5], 5.0),  # copies
        ("grad_max_abs", [2.0, 7.0], [1, 1], 7.0),
        ("attention/max_logit", [-2.0, -7.0], [1, 1], -2.0),
        ("nonfinite_count", [2.0, 2.0], [0.5, 0.5], 2.0),
        ("loss", [1.0, 4.0], [1, 1], 2.5),
        ("attention/entropy", [1.0, 4.0], [2, 1], 2.0),
        ("activation_rms", [1.0, 7.0], [1, 1], 5.0),
        ("activation_rms", [1.0, 7.0], [3, 1], math.sqrt(13)),
    ],
)
def test_by_hand(quantity: str, values: list[float], weights: list[float], expected: float) -> None:
    assert join(quantity, values, weights) == (pytest.approx(expected), sum(weights), -1)


def test_standard_errors_of_a_weighted_mean() -> None:
    error, *_ = join("attention/entropy", [3.0, 8.0], [2, 1], is_error=True)
    assert error == pytest.approx(math.hypot(2 * 3, 8) / 3)


def test_a_rank_without_a_value_does_not_count() -> None:
    assert join("attention/max_logit", [-3.0, 0.0], [1, 0]) == (-3.0, 1, -1)
    assert join("loss", [2.0, math.nan], [1, 0]) == (2.0, 1, -1)
    assert join("loss", [0.0, 0.0], [0, 0])[1] == 0


def test_the_first_rank_that_is_not_finite_is_named_where_another_is() -> None:
    value, _, rank = join("grad_norm", [1.0, math.nan, math.inf], [1, 1, 1])
    assert math.isnan(value)
    assert rank == 1
    assert join("grad_norm", [math.nan, math.nan], [1, 1])[2] == -1
    assert join("attention/max_logit", [-math.inf, 1.0], [1, 1]) == (1.0, 2, -1)  # no row had a key
    assert math.isnan(join("grad_max_abs", [math.nan, 1.0], [1, 1])[0])


def test_a_rank_that_has_given_up_a_value_leaves_none() -> None:
    assert join("grad_norm", [3.0, 0.0], [0.5, math.nan])[1] == 0


def test_the_joined_value_is_exact_where_that_of_every_rank_is() -> None:
    assert join("attention/entropy", [1.0, 4.0], [2, -1]) == (2.0, -3, -1)


@pytest.mark.parametrize(
    ("quantity", "values", "weights", "expected"),
    [
        ("grad_norm", [3.0, 4.0], [0.5, 0.25], (math.sqrt(8.5), 1)),  # parameters that are split and copied
        ("grad_max_abs", [2.0, 7.0], [1, 1], (7.0, 1)),
        ("nonfinite_count", [2.0, 2.0], [0.5, 0.5], (2.0, 1)),
        ("loss", [1.0, 4.0], [1, 1], (2.5, 2)),
        ("attention/entropy", [1.0, 4.0], [30, -10], (2.5, -40)),  # as within one process
        ("activation_rms", [1.0, 7.0], [3, 1], (5.0, 4)),
        ("loss", [1.0, 0.0], [1, 0], (1.0, 1)),
        ("attention/max_logit", [-2.0, 0.0], [1, 0], (-2.0, 1)),
        ("attention/max_logit", [0.0, 0.0], [0, 0], (0.0, 0)),
        ("loss", [0.0, 0.0], [0, 0], (0.0, 0)),
    ],
)
def test_parts_of_a_rank_by_hand(
    quantity: str, values: list[float], weights: list[float], expected: tuple[float, float]
) -> None:
    reduction = RankReduction([series_of("layer", quantity)], [False], torch.device("cpu"))
    columns = (torch.tensor(column, dtype=torch.float64)[:, None] for column in (values, weights))
    assert reduction.join_parts(*columns)[:, 0].tolist() == pytest.approx(expected)


def test_pieces_are_joined_as_the_whole() -> None:
    names = [series_of("layer", q) for q in ("grad_norm", "loss", "grad_max_abs", "activation_rms")]
    reduction = RankReduction(names, [False, True, False, False], torch.device("cpu"))
    values, weights = torch.rand(2, 5, 4, dtype=torch.float64)
    whole = reduction(values, weights)
    parts = [reduction(values[:, i : i + 1], weights[:, i : i + 1], i) for i in range(4)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_what_is_gathered_at_a_time_is_bounded() -> None:
    assert slots_at_once(1000) * 1000 * 16 <= 2**26
    assert slots_at_once(10**9) == 1

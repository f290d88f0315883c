"""The rule by which each quantity joins over ranks, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from probes.collective import slots_at_once
from probes.rank_reduction import RankReduction
from probes.record import series_of


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def join(quantity: str, values: list[float], weights: list[float]) -> tuple[float, bool, bool, int | None]:
    """Value, whether there is one, whether it is exact, and the first broken rank, of one slot.

    A weight of NaN marks what a rank has given up.
    """
    reduction = RankReduction([series_of("layer", quantity)], [False], torch.device("cpu"))
    sent = [own(reduction, [value], [weight]) for value, weight in zip(values, weights, strict=True)]
    for rank, weight in zip(sent, weights, strict=True):
        rank[1] = torch.nan if math.isnan(weight) else rank[1]
    joined = reduction.finish(reduction.over_ranks(torch.stack(sent)).numpy())
    return (
        joined.values.item(),
        joined.is_there.item(),
        joined.is_exact.item(),
        joined.first_broken.get(0),
    )


def own(reduction: RankReduction, values: list[float], weights: list[float]) -> Tensor:
    """What a rank with these parts of one slot sends."""
    counting = reduction.count(column(*weights), torch.ones(len(weights), 1, dtype=torch.float64))
    return torch.stack([reduction.own(column(*values), counting), counting.weights])


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
    assert join(quantity, values, weights) == (pytest.approx(expected), True, True, None)


def test_standard_errors_of_a_weighted_mean() -> None:
    name = series_of("layer", "attention/entropy")
    reduction = RankReduction([name, name], [False, True], torch.device("cpu"))
    ones = torch.ones(1, 2, dtype=torch.float64)
    sent = []
    # The last rank has measured all of its rows: its mean has no error, and counts.
    for mean, error, rows, rows_with_error in ((1.0, 3.0, -2, -2), (4.0, 8.0, -1, -1), (1.0, 0.0, 5, 0)):
        counting = reduction.count(torch.tensor([[rows, rows_with_error]], dtype=torch.float64), ones)
        values = torch.tensor([[mean, error]], dtype=torch.float64)
        sent.append(torch.stack([reduction.own(values, counting), counting.weights]))
    joined = reduction.finish(reduction.over_ranks(torch.stack(sent)).numpy())
    assert joined.values.tolist() == pytest.approx([11 / 8, math.hypot(2 * 3, 8) / 8])
    assert not joined.is_exact.any()


def test_a_rank_without_a_value_does_not_count() -> None:
    assert join("attention/max_logit", [-3.0, 0.0], [1, 0]) == (-3.0, True, True, None)
    assert join("loss", [2.0, math.nan], [1, 0]) == (2.0, True, True, None)
    assert not join("loss", [0.0, 0.0], [0, 0])[1]


def test_the_first_rank_that_is_not_finite_is_named_where_another_is() -> None:
    value, *_, rank = join("grad_norm", [1.0, math.nan, math.inf], [1, 1, 1])
    assert math.isnan(value)
    assert rank == 1
    assert join("grad_norm", [1.0, 2.0, math.inf], [1, 1, 1])[3] == 2
    assert join("grad_norm", [math.nan, math.nan], [1, 1])[3] is None
    assert join("grad_norm", [0.0, math.nan], [0, 1])[3] is None  # the only one that has a value
    assert join("attention/max_logit", [-math.inf, 1.0], [1, 1]) == (
        1.0,
        True,
        True,
        None,
    )  # no row had a key
    assert math.isnan(join("grad_max_abs", [math.nan, 1.0], [1, 1])[0])


def test_a_rank_that_has_given_up_a_value_leaves_none() -> None:
    assert not join("grad_norm", [3.0, 0.0], [0.5, math.nan])[1]


def test_the_joined_value_is_exact_where_that_of_every_rank_is() -> None:
    assert join("attention/entropy", [1.0, 4.0], [2, -1]) == (2.0, True, False, None)


@pytest.mark.parametrize(
    ("quantity", "values", "weights", "expected", "weight"),
    [
        ("grad_norm", [3.0, 4.0], [0.5, 0.25], math.sqrt(8.5), 1),  # parameters that are split and copied
        ("grad_max_abs", [2.0, 7.0], [1, 1], 7.0, 1),
        ("nonfinite_count", [2.0, 2.0], [0.5, 0.5], 2.0, 1),
        ("loss", [1.0, 4.0], [1, 1], 2.5, 2),
        ("attention/entropy", [1.0, 4.0], [30, -10], 2.5, -40),  # as within one process
        ("activation_rms", [1.0, 7.0], [3, 1], 5.0, 4),
        ("loss", [1.0, 0.0], [1, 0], 1.0, 1),
        ("attention/max_logit", [-2.0, 0.0], [1, 0], -2.0, 1),
        ("attention/max_logit", [0.0, 0.0], [0, 0], None, 0),
        ("loss", [0.0, 0.0], [0, 0], None, 0),
    ],
)
def test_parts_of_a_rank_by_hand(
    quantity: str, values: list[float], weights: list[float], expected: float | None, weight: float
) -> None:
    reduction = RankReduction([series_of("layer", quantity)], [False], torch.device("cpu"))
    sent = own(reduction, values, weights)
    joined = reduction.finish(reduction.over_ranks(sent[None]).numpy())
    assert sent[1].item() == weight
    assert joined.is_there.item() is (expected is not None)
    if expected is not None:
        assert joined.values.item() == pytest.approx(expected)


def test_pieces_are_joined_as_the_whole() -> None:
    names = [series_of("layer", q) for q in ("grad_norm", "loss", "grad_max_abs", "activation_rms")]
    reduction = RankReduction(names, [False, True, False, False], torch.device("cpu"))
    gathered = torch.rand(5, 2, 4, dtype=torch.float64)
    whole = reduction.over_ranks(gathered)
    parts = [reduction.over_ranks(gathered[:, :, i : i + 1], i) for i in range(4)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_what_is_gathered_at_a_time_is_bounded() -> None:
    assert slots_at_once(1000) * 1000 * 16 <= 2**26
    assert slots_at_once(10**9) == 1

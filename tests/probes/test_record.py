from __future__ import annotations

import math

import numpy as np
import pytest

from probes.quantities import QUANTITIES, largest, reduction_of, root_mean_square, root_sum_of_squares
from probes.record import Record, Series, StepRecords


def test_tags_name_quantity_layer_call_and_head() -> None:
    assert Series("blocks.0", "grad_norm").tag == "grad_norm/blocks.0"
    assert Series("a", "attention/entropy", head=3, call=1).tag == "attention/entropy/a/call_1/head_3"


@pytest.mark.parametrize(
    "series",
    [
        Series("head_0", "grad_norm"),
        Series("tasks.a/head_0", "grad_norm"),
        Series("call_1", "attention/entropy", head=2),
        Series("blocks.0", "attention/entropy", head=3, call=1),
        Series("(all)", "loss/head_0"),
    ],
)
def test_a_tag_tells_its_series(series: Series) -> None:
    assert Series.from_tag(series.tag) == series


def test_records_are_frozen_plain_numbers() -> None:
    step = StepRecords(
        4, (Series("a", "x"), Series("b", "x", kind="estimate")), np.ones(2), np.array([math.nan, 0.5])
    )
    first, second = step.records()
    assert first == Record(4, "a", "x", 1.0)
    assert second.standard_error == 0.5
    assert type(first.value) is float
    with pytest.raises(AttributeError):
        first.value = 2.0


def test_parts_of_a_norm_join_without_overflow() -> None:
    assert root_sum_of_squares([3e200, 4e200]) == pytest.approx(5e200)
    assert root_sum_of_squares([3e-200, 4e-200]) == pytest.approx(5e-200)
    assert root_mean_square([3.0, 4.0]) == pytest.approx(math.sqrt(12.5))


@pytest.mark.parametrize("quantity", [*QUANTITIES, "loss", "_part_of_a_ratio"])
def test_a_nonfinite_part_is_never_hidden(quantity: str) -> None:
    for parts in ([math.nan, 1.0], [1.0, math.nan], [math.inf, 1.0]):
        assert not math.isfinite(reduction_of(quantity)(parts))
    assert math.isnan(largest([math.nan, 2.0]))

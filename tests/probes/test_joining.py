"""Parts of a series as one record."""

from __future__ import annotations

import pytest

from probes.joining import join
from probes.record import Series, StepRecords

ENTROPY = Series("blocks.0", "attention/entropy")
SAMPLED = ENTROPY._replace(kind="estimate")


def joined(*parts: tuple[Series, float, float | None]) -> StepRecords:
    """Of parts with their values and standard errors."""
    measured = []
    for series, value, error in parts:
        measured.append(((series,), (value,), 1.0, False))
        if error is not None:
            measured.append(((series,), (error,), 1.0, True))
    return join(0, measured, (), ())


def test_a_mean_of_estimates_has_the_error_of_independent_ones() -> None:
    records = joined((SAMPLED, 2.0, 0.3), (SAMPLED, 4.0, 0.4))
    assert records.series == (SAMPLED,)
    assert (records.values[0], records.standard_errors[0]) == (3.0, pytest.approx(0.25))


@pytest.mark.parametrize("is_exact_first", [False, True])
def test_an_exact_part_of_a_mean_makes_its_error_smaller(is_exact_first: bool) -> None:
    parts = [(SAMPLED, 2.0, 0.3), (ENTROPY, 4.0, None)]
    records = joined(*reversed(parts) if is_exact_first else parts)
    assert records.series == (SAMPLED,)
    assert (records.values[0], records.standard_errors[0]) == (3.0, pytest.approx(0.15))

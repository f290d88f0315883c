"""Parts of a series as one record."""

from __future__ import annotations

import gc
import weakref

import pytest

from probes import joining
from probes.joining import join
from probes.pending import Ratio
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


NAMES = (Series("a", "_update_norm"), Series("a", "weight_norm"), Series("b", "weight_norm"))
RATIO = Ratio(Series("a", "update_ratio"), *NAMES[:2])


def ratio_of(step: int, *values: float, ratios: tuple[Ratio, ...] = (RATIO,)) -> dict[str, float]:
    return join(step, [(NAMES, values, 1.0, False)], (), ratios).by_tag()


def test_a_ratio_over_zero_is_absent_in_that_step_alone() -> None:
    whole = {"weight_norm/a": 4.0, "weight_norm/b": 5.0, "update_ratio/a": 0.5}
    assert ratio_of(0, 2.0, 4.0, 5.0) == whole
    assert ratio_of(1, 2.0, 0.0, 5.0) == {"weight_norm/a": 0.0, "weight_norm/b": 5.0}
    assert ratio_of(2, 2.0, 4.0, 5.0) == whole


def test_the_same_names_with_other_ratios_are_joined_anew() -> None:
    assert "update_ratio/a" in ratio_of(0, 2.0, 4.0, 5.0)
    assert "update_ratio/a" not in ratio_of(1, 2.0, 4.0, 5.0, ratios=())
    other = RATIO._replace(denominator=NAMES[2])
    assert ratio_of(2, 2.0, 4.0, 5.0, ratios=(other,))["update_ratio/a"] == pytest.approx(0.4)


def test_what_is_known_by_its_identity_is_kept_alive() -> None:
    class Names(list):  # a list itself takes no weak reference
        pass

    joining._known.clear()
    names = Names(NAMES)
    join(0, [(names, (1.0, 2.0, 3.0), 1.0, False)], (), ())
    reference = weakref.ref(names)
    del names
    gc.collect()
    assert reference() is not None


def test_not_more_than_a_few_ways_of_joining_are_kept() -> None:
    for layer in range(100):
        join(0, [((Series(str(layer), "weight_norm"),), (1.0,), 1.0, False)], (), ())
    assert len(joining._known) <= joining._MAX_KNOWN

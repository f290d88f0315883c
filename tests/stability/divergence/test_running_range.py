from __future__ import annotations

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stability.divergence.running_range import RunningRange


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 20))
def test_it_is_that_of_the_last_values(values: list[float], window: int) -> None:
    running, last = RunningRange(window), deque(maxlen=window)
    for value in values:
        running.append(value)
        last.append(value)
        assert running.median() == pytest.approx(float(np.median(last)))
        assert running.largest() == max(last)
        assert list(running.values) == list(last)
        assert running.spread() >= 0
        assert running.upper_spread() >= 0


def test_its_spreads_are_standard_deviations_of_normal_values() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, 20_000).tolist()
    running = RunningRange(len(values), values)
    assert running.spread() == pytest.approx(2.0, rel=0.03)
    assert running.upper_spread() == pytest.approx(2.0, rel=0.03)


def test_the_newest_value_of_a_straight_line_is_as_far_whatever_the_slope() -> None:
    for slope in (0.01, 100.0):
        running = RunningRange(101, [slope * i for i in range(101)])
        assert (slope * 100 - running.median()) / running.spread() == pytest.approx(1.35, rel=0.01)

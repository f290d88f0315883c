"""Packing one rank's scalars into an agreed order, without other ranks."""

from __future__ import annotations

import math

import pytest
import torch

from probes.layout import Layout, Packing, slots_of
from probes.pending import Pending
from probes.record import ALL_LAYERS, Series, series_of

CPU = torch.device("cpu")
NORM, MAXIMUM, LOSS = series_of("a", "grad_norm"), series_of("a", "grad_max_abs"), Series(ALL_LAYERS, "loss")


def pending(*, has_maximum: bool = True) -> Pending:
    collected = Pending()
    if has_maximum:
        collected.add(MAXIMUM, torch.tensor(7.0))
    collected.add_each([NORM, NORM], torch.tensor([3.0, 4.0], dtype=torch.float64), weight=[0.5, 1.0])
    collected.add(series_of("a", "activation_rms"), torch.tensor(8), factor=0.25, weight=torch.tensor(16))
    collected.add_number(LOSS, 2.5)
    return collected


def test_values_and_weights_go_where_the_layout_has_them() -> None:
    layout = Layout(slots_of(pending())[::-1], [], CPU)
    packing = Packing(pending(), layout, CPU)
    values, weights = packing.pack(pending()).tolist()
    # Backwards, and behind it whether there is more.
    # The norm is sqrt(3²/2 + 4²): what a rank has several of is joined before it is sent.
    assert values == [2.5, 2.0, pytest.approx(20.5**0.5), 7.0, 0.0]
    assert weights == [1.0, 16.0, 1.0, 1.0, 1.0]
    assert packing.left_out(pending()) is None


def test_more_measurements_of_a_series_need_no_other_layout() -> None:
    layout, more = Layout(slots_of(pending()), [], CPU), pending()
    for _ in range(3):
        more.add_number(LOSS, 6.5)
    packing = Packing(more, layout, CPU)
    values, weights = packing.pack(more).tolist()
    assert (values[-2], weights[-2]) == (5.5, 4.0)
    assert values[-1] == 0.0
    assert packing.left_out(more) is None


def test_whether_a_value_is_exact_needs_no_other_layout() -> None:
    entropy = Series("a", "attention/entropy")
    sampled, whole = Pending(), Pending()
    value, error = torch.tensor(1.5), torch.tensor(0.5)
    sampled.add(entropy._replace(kind="estimate"), value, error, weight=torch.tensor(8))
    whole.add(entropy, torch.tensor(2.5), weight=torch.tensor(4))
    layout = Layout(slots_of(sampled), [], CPU)
    assert Packing(sampled, layout, CPU).pack(sampled).tolist() == [[1.5, 0.5, 0.0], [-8.0, -8.0, 1.0]]
    packing = Packing(whole, layout, CPU)
    assert packing.pack(whole).tolist() == [[2.5, 0.0, 0.0], [4.0, 0.0, 1.0]]
    assert packing.left_out(whole) is None
    assert layout.inexact(entropy).kind == "estimate"
    assert layout.inexact(Series("a", "attention/max_logit")).kind == "lower_bound"


def test_what_is_not_measured_has_no_weight() -> None:
    layout = Layout(slots_of(pending()), [], CPU)
    few = pending(has_maximum=False)
    values, weights = Packing(few, layout, CPU).pack(few).tolist()
    assert (values[0], weights[0]) == (0.0, 0.0)
    assert values[1] == pytest.approx(20.5**0.5)


def test_what_has_no_slot_is_flagged_and_left_out() -> None:
    slots = [slot for slot in slots_of(pending()) if slot.series not in (LOSS, MAXIMUM)]
    packing = Packing(pending(), Layout(slots, [], CPU), CPU)
    values, weights = packing.pack(pending()).tolist()
    assert values == [pytest.approx(20.5**0.5), 2.0, 1.0]
    assert weights[-1] == 1.0
    left_out = packing.left_out(pending())
    assert left_out is not None
    [measurement] = left_out.measurements
    assert (list(measurement.series), measurement.tensor.tolist()) == ([MAXIMUM], [7.0])
    assert [number.series for number in left_out.numbers] == [LOSS]


def test_a_gradient_that_has_no_slot_leaves_the_norm_of_the_model_out() -> None:
    slots = [slot for slot in slots_of(pending()) if slot.series != NORM]
    values, weights = Packing(pending(), Layout(slots, [], CPU), CPU).pack(pending()).tolist()
    assert values[-1] == 1.0
    assert math.isnan(weights[-1])


def test_what_was_given_up_is_marked_even_if_some_of_it_was_measured() -> None:
    layout, collected = Layout(slots_of(pending()), [], CPU), pending(has_maximum=False)
    packing = Packing(collected, layout, CPU)
    collected.given_up = frozenset({"gradients"})
    assert not packing.fits(collected)
    weights = Packing(collected, layout, CPU).pack(collected)[1].tolist()
    assert [math.isnan(weight) for weight in weights] == [True, True, False, False, False]


def test_a_packing_fits_as_long_as_the_same_is_measured() -> None:
    packing = Packing(pending(), Layout(slots_of(pending()), [], CPU), CPU)
    assert packing.fits(pending())
    assert not packing.fits(pending(has_maximum=False))


def test_factors_and_weights_may_change_from_step_to_step() -> None:
    layout = Layout(slots_of(pending()), [], CPU)
    packing = Packing(pending(), layout, CPU)
    packing.pack(pending())
    changed = pending()
    changed.measurements[1] = changed.measurements[1]._replace(weight=[0.25, 1.0])
    changed.measurements[2] = changed.measurements[2]._replace(factor=0.5)
    values, _ = packing.pack(changed).tolist()
    assert values[1] == pytest.approx((9 / 4 + 16) ** 0.5)
    assert values[2] == 4.0


def test_an_empty_step_packs_too() -> None:
    layout = Layout(slots_of(pending()), [], CPU)
    assert Packing(Pending(), layout, CPU).pack(Pending()).tolist()[1] == [0, 0, 0, 0, 1]

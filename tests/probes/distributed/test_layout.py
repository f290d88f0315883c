"""Packing one rank's scalars into an agreed order, without other ranks."""

from __future__ import annotations

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
    assert values == [2.5, 2.0, 4.0, 3.0, 7.0, 0.0]
    assert weights == [1.0, 16.0, 1.0, 0.5, 1.0, 1.0]
    assert packing.left_out(pending()) is None


def test_several_measurements_of_a_series_have_a_slot_each() -> None:
    assert [slot.part for slot in slots_of(pending()) if slot.series == NORM] == [0, 1]


def test_what_is_not_measured_has_no_weight() -> None:
    layout = Layout(slots_of(pending()), [], CPU)
    few = pending(has_maximum=False)
    values, weights = Packing(few, layout, CPU).pack(few).tolist()
    assert (values[0], weights[0]) == (0.0, 0.0)
    assert values[1:3] == [3.0, 4.0]


def test_what_has_no_slot_is_flagged_and_left_out() -> None:
    slots = [slot for slot in slots_of(pending()) if slot.series != LOSS and slot.part == 0]
    packing = Packing(pending(), Layout(slots, [], CPU), CPU)
    values, weights = packing.pack(pending()).tolist()
    assert values == [7.0, 3.0, 2.0, 1.0]
    assert weights[-1] == 1.0
    left_out = packing.left_out(pending())
    assert left_out is not None
    [measurement] = left_out.measurements
    assert (list(measurement.series), measurement.tensor.tolist()) == ([NORM], [4.0])
    assert [number.series for number in left_out.numbers] == [LOSS]


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
    values, weights = packing.pack(changed).tolist()
    assert weights[1] == 0.25
    assert values[3] == 4.0


def test_an_empty_step_packs_too() -> None:
    layout = Layout(slots_of(pending()), [], CPU)
    assert Packing(Pending(), layout, CPU).pack(Pending()).tolist()[1] == [0, 0, 0, 0, 0, 1]

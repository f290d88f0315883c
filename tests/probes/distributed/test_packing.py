"""Packing one rank's scalars into an agreed order, without other ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from probes.layout import Layout, slots_of
from probes.packing import Packing
from probes.pending import Pending
from probes.record import ALL_LAYERS, Series, series_of
from probes.transfer import Transfer

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


def packed(collected: Pending, layout: Layout, packing: Packing | None = None) -> tuple[list, list]:
    """The values that one rank alone would record, slot by slot, and the weights that it sends."""
    sent = (packing or Packing(collected, layout, CPU)).pack(collected)
    joined = layout.reduction.finish(layout.reduction.over_ranks(sent[None]).numpy())
    return joined.values.tolist(), sent[1].tolist()


def test_values_and_weights_go_where_the_layout_has_them() -> None:
    layout = Layout(slots_of(pending())[::-1], [], CPU)
    packing = Packing(pending(), layout, CPU)
    values, weights = packed(pending(), layout, packing)
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
    values, weights = packed(more, layout, packing)
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
    assert packed(sampled, layout) == ([1.5, 0.5, 0.0], [-8.0, -1.0, 1.0])
    packing = Packing(whole, layout, CPU)
    values, weights = packed(whole, layout, packing)
    assert (values[0], weights) == (2.5, [4.0, 0.0, 1.0])
    assert packing.left_out(whole) is None
    assert layout.inexact(entropy).kind == "estimate"
    assert layout.inexact(Series("a", "attention/max_logit")).kind == "lower_bound"


def test_what_is_not_measured_has_no_weight() -> None:
    layout = Layout(slots_of(pending()), [], CPU)
    few = pending(has_maximum=False)
    values, weights = packed(few, layout)
    assert weights[0] == 0.0
    assert values[1] == pytest.approx(20.5**0.5)


def test_what_has_no_slot_is_flagged_and_left_out() -> None:
    slots = [slot for slot in slots_of(pending()) if slot.series not in (LOSS, MAXIMUM)]
    layout = Layout(slots, [], CPU)
    packing = Packing(pending(), layout, CPU)
    values, weights = packed(pending(), layout, packing)
    assert values == [pytest.approx(20.5**0.5), 2.0, 1.0]
    assert weights[-1] == 1.0
    left_out = packing.left_out(pending())
    assert left_out is not None
    [measurement] = left_out.measurements
    assert (list(measurement.series), measurement.tensor.tolist()) == ([MAXIMUM], [7.0])
    assert [number.series for number in left_out.numbers] == [LOSS]


def test_a_gradient_that_has_no_slot_leaves_the_norm_of_the_model_out() -> None:
    slots = [slot for slot in slots_of(pending()) if slot.series != NORM]
    values, weights = packed(pending(), Layout(slots, [], CPU))
    assert values[-1] == 1.0
    assert math.isnan(weights[-1])


def test_what_was_given_up_is_marked_even_if_some_of_it_was_measured() -> None:
    layout, collected = Layout(slots_of(pending()), [], CPU), pending(has_maximum=False)
    packing = Packing(collected, layout, CPU)
    collected.given_up = frozenset({"gradients"})
    assert not packing.fits(collected)
    _, weights = packed(collected, layout)
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
    values, _ = packed(changed, layout, packing)
    assert values[1] == pytest.approx((9 / 4 + 16) ** 0.5)
    assert values[2] == 4.0


def sampled_and_whole(count: Tensor, other_count: Tensor) -> Pending:
    """Two batches: sampled rows of the first, all rows of the second."""
    entropy, collected = Series("a", "attention/entropy"), Pending()
    collected.add(entropy._replace(kind="estimate"), torch.tensor(1.0), torch.tensor(0.5), weight=count)
    collected.add(entropy, torch.tensor(2.0), weight=other_count)
    return collected


def test_a_mean_with_an_exact_part_has_the_standard_error_that_one_process_records() -> None:
    collected = sampled_and_whole(torch.tensor(8), torch.tensor(4))
    values, weights = packed(collected, Layout(slots_of(collected), [], CPU))
    assert values[:2] == [1.5, 0.25]  # of two parts one is exact
    assert weights == [-12.0, -1.0, 1.0]
    alone = Transfer(0, collected).wait()
    assert (alone.values.tolist(), alone.standard_errors.tolist()) == ([1.5], [0.25])


def test_weights_on_the_device_are_read_at_every_step() -> None:
    first = sampled_and_whole(torch.tensor(8), torch.tensor(4))
    layout = Layout(slots_of(first), [], CPU)
    packing = Packing(first, layout, CPU)
    assert packed(first, layout, packing)[1][0] == -12.0
    second = sampled_and_whole(torch.tensor(6), torch.tensor(1))
    assert packing.fits(second)
    assert packed(second, layout, packing)[1][0] == -7.0


def test_measurements_that_share_a_weight_need_another_packing_if_they_do_no_more() -> None:
    count = torch.tensor(5)
    shared = sampled_and_whole(count, count)
    layout = Layout(slots_of(shared), [], CPU)
    packing = Packing(shared, layout, CPU)
    assert packed(shared, layout, packing)[1][0] == -10.0
    assert not packing.fits(sampled_and_whole(torch.tensor(5), torch.tensor(3)))


def test_a_mean_over_no_rows_does_not_count() -> None:
    collected = Pending()
    collected.add(Series("a", "attention/entropy"), torch.tensor(math.nan), weight=torch.tensor(0))
    collected.add(Series("a", "attention/entropy"), torch.tensor(2.0), weight=torch.tensor(3))
    values, weights = packed(collected, Layout(slots_of(collected), [], CPU))
    assert (values[0], weights[0]) == (2.0, 3.0)


def test_an_empty_step_packs_too() -> None:
    layout = Layout(slots_of(pending()), [], CPU)
    assert Packing(Pending(), layout, CPU).pack(Pending()).tolist()[1] == [0, 0, 0, 0, 1]


def test_numbers_of_the_host_are_those_of_the_step() -> None:
    layout = Layout(slots_of(pending()), [], CPU)
    packing, later = Packing(pending(), layout, CPU), pending()
    assert packed(pending(), layout, packing)[0][-2] == 2.5
    later.numbers[0] = later.numbers[0]._replace(value=7.5)
    assert packing.fits(later)
    assert packed(later, layout, packing)[0][-2] == 7.5


def test_weights_of_another_dtype_are_packed_anew() -> None:
    layout, other = Layout(slots_of(pending()), [], CPU), pending()
    (index,) = [i for i, m in enumerate(other.measurements) if isinstance(m.weight, Tensor)]
    other.measurements[index] = other.measurements[index]._replace(weight=torch.tensor(16.0))
    packing = Packing(pending(), layout, CPU)
    assert packing.fits(pending())
    assert not packing.fits(other)


def test_a_default_device_changes_nothing() -> None:
    with torch.device("meta"):
        layout = Layout(slots_of(pending()), [], CPU)
        packing = Packing(pending_on_cpu := _on_cpu(), layout, CPU)
        assert packing.pack(pending_on_cpu).device == CPU


def _on_cpu() -> Pending:
    with CPU:
        return pending()


def test_names_follow_what_is_there_and_exact() -> None:
    layout = Layout(slots_of(pending()), [], CPU)
    whole, few = pending(), pending(has_maximum=False)

    def names(collected: Pending) -> list[tuple[Series, ...]]:
        sent = Packing(collected, layout, CPU).pack(collected)
        joined = layout.reduction.finish(layout.reduction.over_ranks(sent[None]).numpy())
        return [names for names, *_ in layout.parts(joined)]

    first = names(whole)
    assert MAXIMUM in first[0]
    assert MAXIMUM not in names(few)[0]
    again = names(whole)
    assert [id(each) for each in again] == [id(each) for each in first]

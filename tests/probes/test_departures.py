"""Layers that leave their past and their peers, and the story that is told of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from probes.departures import departures, until
from probes.grids import ByQuantity
from probes.reading import RecordedSeries
from probes.story import tell
from stability.divergence import ALL_LAYERS, Alert

LAYERS = [f"blocks.{index}" for index in range(12)]
STEPS = np.arange(400)


def sound_run() -> np.ndarray:
    """Every layer at its own level, all falling together, with noise."""
    generator = np.random.default_rng(0)
    levels = 10.0 ** np.linspace(-3, 1, 12)[:, None]
    return levels * np.exp(-STEPS / 100) * generator.lognormal(sigma=0.1, size=(12, 400))


def groups(values: np.ndarray, quantity: str = "grad_norm") -> ByQuantity:
    return {quantity: {layer: RecordedSeries(STEPS, row) for layer, row in zip(LAYERS, values, strict=True)}}


def test_the_layer_that_grows_is_the_first_and_its_step_is_dated() -> None:
    values = sound_run()
    values[7, 200:] *= 1.05 ** np.arange(200)
    first, second, *_ = departures(groups(values), LAYERS)
    assert (first.layer, first.quantity) == ("blocks.7", "grad_norm")
    assert 208 <= first.step <= 222  # a factor of two at 5 % a step takes 14
    assert first.farthest_step == pytest.approx(399, abs=5)
    assert first.decades == pytest.approx(200 * math.log10(1.05), abs=0.2)
    assert second.decades < 0.3


def test_what_all_layers_do_is_no_departure() -> None:
    values = sound_run() * np.where(STEPS > 300, 1e4, 1.0)
    assert departures(groups(values), LAYERS)[0].decades < 0.3
    story = tell([], departures(groups(values), LAYERS))
    assert (story.title, story.layer) == ("Nothing stands out", None)


def test_a_collapse_counts_as_much_as_a_growth() -> None:
    values = sound_run()
    values[3, 250:] *= 1e-4
    first = departures(groups(values, "attention/entropy"), LAYERS)[0]
    assert first.layer == "blocks.3"
    assert first.step in (250, 251)  # a column has two steps here


def test_what_is_not_finite_comes_before_all_else_and_the_earliest_is_the_origin() -> None:
    values = sound_run()
    values[2, 300:] *= 1e9
    values[5, 321:] = np.nan
    values[6, 320:] = np.inf
    ranking = departures(groups(values), LAYERS)
    assert [departure.layer for departure in ranking[:3]] == ["blocks.6", "blocks.5", "blocks.2"]
    story = tell([], ranking)
    assert (story.layer, story.step, story.what) == ("blocks.6", 320, "non finite")
    assert "No alert was recorded" in story.sentence


def test_a_layer_that_left_before_anything_broke_is_the_origin() -> None:
    values = sound_run()
    values[7, 200:] *= 1.1 ** np.arange(200)
    values[:, 320:] = np.nan
    ranking = departures(groups(values), LAYERS)
    story = tell([], ranking, departures(until(groups(values), 320), LAYERS))
    assert story.layer == "blocks.7"
    assert story.step is not None
    assert 204 <= story.step <= 212
    assert "from step 320 on, values are not finite" in story.sentence


def test_a_spike_that_was_over_long_before_is_another_story() -> None:
    values = sound_run()
    values[7, 200] *= 1e6
    values[3, 320:] = np.nan
    before = departures(until(groups(values), 320), LAYERS)
    assert before[0].layer == "blocks.7"
    story = tell([], departures(groups(values), LAYERS), before)
    assert (story.layer, story.step) == ("blocks.3", 320)


def test_layers_that_are_next_to_nothing_do_not_lead() -> None:
    """Denormal numbers against denormal numbers, and what grows without ever counting beside the others."""
    values = sound_run()
    values[7, 200:] *= 1.05 ** np.arange(200)
    for row, (before, after) in enumerate([(1e-44, 1e-38), (1e-43, 1e-33), (1e-20, 1e-12), (1e-30, 1e-44)]):
        values[row] = np.where(STEPS < 200, before, after)
    first, second, *_ = departures(groups(values), LAYERS)
    assert first.layer == "blocks.7"
    assert first.decades == pytest.approx(200 * math.log10(1.05), abs=0.2)
    assert second.decades < 0.3
    assert departures(groups(values * 1e-60), LAYERS)[0].decades == 0


def test_a_layer_that_vanishes_or_wakes_is_still_the_first() -> None:
    values = sound_run()
    values[7, 200:] *= 1e-41
    assert departures(groups(values), LAYERS)[0].layer == "blocks.7"
    values[7] = np.where(STEPS < 200, 1e-41, 1.0)
    first = departures(groups(values), LAYERS)[0]
    assert (first.layer, first.step in (200, 201)) == ("blocks.7", True)
    assert 5 < first.decades < 8


def test_zeros_and_negative_values_are_passed_over() -> None:
    values = np.zeros((12, 400))
    values[4] = -1.0
    assert departures(groups(values, "attention/max_logit"), LAYERS) == []


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_run_too_short_to_compare(num_steps: int) -> None:
    short = {layer: RecordedSeries(STEPS[:num_steps], np.ones(num_steps)) for layer in (*LAYERS, ALL_LAYERS)}
    ranking = departures({"grad_norm": short}, LAYERS)
    assert all(departure.decades == 0 for departure in ranking)
    assert tell([], ranking).layer is None


ALERT = Alert(30, "blocks.2", "grad_norm", "warning", 1.0, None, "it rose.", kind="gradient-explosion")


def test_alerts_come_before_what_is_plain_and_divergence_before_warnings() -> None:
    divergence = replace(ALERT, step=90, layer="blocks.9", severity="divergence", onset_step=80)
    values = sound_run()
    values[7, 200:] *= 1e6
    story = tell([ALERT, divergence], departures(groups(values), LAYERS))
    assert (story.layer, story.step) == ("blocks.9", 80)
    assert tell([ALERT], []).title == "gradient explosion in blocks.2"


def test_of_warnings_an_event_is_told_before_the_condition_that_came_first() -> None:
    growth = replace(ALERT, kind="logit-growth")
    spike = Alert(900, ALL_LAYERS, "loss", "warning", 9.0, 2.0, "it jumped.", kind="loss-spike")
    story = tell([growth, spike, replace(spike, step=950)], [])
    assert (story.title, story.step) == ("loss spike in the whole model", 900)
    assert story.sentence.endswith("it jumped. Before it came logit growth in `blocks.2` at step 30.")
    assert story.spread == ("blocks.2",)
    follows = replace(spike, reason=f"it jumped. It follows {growth.in_short}.")
    assert tell([growth, follows], []).sentence.count("at step 30") == 1
    assert tell([growth, replace(growth, step=60)], []).step == 30
    divergence = replace(growth, step=60, severity="divergence", onset_step=25)
    assert tell([growth, spike, divergence], []).step == 25
    assert "Before it" not in tell([growth, divergence], []).sentence

"""The few numbers of a step, and the charts for them."""

from __future__ import annotations

import math

import numpy as np

from probes.record import ALL_LAYERS, Series
from probes.sinks.overview import PREFIX, Overview, layout

SERIES = (
    Series("a", "grad_norm"),
    Series("b", "grad_norm"),
    Series(ALL_LAYERS, "grad_norm"),
    Series("a", "attention/entropy"),
    Series("b", "attention/entropy"),
    Series("b", "attention/entropy", head=0),
    Series("a", "attention/max_logit"),
    Series("a", "attention/jacobian_frobenius"),
    Series("b", "attention/jacobian_frobenius"),
)
VALUES = np.array([10.0, 1000.0, 100.0, 3.0, 1.0, -9.0, -5.0, 0.2, 0.4])


def numbers(values: np.ndarray) -> dict[str, float]:
    overview = Overview.of(SERIES)
    return dict(zip(overview.tags, overview.values(values, 2000.0, 3), strict=True))


def test_numbers_of_a_step() -> None:
    shown = {tag.removeprefix(PREFIX): round(float(value), 6) for tag, value in numbers(VALUES).items()}
    assert shown == {
        "log10_grad_norm": 2.0,
        "peak_grad_norm": 2000.0,
        "log10_worst_layer_grad_norm": 3.0,
        "entropy_min": 1.0,
        "entropy_median": 2.0,
        "entropy_max": 3.0,
        "log10_max_logit_min": -2.0,  # negative logits count as 0.01
        "log10_max_logit_median": -2.0,
        "log10_max_logit_max": -2.0,
        "jacobian_frobenius_median": 0.3,
        "alerts": 3,
    }


def test_extremes() -> None:
    for value, logarithm in ((0.0, -math.inf), (math.inf, math.inf), (math.nan, math.nan)):
        values = VALUES.copy()
        values[:3] = value
        shown = numbers(values)
        for name in ("log10_grad_norm", "log10_worst_layer_grad_norm"):
            np.testing.assert_equal(shown[PREFIX + name], logarithm)


def test_a_step_without_gradients_still_counts_alerts() -> None:
    overview = Overview.of([Series("a", "activation_rms")])
    assert (overview.tags, overview.values(np.ones(1), 0.0, 2)) == ([f"{PREFIX}alerts"], [2])


def test_the_layout_has_the_charts_that_can_be_filled() -> None:
    (charts,) = layout(Overview.of(SERIES).tags).values()
    assert [title.split(":")[0].split(" (")[0] for title in charts] == [
        "log10 gradient norm",
        "Attention entropy",
        "log10 largest logit",
        "Softmax against sigmoid",
        "Alerts so far",
        "Alerts by layer",
    ]
    shown = {tag.strip("^$") for _, tags in charts.values() for tag in tags}
    assert shown - {"alert/.+"} == set(Overview.of(SERIES).tags) - {f"{PREFIX}peak_grad_norm"}
    (charts,) = layout(Overview.of(SERIES[:3]).tags).values()
    assert len(charts) == 3

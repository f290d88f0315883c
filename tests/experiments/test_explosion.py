from __future__ import annotations

import numpy as np
import pytest

from experiments.explosion import FIRST_STEPS, Run, judge

STEPS = 40


def run(
    *, grad_norms=1.0, losses=0.5, layers=None, rate=1e-3, mechanism="softmax", seed=0, interrupted=False
) -> Run:
    """A run of forty steps whose mean predictor has loss 1; numbers stand for constant series."""

    def series(value):
        return np.broadcast_to(np.asarray(value, dtype=float), STEPS) if np.ndim(value) == 0 else value

    norms = {layer: series(value) for layer, value in (layers or {}).items()}
    arrays = (series(losses), np.ones(len(series(losses))), series(grad_norms))
    return Run(mechanism, rate, seed, *arrays, norms, 1.0, interrupted)


def spike(height: float, at: int) -> np.ndarray:
    return np.where(np.arange(STEPS) == at, height, 1.0)


def test_a_calm_run_that_learns_is_stable():
    (row,) = judge([run()])
    assert row.verdict == "stable"
    assert (row.first_peak, row.peak, row.median, row.last, row.orders) == (1, 1, 1, 1, 0)
    assert row.first_layer is None


def test_a_calm_run_at_the_mean_is_not_stable():
    assert judge([run(losses=0.95)])[0].verdict == "no learning"


def test_a_first_steps_transient_is_no_explosion():
    (row,) = judge([run(grad_norms=spike(1e6, at=FIRST_STEPS - 1))])
    assert (row.verdict, row.first_peak, row.peak) == ("stable", 1e6, 1)


@pytest.mark.parametrize(("height", "verdict"), [(0.99e4, "stable"), (1e4, "exploded")])
def test_the_threshold_after_the_first_steps(height, verdict):
    assert judge([run(grad_norms=spike(height, at=FIRST_STEPS))])[0].verdict == verdict


@pytest.mark.parametrize("what", ["losses", "grad_norms"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_numbers_are_an_explosion_at_any_step(what, value):
    (row,) = judge(
        [run(**{what: np.array([1.0, 1.0, value])})]
        if what == "losses"
        else [run(losses=np.ones(3), grad_norms=np.array([1.0, 1.0, value]))]
    )
    assert row.verdict == "exploded"


def test_divergence_needs_more_than_the_first_loss():
    assert judge([run(losses=np.where(np.arange(STEPS) == 0, 15.0, 14.0))])[0].verdict == "no learning"
    assert judge([run(losses=np.where(np.arange(STEPS) == 0, 1.0, 2.1))])[0].verdict == "diverged"


def test_short_and_interrupted_runs():
    short = np.ones(FIRST_STEPS)
    assert judge([run(losses=short, grad_norms=short)])[0].verdict == "too short"
    assert judge([run(interrupted=True)])[0].verdict == "interrupted"
    (nothing,) = judge([run(losses=np.empty(0), grad_norms=np.empty(0), interrupted=True)])
    assert (nothing.verdict, nothing.peak, nothing.last) == ("interrupted", None, None)


def test_the_baseline_is_the_gentlest_run_that_learned_of_the_same_mechanism_and_seed():
    wild = run(rate=3.0, grad_norms=200.0, losses=0.99)
    others = [
        run(rate=1e-4, grad_norms=9.0, losses=0.99),  # gentler, but at the mean
        run(rate=1e-3, grad_norms=2.0),
        run(rate=1e-2, grad_norms=4.0),
        run(rate=1e-4, grad_norms=7.0, mechanism="sigmoid"),
        run(rate=1e-4, grad_norms=8.0, seed=1),
        run(rate=1e-5, grad_norms=6.0, interrupted=True),
    ]
    row = judge([wild, *others])[0]
    assert row.healthy_median == 2.0
    assert row.orders == pytest.approx(2.0)


def test_without_a_run_that_learned_there_is_no_baseline():
    (row,) = judge([run(losses=1.0, grad_norms=1e9)])
    assert (row.healthy_median, row.orders, row.verdict) == (None, None, "no learning")


def test_the_first_layer_is_the_first_to_cross_its_own_baseline():
    steps = np.arange(STEPS)
    healthy = run(layers={"early": 1.0, "late": 1e-3, "calm": 1.0})
    wild = run(
        rate=1.0,
        grad_norms=1e5,
        layers={
            "early": np.where(steps >= 12, 1e4, 1.0),
            "late": np.where(steps >= 11, 1e2, 1e-3),
            "calm": 9e3,
        },
    )
    assert judge([healthy, wild])[1].first_layer == "late"


def test_without_a_baseline_the_first_layer_is_the_first_without_a_number():
    layers = {"a": np.array([1.0, 1e30, np.nan]), "b": np.array([1.0, np.inf, np.nan])}
    (row,) = judge(
        [run(losses=np.array([1, 1, np.nan]), grad_norms=np.array([1, np.inf, np.nan]), layers=layers)]
    )
    assert row.first_layer == "b"

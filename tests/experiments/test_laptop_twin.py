"""The laptop preset shows what was found at 160M, by the same signals (docs/stress-test.md)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.long_run import train_piece
from experiments.run_records import read_run
from experiments.stress_plan import planned_runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mechanism", "kind", "quantity", "limit"),
    [
        ("sigmoid", "row-sum-growth", "attention/row_sum", 32.0),
        ("softmax", "logit-growth", "attention/max_logit", 32.0),
    ],
)
def test_first_signal_at_a_rate_that_is_too_large(tmp_path, mechanism, kind, quantity, limit):
    """Well before the loss tells: of 400 steps, in which nothing is learned, the thirtieth."""
    name = f"laptop-rate-1e-2-{mechanism}-seed0"
    config = replace(planned_runs("laptop")[name][1], steps=35)
    assert train_piece(config, cells=tmp_path / "none", work=tmp_path, device="cpu", minutes=5)
    run = read_run(tmp_path / f"{name}.npz")
    assert (run.alerts[0]["step"], run.alerts[0]["kind"]) == (30, kind)
    assert run.values(quantity, run.alerts[0]["layer"]).max() > limit

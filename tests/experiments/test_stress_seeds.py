from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.run_records import RecordTable, write_run
from experiments.stress_ledger import read_runs
from experiments.stress_seeds import collapsed_layers, main, seeds_of, summarise
from probes.record import ALL_LAYERS, Series, StepRecords


def write(
    folder: Path, name: str, mechanism: str, *, seed: int = 0, steps: int = 2500, rate: float = 1e-3
) -> None:
    """Softmax grows ten-fold from step 2,000 on, and its one layer collapses; sigmoid's MLP is frozen."""
    table = RecordTable()
    is_softmax = mechanism == "softmax"
    series = (
        Series(ALL_LAYERS, "grad_norm"),
        Series("blocks.0.attention", "attention/entropy", kind="bound"),
        Series("blocks.0.mlp.hidden", "adam_update_rms"),
    )
    for step in range(steps):
        has_grown = is_softmax and step >= 2000
        values = np.array([2.0 if has_grown else 0.2, 0.01 if has_grown else 3, 0.5 if is_softmax else 1e-5])
        table.write(StepRecords(step, series, values, np.full(3, math.nan)))
    facts = {
        "config": {
            "name": name, "mechanism": mechanism, "seed": seed, "steps": steps, "learning_rate": rate,
        },
        "steps": steps,
        "metric": "cross-entropy, nats",
        "reference": 9.2,
        "without_attention": 9.1,
        "validation": [(at, loss) for at, loss in ((250, 9.19), (500, 9.14), (750, 9.16)) if at <= steps],
    }  # fmt: skip
    write_run(folder / f"{name}.npz", facts, table.arrays())


def test_rows_and_figure(tmp_path, capsys):
    write(tmp_path, "lead-softmax-seed0", "softmax")
    write(tmp_path, "lead-sigmoid-seed0", "sigmoid")
    write(tmp_path, "again-softmax-seed1", "softmax", seed=1, steps=100)
    write(tmp_path, "other-softmax-seed0", "softmax", rate=3e-3, steps=100)
    out = tmp_path / "out"
    assert main([str(tmp_path), "--run", "lead-sigmoid-seed0", "--out", str(out)]) == 0
    table = (out / "seeds.md").read_text()
    assert table == capsys.readouterr().out
    assert table.splitlines()[2:] == [
        "| again-softmax-seed1 | 100 | – | – | – | – | – | 0 | 0 | – | – | – |",
        "| lead-sigmoid-seed0 | 2500 | 0.200 | 300 | – | 1.0 | 1 | – | 1 | 500 | 9.140 | 9.160 |",
        "| lead-softmax-seed0 | 2500 | 0.200 | 300 | 1975 | 5.5 | 10 | 1 | 0 | 500 | 9.140 | 9.160 |",
    ]
    assert (out / "seeds.png").stat().st_size > 10_000


def test_growth_begins_where_a_median_of_fifty_steps_has_doubled(tmp_path):
    write(tmp_path, "lead-softmax-seed0", "softmax", steps=3500)
    (run,) = read_runs([tmp_path]).values()
    row = summarise(run)
    assert row.grows_from == 1975  # half of the fifty steps from there on are above
    assert row.late == pytest.approx(10)
    steps, counts = collapsed_layers(run)
    assert steps[np.flatnonzero(counts)[0]] == 2000


def test_what_was_not_measured_is_not_zero(tmp_path):
    write(tmp_path, "lead-softmax-seed0", "softmax", steps=1400)
    (run,) = read_runs([tmp_path]).values()
    norms = {series: values for series, values in run.series.items() if series.quantity == "grad_norm"}
    row = summarise(replace(run, series=norms))
    assert (row.collapsed_layers, row.frozen_mlps) == (None, None)
    ((series, (steps, values)),) = norms.items()
    for number in (0, math.nan):
        row = summarise(replace(run, series={series: (steps, np.full_like(values, number))}))
        assert (row.calm, row.calm_from, row.grows_from, row.largest) == (None, None, None, None)


def test_a_norm_that_is_no_number_is_growth(tmp_path):
    write(tmp_path, "lead-softmax-seed0", "softmax", steps=1900)
    (run,) = read_runs([tmp_path]).values()
    ((series, (steps, norms)),) = [item for item in run.series.items() if item[0].quantity == "grad_norm"]
    broken = norms.copy()
    broken[[700, *range(1800, 1900)]] = np.nan
    facts = run.facts | {"validation": [(250, math.nan), (500, 9.14)]}
    row = summarise(replace(run, facts=facts, series={series: (steps, broken)}))
    assert (row.calm, row.grows_from, row.largest) == (pytest.approx(0.2), 1775, math.inf)
    assert row.lowest_validation == 9.14


def test_a_regression_learns_a_share_of_the_variance(tmp_path):
    write(tmp_path, "lead-softmax-seed0", "softmax", steps=100)
    (run,) = read_runs([tmp_path]).values()
    losses = [(250, 9.1), (500, 8.5)]  # 0.01 and 0.08 of a variance of 9.2 explained
    row = summarise(replace(run, facts=run.facts | {"metric": "mean squared error", "validation": losses}))
    assert row.learns_from == 500


def test_a_run_that_is_not_there(tmp_path, capsys):
    write(tmp_path, "lead-softmax-seed0", "softmax", steps=100)
    with pytest.raises(ValueError, match="one of the runs lead-softmax-seed0; got 'x'"):
        seeds_of(read_runs([tmp_path]), "x")
    assert main([str(tmp_path), "--run", "x", "--out", str(tmp_path / "out")]) == 2
    assert "stress_seeds: Expected one of the runs" in capsys.readouterr().err

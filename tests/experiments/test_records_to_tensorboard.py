from __future__ import annotations

import math

import numpy as np

import probes
from experiments.records_to_tensorboard import main
from experiments.run_records import RecordTable, write_run
from probes.record import ALL_LAYERS, Series, StepRecords
from stability.divergence import Alert


def test_each_fourth_step_of_whole_layers_is_kept(tmp_path):
    table = RecordTable()
    series = (
        Series(ALL_LAYERS, "loss"),
        Series("blocks.0.attention", "attention/entropy"),
        Series("blocks.0.attention", "attention/entropy", head=0),
    )
    for step in range(10):
        table.write(StepRecords(step, series, np.array([step, 2.0 * step, 0.0]), np.full(3, math.nan)))
    table.write_alert(Alert(3, "blocks.0.attention", "attention/entropy", "warning", 6.0, 9.0, "It fell."))
    write_run(tmp_path / "a.npz", {"config": {"name": "a"}, "steps": 10}, table.arrays())
    assert main([str(tmp_path / "a.npz"), "--out", str(tmp_path / "runs"), "--every", "4"]) == 0
    run = probes.read(tmp_path / "runs" / "a")
    assert run["loss/(all)"].steps.tolist() == [0, 4, 8]
    assert run["attention/entropy/blocks.0.attention"].values.tolist() == [0.0, 8.0, 16.0]
    assert set(run) - {"alert/attention/entropy/blocks.0.attention"} == {
        "loss/(all)",
        "attention/entropy/blocks.0.attention",
    }
    assert [(alert.step, alert.layer) for alert in run.alerts] == [(3, "blocks.0.attention")]


def test_no_records(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "runs")]) == 2
    assert "there are none" in capsys.readouterr().err

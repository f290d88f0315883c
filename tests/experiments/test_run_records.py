from __future__ import annotations

import math

import numpy as np

from experiments.run_records import RecordTable, read_run, write_run
from probes.record import ALL_LAYERS, Series, StepRecords
from stability.divergence import Alert

LOSS, NORM = Series(ALL_LAYERS, "loss"), Series(ALL_LAYERS, "grad_norm")
HEAD = Series("blocks.0.attention", "attention/entropy", head=1, kind="estimate")


def step(number: int, **values: float) -> StepRecords:
    series = {"loss": LOSS, "norm": NORM, "head": HEAD}
    return StepRecords(
        number,
        tuple(series[name] for name in values),
        np.array(list(values.values())),
        np.full(len(values), math.nan),
    )


def filled() -> RecordTable:
    table = RecordTable()
    table.write(step(0, loss=2.0, norm=1.0, head=0.5))
    table.write(step(1, loss=1.5, norm=math.inf))
    table.write_alert(Alert(1, ALL_LAYERS, "grad_norm", "divergence", math.inf, 1.0, "it went", "explosion"))
    return table


def test_what_was_recorded_is_read_back(tmp_path):
    write_run(tmp_path / "run.npz", {"steps": 2, "nan": math.nan}, filled().arrays())
    run = read_run(tmp_path / "run.npz")
    assert run.facts["steps"] == 2
    assert math.isnan(run.facts["nan"])
    assert run.values("loss").tolist() == [2.0, 1.5]
    assert run.values("grad_norm").tolist() == [1.0, math.inf]
    assert run.series[HEAD][0].tolist() == [0]
    assert run.values("attention/entropy", "blocks.0.attention").size == 0  # a head is no layer
    assert run.layers("grad_norm") == []
    assert run.alerts[0]["reason"] == "it went"
    assert [file.name for file in tmp_path.iterdir()] == ["run.npz"]


def test_a_table_goes_on_where_it_was_saved():
    straight, resumed = filled(), RecordTable()
    resumed.load(filled().arrays())
    assert resumed.last_loss == 1.5
    for table in (straight, resumed):
        table.write(step(2, norm=3.0, loss=1.0))
    assert straight.arrays().keys() == resumed.arrays().keys()
    for name, array in straight.arrays().items():
        np.testing.assert_array_equal(array, resumed.arrays()[name])


def test_a_run_without_records(tmp_path):
    write_run(tmp_path / "run.npz", {}, RecordTable().arrays())
    run = read_run(tmp_path / "run.npz")
    assert run.series == {}
    assert run.values("loss").size == 0


def test_beyond_float32_is_infinite():
    table = RecordTable()
    table.write(step(0, norm=1e300))
    assert np.isinf(table.arrays()["value"]).all()

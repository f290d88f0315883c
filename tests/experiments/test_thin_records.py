from __future__ import annotations

import math
import zipfile

import numpy as np

from experiments.run_records import RecordTable, write_run
from experiments.stress_ledger import read_runs
from experiments.sustained_explosion import judge_long_run
from experiments.thin_records import main
from probes.record import ALL_LAYERS, Series, StepRecords

STEPS = 400


def records(path) -> None:
    generator = np.random.default_rng(0)
    table = RecordTable()
    names = (
        Series(ALL_LAYERS, "loss"),
        Series(ALL_LAYERS, "grad_norm"),
        Series("a", "grad_norm"),
        Series("a", "weight_norm"),
        Series("a.attention", "attention/entropy"),
        Series("a.attention", "attention/entropy", head=0),
    )
    for step in range(STEPS):
        values = generator.lognormal(size=len(names)) / (1 + step)
        table.write(StepRecords(step, names, values, np.full(len(names), math.nan)))
    facts = {
        "config": {"name": "run", "mechanism": "softmax"},
        "steps": STEPS,
        "seconds": 1.0,
        "is_finished": True,
        "metric": "cross-entropy, nats",
        "reference": 9.2,
        "without_attention": 9.1,
        "validation": [(STEPS, 9.0)],
    }
    write_run(path, facts, table.arrays())


def test_thinned_records_have_the_same_judgement_and_fewer_numbers(tmp_path):
    records(tmp_path / "run.npz")
    out = tmp_path / "new" / "thinned.zip"
    assert main([str(tmp_path / "run.npz"), "--out", str(out)]) == 0
    whole, thin = read_runs([tmp_path / "run.npz"])["run"], read_runs([out])["run"]
    assert thin.facts == whole.facts
    assert judge_long_run(thin) == judge_long_run(whole)
    assert {(s.quantity, s.head) for s in thin.series} == {
        ("loss", None),
        ("grad_norm", None),
        ("attention/entropy", None),
    }
    np.testing.assert_array_equal(thin.values("grad_norm"), whole.values("grad_norm"))
    np.testing.assert_allclose(thin.values("grad_norm", "a"), whole.values("grad_norm", "a")[::10], rtol=1e-3)
    assert zipfile.ZipFile(out).namelist() == ["run.npz"]


def test_positions_of_thinned_layers_are_not_taken_for_steps(tmp_path):
    table = RecordTable()
    names = (Series(ALL_LAYERS, "loss"), Series(ALL_LAYERS, "grad_norm"), Series("a", "grad_norm"))
    for step in range(4000):
        norm = 1.0 if step < 3200 else 1e5
        table.write(StepRecords(step, names, np.array([9.5 - step / 1e4, norm, norm]), np.full(3, math.nan)))
    facts = {
        "config": {"name": "run", "mechanism": "softmax"},
        "steps": 4000,
        "metric": "cross-entropy, nats",
        "reference": 9.2,
        "without_attention": 9.1,
        "validation": [(4000, 9.0)],
    }
    write_run(tmp_path / "run.npz", facts, table.arrays())
    assert main([str(tmp_path / "run.npz"), "--out", str(tmp_path / "thinned.zip")]) == 0
    whole = judge_long_run(read_runs([tmp_path / "run.npz"])["run"])
    thin = judge_long_run(read_runs([tmp_path / "thinned.zip"])["run"])
    assert (whole.verdict, whole.first_layer) == ("exploded", "a")
    assert (thin.verdict, thin.first_layer) == ("exploded", None)


def test_without_records_there_is_a_message(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "thinned.zip")]) == 2
    assert "Expected records of runs" in capsys.readouterr().err
    assert not (tmp_path / "thinned.zip").exists()

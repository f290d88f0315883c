from __future__ import annotations

import json
import math
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.run_records import RecordTable, write_run
from experiments.stress_ledger import main, read_runs, strongest_pair
from experiments.sustained_explosion import judge_long_run
from probes.record import ALL_LAYERS, Series, StepRecords


def write(
    folder: Path,
    name: str,
    mechanism: str,
    steps: int,
    factor: float = 1.0,
    rate: float = 1e-3,
    seed: int = 0,
) -> Path:
    table = RecordTable()
    names = (ALL_LAYERS, "blocks.0.attention.query", "blocks.0.mlp.hidden")
    series = (Series(ALL_LAYERS, "loss"), *(Series(layer, "grad_norm") for layer in names))
    for step in range(steps):
        norm = 0.2 * (factor if step >= 350 else 1)
        values = np.array([9.5 - step / 1000, norm, norm, norm])
        table.write(StepRecords(step, series, values, np.full(4, math.nan)))
    facts = {
        "config": {"name": name, "mechanism": mechanism, "learning_rate": rate, "seed": seed},
        "steps": steps,
        "seconds": 0.2 * steps,
        "is_finished": steps == 400,
        "metric": "cross-entropy, nats",
        "reference": 9.2,
        "without_attention": 9.1,
        "validation": [(steps, 9.0)],
    }
    path = folder / f"{name}.npz"
    write_run(path, facts, table.arrays())
    return path


def test_table_json_and_figure_come_from_the_records(tmp_path, capsys):
    softmax = write(tmp_path, "lead-softmax-seed0", "softmax", 400, factor=3e4)
    sigmoid = write(tmp_path, "lead-sigmoid-seed0", "sigmoid", 360)
    with zipfile.ZipFile(tmp_path / "runs.zip", "w") as archive:
        archive.write(softmax, softmax.name)
    softmax.unlink()
    out = tmp_path / "out"
    assert main([str(tmp_path / "runs.zip"), str(sigmoid), "--out", str(out)]) == 0
    table = (out / "ledger.md").read_text()
    assert table == capsys.readouterr().out
    lines = table.splitlines()
    assert "| 360 (cut) | 0.2 |" in lines[2]
    assert lines[3].endswith("| exploded |")
    assert "+4.5 | 350 | blocks.0.attention.query" in lines[3]
    rows = json.loads((out / "ledger.json").read_text())["runs"]
    assert [row["judgement"]["verdict"] for row in rows] == ["learned", "exploded"]
    assert (out / "gradient_norms.png").stat().st_size > 10_000


def test_largest_rates_at_which_every_seed_learned(tmp_path, capsys):
    write(tmp_path, "rate-1e-3-softmax-seed0", "softmax", 400)
    write(tmp_path, "rate-1e-2-softmax-seed0", "softmax", 400, factor=3e4, rate=1e-2)
    write(tmp_path, "rate-1e-2-sigmoid-seed0", "sigmoid", 400, rate=1e-2)
    write(tmp_path, "rate-1e-2-softmax-seed1", "softmax", 400, rate=1e-2, seed=1)
    write(tmp_path, "rate-1e-1-sigmoid-seed0", "sigmoid", 390, rate=1e-1)  # cut
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert (
        "Largest rate at which every seed learned, of rate-1e-2, rate-1e-3: "
        "sigmoid 0.01 (seeds: 1 of 1 at 0.01); softmax 0.001 (seeds: 1 of 1 at 0.001, 1 of 2 at 0.01)."
    ) in capsys.readouterr().out


def test_of_a_run_in_pieces_the_longest_is_taken(tmp_path):
    (tmp_path / "first").mkdir()
    early = write(tmp_path / "first", "lead-softmax-seed0", "softmax", 310)
    late = write(tmp_path, "lead-softmax-seed0", "softmax", 400)
    for order in ([early, late], [late, early]):
        assert read_runs(order)["lead-softmax-seed0"].facts["steps"] == 400


def test_a_run_without_its_twin_has_no_figure(tmp_path):
    write(tmp_path, "lead-softmax-seed0", "softmax", 400)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "gradient_norms.png").exists()


@pytest.mark.parametrize("source", ["nothing.zip", "nothing.npz", "."])
def test_no_records(tmp_path, capsys, source):
    assert main([str(tmp_path / source), "--out", str(tmp_path / "out")]) == 2
    assert "stress_ledger: " in capsys.readouterr().err


def test_a_pair_that_never_took_a_step_has_no_figure(tmp_path):
    for mechanism in ("softmax", "sigmoid"):
        write(tmp_path, f"lead-{mechanism}-seed0", mechanism, 0)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "| 0 (cut) |" in (tmp_path / "out" / "ledger.md").read_text()
    assert not (tmp_path / "out" / "gradient_norms.png").exists()


def test_the_figure_is_of_a_pair_with_a_healthy_baseline(tmp_path):
    for mechanism in ("softmax", "sigmoid"):
        write(tmp_path, f"lead-{mechanism}-seed0", mechanism, 400, factor=50)
        write(tmp_path, f"rate-1e-2-{mechanism}-seed0", mechanism, 400, factor=500)
    runs = read_runs([tmp_path])
    judgements = {name: judge_long_run(run) for name, run in runs.items()}
    softmax, sigmoid = strongest_pair(runs, judgements)
    assert softmax.facts["config"]["name"] == "rate-1e-2-softmax-seed0"
    assert sigmoid.facts["config"]["name"] == "rate-1e-2-sigmoid-seed0"
    unhealthy = replace(judgements["rate-1e-2-softmax-seed0"], has_baseline=False)
    softmax, _ = strongest_pair(runs, judgements | {"rate-1e-2-softmax-seed0": unhealthy})
    assert softmax.facts["config"]["name"] == "lead-softmax-seed0"


def test_a_missing_source_is_named_though_others_are_there(tmp_path, capsys):
    write(tmp_path, "lead-softmax-seed0", "softmax", 400)
    assert main([str(tmp_path), str(tmp_path / "nothing.npz"), "--out", str(tmp_path / "out")]) == 2
    assert "nothing.npz" in capsys.readouterr().err


def test_files_that_cannot_be_read_are_named(tmp_path, capsys):
    whole = write(tmp_path, "lead-softmax-seed0", "softmax", 400)
    broken = {"part.zip": whole.read_bytes()[:1000], "part.npz": whole.read_bytes()[:1000]}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        assert main([str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        assert f"stress_ledger: {tmp_path / name}" in capsys.readouterr().err
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    assert main([str(tmp_path / "other.npz"), "--out", str(tmp_path / "out")]) == 2
    assert "other.npz cannot be read. Expected the records of a run" in capsys.readouterr().err

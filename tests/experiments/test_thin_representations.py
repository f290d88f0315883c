from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from experiments.embedding_metrics import embedding_metrics
from experiments.representation_results import RawRun, read_raw
from experiments.run_records import RecordedRun
from experiments.thin_representations import main, on_principal_axes, write_thinned
from probes.record import Series

FACTS = {"config": {"name": "gut-softmax-seed10", "dataset": "gut", "purpose": "final"}, "best_step": 2}


def run(cells=81, dimensions=12) -> RawRun:
    generator = np.random.default_rng(0)
    sizes = np.geomspace(1, 1e-4, dimensions)
    turn, _ = np.linalg.qr(generator.normal(size=(dimensions, dimensions)))
    points = generator.normal(size=(cells, dimensions)) * sizes @ turn
    points[: cells // 2] += turn[0]
    arrays = {
        "embeddings": (points + 3).astype(np.float16),
        "embeddings_centre": np.full(dimensions, 3.0, np.float32),
        "labels": np.where(np.arange(cells) < cells // 2, "a", "b"),
        "losses": np.ones(cells, np.float32),
    }
    arrays |= {"untrained": arrays["embeddings"], "untrained_centre": arrays["embeddings_centre"]}
    entropy = Series("blocks.0.attention", "attention/entropy")
    series = {entropy: (np.arange(3, dtype=np.int32), np.array([1.0, 1.2345678, 2.0], np.float32))}
    return RawRun(FACTS, RecordedRun(FACTS, [{"kind": "entropy-collapse"}], series), arrays)


def metrics(of: RawRun) -> dict[str, float]:
    return embedding_metrics(*(of.arrays[name] for name in ("embeddings", "labels", "embeddings_centre")))


def test_a_thinned_run_is_judged_alike_and_all_else_is_as_it_was(tmp_path):
    whole = run()
    (tmp_path / "run.npz").write_bytes(write_thinned(whole))
    (thin,) = read_raw([tmp_path / "run.npz"])
    assert (thin.facts, thin.records.alerts) == (whole.facts, whole.records.alerts)
    assert metrics(thin) == pytest.approx(metrics(whole), abs=2e-3)
    assert thin.arrays["embeddings"].shape[1] < 12
    assert np.array_equal(thin.arrays["embeddings"], thin.arrays["untrained"])
    for name in ("labels", "losses"):
        assert np.array_equal(thin.arrays[name], whole.arrays[name])
    ((steps, values),) = thin.records.series.values()
    assert steps.tolist() == [0, 1, 2]
    assert values == pytest.approx([1.0, 1.2345678, 2.0], rel=1e-3)


def test_distances_are_kept():
    points = run().arrays["embeddings"].astype(np.float64)
    axes = on_principal_axes(points, np.full(12, 3.0)).astype(np.float64)
    before, after = (np.linalg.norm(each[:, None] - each, axis=2) for each in (points, axes))
    unit = (before * after).sum() / (after * after).sum()
    assert np.abs(unit * after - before).max() < 0.005 * before.max()


def test_runs_without_embeddings_are_kept_as_they_are(tmp_path, capsys):
    trial = run()
    trial = replace(trial, arrays={"labels": trial.arrays["labels"]})
    (tmp_path / "run.npz").write_bytes(write_thinned(trial))
    out = tmp_path / "new" / "thin.zip"
    assert main([str(tmp_path / "run.npz"), "--out", str(out)]) == 0
    assert "1 runs" in capsys.readouterr().out
    (thin,) = read_raw([out])
    assert thin.arrays.keys() == {"labels"}


def test_a_file_that_is_no_run(tmp_path, capsys):
    (tmp_path / "run.npz").write_bytes(b"PK")
    assert main([str(tmp_path / "run.npz"), "--out", str(tmp_path / "thin.zip")]) == 2
    assert "thin_representations: " in capsys.readouterr().err

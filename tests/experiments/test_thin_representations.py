from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from experiments.cell_transformer import MECHANISMS
from experiments.embedding_metrics import embedding_metrics
from experiments.representation_results import RawRun, read_raw
from experiments.run_records import RecordedRun
from experiments.thin_representations import main, of_whole_seeds, on_principal_axes, write_thinned
from probes.record import Series


def facts(dataset="gut", mechanism="softmax", seed=10, purpose="final"):
    config = {"dataset": dataset, "mechanism": mechanism, "seed": seed, "purpose": purpose}
    return {"config": {"name": f"{dataset}-{mechanism}-{purpose}-seed{seed}", **config}, "best_step": 2}


FACTS = facts(purpose="selection")


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


def test_seeds_count_as_a_whole():
    whole = [facts(*each) for each in product("ab", MECHANISMS, (10, 11, 12))]
    others = [facts("a", "pca", None, "baseline"), facts("b", seed=1000, purpose="selection")]
    runs = [RawRun(each, RecordedRun(each, [], {}), {}) for each in others + whole]
    assert of_whole_seeds(runs) == runs
    cut = [each for each in runs if each.config["name"] != "b-sigmoid-final-seed11"]
    kept = of_whole_seeds(cut)
    assert {each.config["seed"] for each in kept} == {None, 1000, 10}  # none of the seeds after it either
    assert len(kept) == 2 + 4


def test_a_data_set_without_any_run_of_a_mechanism_leaves_no_seed():
    made = [facts("a"), facts("a", "sigmoid"), facts("b", "pca", None, "baseline")]
    runs = [RawRun(each, RecordedRun(each, [], {}), {}) for each in made]
    assert of_whole_seeds(runs) == runs[2:]


def test_what_is_left_out_is_told(tmp_path, capsys):
    single = replace(run(), facts=facts())
    (tmp_path / "run.npz").write_bytes(write_thinned(single))
    assert main([str(tmp_path / "run.npz"), "--out", str(tmp_path / "thin.zip")]) == 0
    assert "Left out, as their seed is not whole: gut-softmax-final-seed10." in capsys.readouterr().out

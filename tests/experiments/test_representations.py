from __future__ import annotations

import json
import shutil
import sys
import zipfile

import numpy as np
import pytest

from experiments import representation_run, representations
from experiments.cell_splits import split_cells
from experiments.cells import synthetic_cells
from experiments.prepare_representations import pca_embeddings
from experiments.representation_data import PreparedCells, write_prepared
from experiments.representation_plan import run_config
from experiments.representation_results import read_raw
from experiments.representations import Plan, main
from experiments.representations_report import main as report
from experiments.run_records import read_run

NAME = "pbmc3k_human_blood"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set of the plan's name with cells that are no one's."""
    cells = synthetic_cells(num_cells=60, num_genes=60, num_types=3, counts_per_cell=300)
    split = split_cells(cells.labels, None)
    path = tmp_path_factory.mktemp("prepared") / "cells.npz"
    write_prepared(path, {NAME: PreparedCells(cells, split, pca_embeddings(cells, split), False)})
    return path


def flags(prepared, work, *more):
    return [
        "--prepared", str(prepared), "--datasets", NAME, "--preset", "tiny", "--work", str(work),
        "--out", str(work / "out"), *more,
    ]  # fmt: skip


def train(prepared, work, mechanism, purpose="final", seed=0, minutes=1.0):
    config = run_config("tiny", NAME, mechanism, purpose, seed=seed, learning_rate=1e-2)
    finished = representation_run.train_piece(
        config, prepared=prepared, work=work, device="cpu", minutes=minutes
    )
    return finished, work / f"{config.name}.npz"


@pytest.fixture(scope="module")
def work(prepared, tmp_path_factory):
    """Two seeds of both mechanisms and one run that tried a rate, without the queue's processes."""
    folder = tmp_path_factory.mktemp("work")
    for mechanism in ("softmax", "sigmoid"):
        for seed in (0, 1):
            train(prepared, folder, mechanism, seed=seed)
        train(prepared, folder, mechanism, "selection", seed=1000)
    representations.write_baseline(prepared, NAME, folder)
    return folder


def test_a_run_keeps_what_the_report_needs(work):
    runs = {run.config["name"]: run for run in read_raw([work])}
    run = runs[f"tiny-{NAME}-sigmoid-seed0"]
    assert run.embeddings.shape == run.untrained.shape == (len(run.labels), 16)
    assert run.embeddings.dtype == np.float16
    assert run.facts["held_out_loss"] > 0
    assert run.facts["best_step"] in {step for step, _ in run.facts["validation"]}
    assert len(run.records.values("loss")) == run.facts["steps"]
    assert run.records.layers("attention/entropy")
    assert not run.records.layers("grad_norm")
    tried = runs[f"tiny-{NAME}-sigmoid-rate0.01"]
    assert tried.embeddings is None  # no rate can be chosen by what is judged
    assert "held_out_loss" not in tried.facts


def test_mechanisms_start_from_the_same_weights_and_see_the_same_batches(work):
    softmax, sigmoid = (
        read_run(work / f"tiny-{NAME}-{mechanism}-seed0.npz") for mechanism in ("softmax", "sigmoid")
    )
    for name in ("steps", "batch_size", "tokens", "learning_rate", "patience"):
        assert softmax.facts["config"][name] == sigmoid.facts["config"][name]
    assert softmax.facts["parameters"] == sigmoid.facts["parameters"]
    # At the start attention hardly matters, so that losses of the same weights on the same masks agree.
    assert softmax.values("loss")[0] == pytest.approx(sigmoid.values("loss")[0], rel=1e-3)


def test_pieces_give_what_one_training_gives(prepared, work, tmp_path):
    assert train(prepared, tmp_path, "sigmoid", minutes=1e-9)[0] is False
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt"}
    finished, path = train(prepared, tmp_path, "sigmoid")
    assert finished
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with np.load(path) as pieces, np.load(work / path.name) as whole:
        assert np.array_equal(pieces["embeddings"], whole["embeddings"])
        assert np.array_equal(pieces["untrained"], whole["untrained"])


def test_final_runs_are_known_when_their_grid_is_finished(prepared, work, tmp_path):
    plan = Plan("tiny", [NAME], num_seeds=2)
    assert plan.size == 8
    assert {config.purpose for config in plan.known(tmp_path)} == {"selection"}
    for file in work.glob("*-rate*.npz"):
        shutil.copy(file, tmp_path / file.name)
    for mechanism in ("softmax", "sigmoid"):  # the grid's other rate, which did worse
        source = tmp_path / f"tiny-{NAME}-{mechanism}-rate0.01.npz"
        with np.load(source) as content:
            arrays = dict(content)
        facts = json.loads(str(arrays.pop("facts")))
        name = f"tiny-{NAME}-{mechanism}-rate0.001"
        config = facts["config"] | {"name": name, "learning_rate": 1e-3}
        representations.write_run(
            tmp_path / f"{name}.npz",
            {**facts, "config": config, "validation_loss": facts["validation_loss"] + 1},
            arrays,
        )
    final = [config for config in plan.known(tmp_path) if config.purpose == "final"]
    assert [(config.mechanism, config.seed) for config in final] == [
        ("softmax", 0), ("sigmoid", 0), ("softmax", 1), ("sigmoid", 1),
    ]  # fmt: skip
    assert {config.learning_rate for config in final} == {1e-2}


def test_report_from_folders_and_archives(work, tmp_path, capsys):
    archive = tmp_path / "runs.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in work.glob("*.npz"):
            file.write(path, path.name)
    assert report([str(archive), str(work), "--out", str(tmp_path / "report")]) == 0
    found = json.loads((tmp_path / "report" / "representations.json").read_text())
    (silhouette,) = found["comparisons"]["silhouette"]
    assert silhouette["pairs"] == 2
    by_hand = {(each["method"], each["seed"]): each["values"]["silhouette"] for each in found["judged"]}
    difference = np.mean([by_hand["sigmoid", seed] - by_hand["softmax", seed] for seed in (0, 1)])
    assert silhouette["difference"] == pytest.approx(difference)
    assert {each["method"] for each in found["judged"]} == {
        "PCA", "softmax", "softmax untrained", "sigmoid", "sigmoid untrained",
    }  # fmt: skip
    assert found["verdicts"]["silhouette"].startswith("Separation (silhouette): ")
    page = (tmp_path / "report" / "representations.md").read_text()
    assert found["verdicts"]["cohesion"] in page
    for picture in ("differences.png", "embeddings.png"):
        assert (tmp_path / "report" / picture).read_bytes().startswith(b"\x89PNG")
    assert "11 runs" not in capsys.readouterr().out  # seven, each read once


def test_runs_of_another_configuration_are_not_taken_for_the_plans(prepared, work, tmp_path, capsys):
    source = work / f"tiny-{NAME}-softmax-rate0.01.npz"
    with np.load(source) as content:
        arrays = dict(content)
    facts = json.loads(str(arrays.pop("facts")))
    facts["config"]["steps"] = 7
    representations.write_run(tmp_path / source.name, facts, arrays)
    assert main(flags(prepared, tmp_path)) == 2
    assert "with another configuration" in capsys.readouterr().err


@pytest.mark.slow
def test_the_queue_end_to_end(prepared, tmp_path, capsys):
    assert main(flags(prepared, tmp_path, "--seeds", "1", "--side-by-side", "2")) == 0
    assert "6 of 6 runs are finished" in capsys.readouterr().out
    (archive,) = (tmp_path / "out").glob("*.zip")
    names = zipfile.ZipFile(archive).namelist()
    assert f"{NAME}-pca.npz" in names
    assert len(names) == 7
    assert main(flags(prepared, tmp_path, "--seeds", "1")) == 0
    assert report([str(tmp_path / "out"), "--out", str(tmp_path / "report")]) == 0


def test_failed_runs_are_reported_and_not_begun_again(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert main(flags(prepared, tmp_path)) == 1
    printed = capsys.readouterr().out
    assert printed.count("ended with status 1") == 4
    assert "0 of 24 runs are finished" in printed


def test_nothing_begins_just_before_the_end_of_a_call(prepared, tmp_path, capsys):
    assert main(flags(prepared, tmp_path, "--minutes", "0.2")) == 0
    assert "0 of 24 runs are finished" in capsys.readouterr().out


def test_a_missing_file_is_told_where_it_comes_from(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--datasets", NAME, "--work", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"shared/cells/{NAME}.h5ad: 10x Genomics 3k PBMC" in error
    assert "--data FILE --label COLUMN" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--prepared", "nowhere.npz"], "there are none"),
        (["--datasets", "crohn_human_gut"], "Expected crohn_human_gut in"),
    ],
)
def test_prepared_files_that_do_not_fit(prepared, tmp_path, capsys, change, message):
    assert main([*flags(prepared, tmp_path), *change]) == 2
    assert message in capsys.readouterr().err


def test_unknown_data_sets(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--datasets", "liver"])
    assert "there are no data sets ['liver']" in capsys.readouterr().err


@pytest.mark.parametrize(("content", "message"), [(None, "at nowhere"), ([], "found none")])
def test_reports_without_runs(tmp_path, capsys, content, message):
    path = "nowhere" if content is None else str(tmp_path)
    assert report([path, "--out", str(tmp_path / "report")]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_archive_is_named(tmp_path, capsys):
    (tmp_path / "runs.zip").write_bytes(b"not an archive")
    assert report([str(tmp_path), "--out", str(tmp_path / "report")]) == 2
    assert f"{tmp_path / 'runs.zip'} is no archive" in capsys.readouterr().err


def test_reports_of_several_presets(work, tmp_path, capsys):
    source = work / f"tiny-{NAME}-softmax-seed0.npz"
    with np.load(source) as content:
        arrays = dict(content)
    facts = json.loads(str(arrays.pop("facts")))
    facts["config"] |= {"name": "other", "model": {"embed_dim": 32}}
    representations.write_run(tmp_path / "other.npz", facts, arrays)
    assert report([str(work), str(tmp_path), "--out", str(tmp_path / "report")]) == 2
    assert "of several" in capsys.readouterr().err

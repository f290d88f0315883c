from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from experiments import representation_run, representations
from experiments.cell_splits import split_cells
from experiments.cells import synthetic_cells
from experiments.prepare_representations import pca_embeddings
from experiments.representation_data import PreparedCells, read_prepared, write_prepared
from experiments.representation_plan import run_config
from experiments.representation_results import read_raw
from experiments.representation_training import PatientTraining
from experiments.representations import main
from experiments.representations_report import main as report
from experiments.run_records import read_run
from experiments.side_by_side import only_queue

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


def train(prepared, work, mechanism, purpose="final", seed=0, minutes=1.0, rate=1e-2):
    data = read_prepared(prepared, NAME)
    config = run_config(
        "tiny", NAME, mechanism, purpose, seed=seed, learning_rate=rate, data_digest=data.digest
    )
    finished = representation_run.train_piece(config, data, work=work, device="cpu", minutes=minutes)
    return finished, work / f"{config.name}.npz"


@pytest.fixture(scope="module")
def work(prepared, tmp_path_factory):
    """Two seeds of both mechanisms and the runs that tried rates, without the queue's processes."""
    folder = tmp_path_factory.mktemp("work")
    for mechanism in ("softmax", "sigmoid"):
        for seed in (0, 1):
            train(prepared, folder, mechanism, seed=seed)
        for rate in (1e-3, 1e-2):
            train(prepared, folder, mechanism, "selection", seed=1000, rate=rate)
    representations.write_baseline(read_prepared(prepared, NAME), NAME, folder)
    return folder


def test_a_run_keeps_what_the_report_needs(work):
    runs = {run.config["name"]: run for run in read_raw([work])}
    run = runs[f"tiny-{NAME}-sigmoid-seed0"]
    arrays = run.arrays
    assert arrays["embeddings"].shape == arrays["untrained"].shape == (len(arrays["labels"]), 16)
    assert arrays["embeddings"].dtype == np.float16
    assert arrays["embeddings_centre"].shape == (16,)
    assert "groups" not in arrays  # these cells name none
    assert run.facts["held_out_loss"] == pytest.approx(arrays["losses"].sum() / arrays["hidden"].sum())
    assert run.facts["is_diverged"] is False
    assert "blocks.0.mlp.hidden" in run.records.layers("adam_update_rms")
    assert run.facts["best_step"] in {step for step, _ in run.facts["validation"]}
    assert len(run.records.values("loss")) == run.facts["steps"]
    assert run.records.layers("attention/entropy")
    assert not run.records.layers("grad_norm")
    tried = runs[f"tiny-{NAME}-sigmoid-rate0.01-seed1000"]
    assert tried.arrays == {}  # no rate can be chosen by what is judged
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
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]
    finished, path = train(prepared, tmp_path, "sigmoid")
    assert finished
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with np.load(path) as pieces, np.load(work / path.name) as whole:
        assert np.array_equal(pieces["embeddings"], whole["embeddings"])
        assert np.array_equal(pieces["untrained"], whole["untrained"])


def test_only_the_first_seeds_keep_untrained_embeddings(prepared, tmp_path):
    _, path = train(prepared, tmp_path, "softmax", seed=representation_run.UNTRAINED_SEEDS)
    with np.load(path) as content:
        assert "embeddings" in content
        assert "untrained" not in content


def test_sigterm_ends_a_piece_with_its_checkpoint(prepared, work, tmp_path, monkeypatch):
    step = PatientTraining._train_step

    def told(training):
        step(training)
        if training.step == 7:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(PatientTraining, "_train_step", told)
        assert train(prepared, tmp_path, "sigmoid")[0] is False
    finished, path = train(prepared, tmp_path, "sigmoid")
    assert finished
    with np.load(path) as pieces, np.load(work / path.name) as whole:
        assert np.array_equal(pieces["embeddings"], whole["embeddings"])


def test_sigterm_after_the_last_step_does_not_cost_the_run(prepared, tmp_path, monkeypatch):
    """Minutes of training, and no checkpoint of them is there by then."""
    take_best = PatientTraining.take_best

    def told(training):
        signal.raise_signal(signal.SIGTERM)
        take_best(training)

    monkeypatch.setattr(PatientTraining, "take_best", told)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the process would have ended"))
    try:
        finished, path = train(prepared, tmp_path, "sigmoid")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert finished
    assert path.exists()


def test_another_machine_repeats_nothing(prepared, work, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(work, first)
    short = ("--minutes", "0.2", "--seeds", "2")  # nothing begins
    assert main(flags(prepared, first, *short)) == 0
    assert "8 of 8 runs are finished" in capsys.readouterr().out
    assert main(flags(prepared, second, *short, "--done", str(first / "out" / "done.json"))) == 0
    assert "8 of 8 runs are finished" in capsys.readouterr().out
    again = json.loads((second / "out" / "done.json").read_text())
    assert again == json.loads((first / "out" / "done.json").read_text())
    assert len(again) == 8


def test_other_cells_have_another_digest(prepared):
    data = read_prepared(prepared, NAME)
    assert data.digest == read_prepared(prepared, NAME).digest
    changed = data.cells.expression.copy()
    changed.data[0] += 1
    for other in (
        replace(data, cells=replace(data.cells, expression=changed)),
        replace(data, cells=replace(data.cells, labels=data.cells.labels[::-1])),
        replace(data, split=replace(data.split, is_test=~data.split.is_test)),
    ):
        assert other.digest != data.digest


def test_a_baseline_of_other_cells_is_not_kept(prepared, work):
    data = read_prepared(prepared, NAME)
    other = replace(data, split=replace(data.split, is_test=~data.split.is_test))
    with pytest.raises(ValueError, match="of other cells or another split"):
        representations.write_baseline(other, NAME, work)


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
    assert "\n9 runs." in capsys.readouterr().out  # each read once
    (interval,) = found["intervals_over_cells"]["silhouette"].values()
    assert interval["unit"] == "cells"
    assert interval["low"] < interval["high"]
    assert "Seeds replicate training only" in page
    assert len(found["scope"]["missing"]) == 5


def changed(source, target, **facts_of_config):
    """A run's file with another configuration."""
    with np.load(source) as content:
        arrays = dict(content)
    facts = json.loads(str(arrays.pop("facts")))
    facts["config"] |= facts_of_config
    representations.write_run(target, facts, arrays)


@pytest.mark.parametrize(
    ("name", "message"), [("half.zip", "half.zip is no archive"), ("half.npz", "half.npz cannot be read")]
)
def test_a_file_that_cannot_be_reported_is_named(tmp_path, capsys, name, message):
    (tmp_path / name).write_bytes(b"PK half of a file")
    assert report([str(tmp_path), "--out", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Leave it out." in error


def test_two_runs_of_one_name_that_differ_are_not_mixed(work, tmp_path, capsys):
    name = f"tiny-{NAME}-softmax-seed0.npz"
    changed(work / name, tmp_path / name, learning_rate=1e-3)
    assert report([str(work), str(tmp_path), "--out", str(tmp_path / "report")]) == 2
    assert f"Expected one run {name[:-4]};" in capsys.readouterr().err


def test_a_run_that_was_made_twice_is_not_chosen_from(work, tmp_path, capsys):
    """A run that a lease cut and another made anew has the same configuration, and other results."""
    name = f"tiny-{NAME}-softmax-seed0.npz"
    with np.load(work / name) as content:
        arrays = dict(content)
    facts = json.loads(str(arrays.pop("facts")))
    facts["validation_loss"] += 0.1
    representations.write_run(tmp_path / name, facts, arrays)
    assert report([str(work), str(tmp_path), "--out", str(tmp_path / "report")]) == 2
    assert f"Expected one run {name[:-4]};" in capsys.readouterr().err


def test_final_runs_at_another_rate_are_not_mixed(work, tmp_path, capsys):
    changed(work / f"tiny-{NAME}-softmax-seed1.npz", tmp_path / "2.npz", name="2", seed=2, learning_rate=1e-3)
    assert report([str(work), str(tmp_path), "--out", str(tmp_path / "report")]) == 2
    assert "Expected 2 at the learning rate that was chosen, 0.01; got 0.001" in capsys.readouterr().err


def test_final_runs_of_another_budget_are_not_mixed(work, tmp_path, capsys):
    """The pilot's were cut at 1,500 steps, and are used for nothing."""
    changed(work / f"tiny-{NAME}-softmax-seed1.npz", tmp_path / "2.npz", name="2", seed=2, steps=5)
    assert report([str(work), str(tmp_path), "--out", str(tmp_path / "report")]) == 2
    assert "Expected final runs of one budget of steps" in capsys.readouterr().err


def test_runs_that_cannot_be_used_stop_no_other(prepared, work, tmp_path, monkeypatch, capsys):
    name = f"tiny-{NAME}-softmax-rate0.01-seed1000.npz"
    changed(work / name, tmp_path / name, steps=7)
    (tmp_path / f"tiny-{NAME}-sigmoid-rate0.01-seed1000.npz").write_bytes(b"PK broken")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert main(flags(prepared, tmp_path)) == 1
    printed = capsys.readouterr().out
    assert "with another configuration" in printed
    assert printed.count("cannot be used") == 2
    assert printed.count("ended with status 1") == 2  # the others were begun
    (archive,) = (tmp_path / "out").glob("*.zip")
    assert zipfile.ZipFile(archive).namelist() == [f"{NAME}-pca.npz"]


@pytest.fixture
def slow_runs(tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))


@pytest.mark.usefixtures("slow_runs")
def test_runs_that_outlast_a_call_are_ended_and_have_not_failed(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(representations, "START_SECONDS", 0)
    monkeypatch.setattr(representations, "GRACE_SECONDS", 0.5)
    began = time.monotonic()
    assert main(flags(prepared, tmp_path, "--minutes", "0.02")) == 0
    assert time.monotonic() - began < 20
    assert "ended with status -15" in capsys.readouterr().out


@pytest.mark.usefixtures("slow_runs")
def test_sigterm_ends_the_queue_and_its_runs(prepared, tmp_path, capsys):
    began = time.monotonic()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        main(flags(prepared, tmp_path))
    assert time.monotonic() - began < 20
    printed = capsys.readouterr().out
    assert printed.count("ended with status -15") == 1
    assert "0 of 24 runs are finished" in printed


def test_a_second_queue_in_the_same_folder_is_refused(prepared, tmp_path, capsys):
    with only_queue(tmp_path):
        assert main(flags(prepared, tmp_path)) == 2
    assert "another queue works in" in capsys.readouterr().err


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
    changed(source, tmp_path / "other.npz", name="other", model={"embed_dim": 32})
    assert report([str(work), str(tmp_path), "--out", str(tmp_path / "report")]) == 2
    assert "of several" in capsys.readouterr().err

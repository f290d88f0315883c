from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import detection_benchmark
from experiments.detection_benchmark import judge, main, recording_path
from experiments.detection_faults import (
    KINDS,
    Fault,
)
from experiments.detection_models import SETUPS
from experiments.detection_peers import peer_runs, peer_verdicts
from experiments.detection_recording import record
from experiments.detection_report import result_of
from experiments.detection_scoring import (
    Verdict,
    departures,
)
from experiments.detection_suite import Run, suite
from stability.divergence import ALL_LAYERS, Alert


def run_of(setup: str, fault: Fault | None = None, steps: int = 6) -> Run:
    return Run(setup, 5, "constant", steps, SETUPS[setup].batch_size, fault)


@pytest.fixture
def small_suite(monkeypatch):
    fault = Fault("nan-gradient", "nan", 0, "blocks.1.linear", 6)
    runs = [replace(run_of("mlp-4-sgd", steps=12), seed=seed) for seed in (1, 2)]
    runs.append(replace(runs[0], fault=fault))
    monkeypatch.setattr(detection_benchmark, "suite", lambda half: runs)
    return runs


def test_record_resumes_and_score_reports(tmp_path, small_suite, capsys):
    directory = str(tmp_path / "new")
    assert main(["record", "--half", "tuning", "--out", directory]) == 0
    paths = [recording_path(tmp_path / "new", run) for run in small_suite]
    written = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    assert main(["score", "--half", "tuning", "--in", directory]) == 2
    assert "1 of 3 recordings are missing" in capsys.readouterr().err
    assert main(["record", "--half", "tuning", "--out", directory]) == 0
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, written, strict=True)] == [
        True,
        False,
        True,
    ]
    assert main(["score", "--half", "tuning", "--in", directory, "--cases"]) == 0
    assert "nan-gradient" in capsys.readouterr().out
    assert main(["score", "--half", "tuning", "--in", directory, "--without", "attention/entropy"]) == 0
    assert (tmp_path / "new" / "score-without-attention-entropy.json").exists()
    content = json.loads((tmp_path / "new" / "score.json").read_text())
    assert content["all"]["recall"]["value"] == 1
    assert content["clean_steps"] == 24
    [told] = content["outcomes"]
    assert told["delay"] == 1
    assert told["is_layer_right"] is True
    assert "| nan-gradient | 1 | 100 %" in (tmp_path / "new" / "score.md").read_text()


def test_a_detector_of_ones_own_is_scored(small_suite):
    class Parrot:
        def update(self, step, readings):
            return [Alert(step, "head", "loss", "warning", 0.0, None, "as always")] if step == 8 else []

    recordings = {run: record(run)[0] for run in small_suite}
    losses = {run: recording.losses for run, recording in recordings.items()}
    result = result_of("a parrot", judge(recordings, lambda: [Parrot()]), departures(losses))
    assert result.num_false_alarms == 2
    assert result.score().recall.value == 1
    assert result.score().layer.value == 0


def test_withheld_quantities_do_not_reach_the_detectors(small_suite):
    recording = record(small_suite[0])[0]
    seen = set()

    class Listener:
        def update(self, step, readings):
            seen.update(readings)
            return []

    recording.replay([Listener()], without=["weight_norm", "loss"])
    assert "grad_norm" in seen
    assert not seen & {"weight_norm", "loss"}


class FakePulse:
    """A package as trainpulse is: it alerts of the loss from the fourth step on, at every step."""

    class Monitor:
        def log(self, name, step, value):
            return [SimpleNamespace(detector="loud")] if name == "loss" and step >= 4 else []


def test_a_peer_counts_once_for_what_it_repeats_and_leaves_the_training_alone():
    run = run_of("mlp-4-sgd", steps=8)
    assert peer_verdicts("trainpulse", FakePulse, run) == (Verdict(4, 4, ALL_LAYERS, "loud"),)
    assert Path.cwd().is_dir()


def test_peers_are_compared_on_pairs_and_the_first_of_every_kind():
    runs = peer_runs(suite("scoring"))
    faulty = [run for run in runs if run.fault]
    assert {kind: sum(run.fault.kind == kind for run in faulty) for kind in KINDS} == dict.fromkeys(KINDS, 2)
    assert {run.pair for run in faulty} == {run for run in runs if not run.fault}


def test_peers_that_are_not_installed_are_named(tmp_path, small_suite, monkeypatch, capsys):
    monkeypatch.setattr(detection_benchmark, "version", lambda name: "1.0")
    monkeypatch.setattr(
        detection_benchmark, "installed_peers", lambda: ({"trainpulse": FakePulse}, {"other": "gone"})
    )
    assert main(["record", "--half", "tuning", "--out", str(tmp_path)]) == 0
    for _ in range(2):  # the second time from what was kept
        assert main(["peers", "--half", "tuning", "--in", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
        assert "trainpulse 1.0" in printed
        assert "other was not compared: gone" in printed
    assert "| trainpulse 1.0 | 1 |" in (tmp_path / "peers.md").read_text()


def test_ctrl_c_says_how_to_go_on(tmp_path, small_suite, monkeypatch, capsys):
    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(detection_benchmark, "record", interrupt)
    assert main(["record", "--half", "scoring", "--out", str(tmp_path)]) == 130
    assert "goes on where it stopped" in capsys.readouterr().out

from __future__ import annotations

import warnings

import pytest

from experiments.detection_faults import (
    Fault,
)
from experiments.detection_models import SETUPS
from experiments.detection_recording import Recording, record
from experiments.detection_suite import Run
from stability.divergence import default_detectors


def run_of(setup: str, fault: Fault | None = None, steps: int = 6) -> Run:
    return Run(setup, 5, "constant", steps, SETUPS[setup].batch_size, fault)


def test_replayed_verdicts_are_those_of_an_attached_probe(tmp_path):
    faults = [
        Fault("nan-weight", "nan", 0, "blocks.1.linear", 30),
        Fault("learning-rate", "", 100, None, 30),
        Fault("scaled-weights", "", 100, "blocks.2.linear", 30),
        None,
    ]
    for fault in faults:
        run = run_of("mlp-4-sgd", fault, steps=45)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recording, live = record(run, default_detectors())
        recording.save(tmp_path / "run.npz")
        loaded = Recording.load(tmp_path / "run.npz")
        assert loaded.run == run
        assert loaded.steps == recording.steps
        assert repr(loaded.readings) == repr(recording.readings)  # order included
        assert repr(loaded.replay(default_detectors())) == repr(live)
        assert bool(live) == (fault is not None)
        assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]


def test_recording_of_another_format_is_refused(tmp_path, monkeypatch):
    Recording(run_of("mlp-4-sgd")).save(tmp_path / "run.npz")
    monkeypatch.setattr("experiments.detection_recording.FORMAT", 2)
    with pytest.raises(ValueError, match="has format 1; expected 2. Record it again."):
        Recording.load(tmp_path / "run.npz")

"""Records and alerts in a run of Weights & Biases, offline."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import probes
from probes.sinks import WandbSink
from tests.probes.sinks.step_records import DIVERGENCE, step_records


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r'pip install "stability-probes\[wandb\]"'):
        WandbSink()


def test_a_period_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="`every` must be at least 1; got 0"):
        WandbSink(every=0)


def test_a_run_is_given_layers_and_alerts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    settings = wandb.Settings(mode="offline", silent=True, x_disable_stats=True, x_disable_meta=True)
    with wandb.init(project="probes", dir=tmp_path, settings=settings) as run:
        logged: list[dict[str, Any]] = []
        log = run.log
        monkeypatch.setattr(run, "log", lambda data: logged.append(data) or log(data))
        run.log({"train/loss": 1.0})  # another callback logs beside the sink, with its own axis
        for given in (None, run):
            sink = WandbSink(given, every=2)
            sink.write(step_records(6))
            sink.write(step_records(7))
            sink.write_alert(DIVERGENCE)
            sink.close()
    assert repr(logged[1:3]) == repr(logged[3:])  # nan is not itself
    assert set(logged[1]) == {
        "probes/step",
        "probes/grad_norm/blocks.0",
        "probes/loss/(all)",
        "probes/attention/entropy/blocks.1",
        "probes/activation_rms/blocks.1",
        "probes/activation_rms/blocks.1/call_2",
    }
    assert logged[1]["probes/step"] == 6
    assert logged[2] == {"probes/step": 7, "probes/alert/gradient-explosion/blocks.0": 2.0}
    (file,) = tmp_path.rglob("*.wandb")
    expected = (b"probes/grad_norm/blocks.0", b"gradient-explosion in blocks.0", b"clip the gradient")
    written, deadline = b"", time.monotonic() + 30
    while not all(text in written for text in expected):  # W&B's process may write after the run is finished
        assert time.monotonic() < deadline, written
        time.sleep(0.05)
        written = file.read_bytes()


def test_without_a_run_the_sink_is_dropped_and_training_goes_on() -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    model = nn.Linear(2, 1)
    probe = probes.attach(model, sinks=[WandbSink()])
    model(torch.ones(1, 2)).sum().backward()
    probe.step()
    with pytest.warns(probes.ProbeWarning, match=r"WandbSink failed .* call wandb\.init\(\) first"):
        probe.close()
    assert probe.records

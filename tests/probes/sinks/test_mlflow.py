"""Records and alerts in a run of MLflow, in a local file store."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import probes
from probes.record import Series, StepRecords
from probes.sinks import MLflowSink
from tests.probes.sinks.step_records import DIVERGENCE, step_records


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no database
    mlflow.set_tracking_uri(tmp_path.as_uri())
    mlflow.set_experiment("probes")
    yield mlflow
    mlflow.set_tracking_uri(None)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match=r'pip install "stability-probes\[mlflow\]"'):
        MLflowSink()


def test_a_period_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="`every` must be at least 1; got 0"):
        MLflowSink(every=0)


@pytest.mark.parametrize("is_active", [True, False])
def test_a_run_is_given_layers_and_alerts(mlflow: Any, is_active: bool) -> None:
    client = mlflow.MlflowClient()
    with mlflow.start_run() as run:
        run_id = run.info.run_id
        mlflow.log_metric("loss", 1.0)  # another callback logs beside the sink
        sink = MLflowSink(None if is_active else run_id, every=2)
        for step in (6, 7, 8):
            sink.write(step_records(step))
        sink.write_alert(DIVERGENCE)
        sink.close()
    history = client.get_metric_history(run_id, "probes/grad_norm/blocks.0")
    assert [(metric.step, metric.value) for metric in history] == [(6, 0.1), (8, 0.1)]
    metrics = client.get_run(run_id).data.metrics
    assert metrics.keys() == {
        "loss",
        "probes/grad_norm/blocks.0",
        "probes/loss/_all_",
        "probes/attention/entropy/blocks.1",
        "probes/activation_rms/blocks.1",
        "probes/activation_rms/blocks.1.call_2",
        "probes/alert/gradient-explosion/blocks.0",
    }
    assert metrics["probes/loss/_all_"] == math.inf
    assert metrics["probes/alert/gradient-explosion/blocks.0"] == 2.0
    tags = client.get_run(run_id).data.tags
    assert tags["probes/alert/gradient-explosion/blocks.0"] == str(DIVERGENCE)


def test_every_layer_has_a_metric_whatever_its_name(mlflow: Any) -> None:
    layers = ["a", "a/b", "a_b", "a(b", "x" * 300, "x" * 301, "caf\udce9"]
    series = tuple(Series(layer, "grad_norm") for layer in layers)
    with mlflow.start_run() as run:
        sink = MLflowSink(every=1)
        for step in range(2):
            values = np.arange(len(layers)) + 10.0 * step
            sink.write(StepRecords(step, series, values, np.full(len(layers), math.nan)))
        sink.write_alert(replace(DIVERGENCE, layer="caf\udce9"))
        sink.close()
    metrics = mlflow.MlflowClient().get_run(run.info.run_id).data.metrics
    of_layers = {name: value for name, value in metrics.items() if name.startswith("probes/grad_norm/")}
    assert sorted(of_layers.values()) == [10.0 + i for i in range(len(layers))]
    assert {name[17:] for name in of_layers} >= {"a", "a_b", "a_b_2", "a_b_3", "caf_"}


def test_a_sink_that_two_probes_share_sends_what_comes_after_the_first_has_closed(mlflow: Any) -> None:
    with mlflow.start_run() as run:
        sink = MLflowSink(every=1)
        for step in range(3):
            sink.write(StepRecords(step, (Series("a", "grad_norm"),), np.full(1, step), np.full(1, math.nan)))
            sink.close()
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "probes/grad_norm/a")
    assert [metric.value for metric in history] == [0.0, 1.0, 2.0]


def test_a_step_of_more_metrics_than_a_request_may_have_is_split(mlflow: Any) -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(600)))
    with mlflow.start_run() as run:
        probe = probes.attach(model, sinks=[MLflowSink()], activations_every=0, details_every=0)
        model(torch.ones(1, 1)).sum().backward()
        probe.step()
        probe.close()
    assert len(mlflow.MlflowClient().get_run(run.info.run_id).data.metrics) == 1201


def test_a_request_that_fails_ends_the_sink_with_one_warning(mlflow: Any) -> None:
    model = nn.Linear(2, 1)
    probe = probes.attach(model, sinks=[MLflowSink("0" * 32, every=1)])
    with pytest.warns(probes.ProbeWarning, match=r"MLflowSink failed .* not found") as caught:
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            probe.step()
        probe.close()
    assert len(caught) == 1
    assert {record.step for record in probe.records} == {0, 1, 2}


def test_without_a_run_the_sink_is_dropped_and_training_goes_on(mlflow: Any) -> None:
    model = nn.Linear(2, 1)
    probe = probes.attach(model, sinks=[MLflowSink()])
    model(torch.ones(1, 2)).sum().backward()
    probe.step()
    with pytest.warns(probes.ProbeWarning, match=r"MLflowSink failed .* call mlflow\.start_run\(\) first"):
        probe.close()
    assert probe.records

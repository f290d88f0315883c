"""Sinks that one probe after the other is given, as a Trainer does that begins again with a smaller batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import probes
from probes.sinks import CsvSink, JsonLinesSink, TensorBoardSink
from probes.sinks.sink import Sink

pytestmark = pytest.mark.filterwarnings("error::probes.ProbeWarning")


def train_twice(sink: Sink) -> None:
    """Three steps, and three more of another model, which takes up where the first ended."""
    state = None
    for _ in range(2):
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with probes.attach(model, optimizer, sinks=[sink]) as probe:
            if state is not None:
                probe.load_state_dict(state)
            for _ in range(3):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
            state = probe.state_dict()


@pytest.mark.parametrize("make", [lambda folder: JsonLinesSink(folder / "run.jsonl"), TensorBoardSink])
def test_a_file_goes_on_with_the_next_probe(tmp_path: Path, make: Callable[[Path], Sink]) -> None:
    train_twice(make(tmp_path))
    assert probes.read(tmp_path)["grad_norm/(root)"].steps.tolist() == list(range(6))


def test_a_table_goes_on_with_the_next_probe(tmp_path: Path) -> None:
    train_twice(CsvSink(tmp_path / "run.csv"))
    frame = pd.read_csv(tmp_path / "run.csv")
    norms = frame[(frame.quantity == "grad_norm") & (frame.layer == "(root)")]
    assert norms.step.astype(int).tolist() == list(range(6))

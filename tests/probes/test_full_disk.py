"""A disk that fills up costs the sinks that noticed and one warning each; what was written stays."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import probes
from probes.sinks import JsonLinesSink


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files cannot grow beyond ``size`` bytes: to one process, a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_sinks_are_dropped_and_the_recorder_goes_on(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "run.jsonl"
    arguments = {"sinks": [JsonLinesSink(path)], "detectors": [], "log_dir": tmp_path}
    with pytest.warns(
        probes.ProbeWarning, match="JsonLinesSink failed and is dropped.*File too large"
    ) as caught:
        with probes.attach(model, optimizer, **arguments) as probe:
            for step in range(30):
                with largest_file(path.stat().st_size + (200 if step == 20 else 1_000_000)):
                    model(torch.ones(1, 2)).sum().backward()
                    optimizer.step()
                    optimizer.zero_grad()
    sinks = sorted(str(warning.message).partition(" ")[0] for warning in caught)
    assert sinks == ["JsonLinesSink", "TensorBoardSink"]  # each once
    assert {record.step for record in probe.records} == set(range(30))
    assert probes.read(path)["grad_norm/(all)"].steps.tolist() == list(range(19))
    events = next(tmp_path.glob("events.out.tfevents.*"))
    assert probes.read(events)["grad_norm/(all)"].steps.tolist() == list(range(19))
    assert probes.read(tmp_path)["grad_norm/(all)"].steps.tolist() == list(range(30))
    assert probes.read(tmp_path / "flight_recorder.bin")["grad_norm/(all)"].steps.tolist() == list(range(30))

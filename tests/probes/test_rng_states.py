"""A run is taken up at its last checkpoint with the random numbers it had there."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import probes


def draw() -> float:
    """From every global generator."""
    return random.random() + float(np.random.rand()) + float(torch.rand(()))  # noqa: NPY002


def test_the_steps_after_a_checkpoint_are_repeated_bitwise(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters())

    def train(probe: probes.Probe, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4) * draw()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    with pytest.raises(RuntimeError, match="out of luck"):
        with probes.attach(model, optimizer, log_dir=tmp_path, detectors=[]) as probe:
            train(probe, 3)
            checkpoint = copy.deepcopy([model.state_dict(), optimizer.state_dict(), probe.state_dict()])
            losses = train(probe, 4)
            raise RuntimeError("out of luck")
    draw()

    (folder,) = (tmp_path / "incidents").iterdir()
    assert "right before step 3 runs" in (folder / "report.md").read_text()
    with probes.attach(model, optimizer, detectors=[]) as probe:
        model.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
        probe.load_state_dict(checkpoint[2])
        assert probes.load_rng_states(folder) == 3
        assert train(probe, 4) == losses


def test_flushing_is_no_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="out of luck"):
        with probes.attach(model, log_dir=tmp_path) as probe:
            for _ in range(2):
                model(torch.ones(1, 2)).sum().backward()
                probe.step()
            assert {record.step for record in probe.records} == {0}
            probe.flush()
            assert {record.step for record in probe.records} == {0, 1}
            raise RuntimeError("out of luck")
    (folder,) = (tmp_path / "incidents").iterdir()
    assert probes.load_rng_states(folder) == 0


def test_a_folder_without_states(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        probes.load_rng_states(tmp_path)

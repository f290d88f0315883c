"""Training a run of the suite once, keeping what detectors received, and replaying it to any detectors.

A recording holds every number of every step exactly and in order, so a replay gives the verdicts of the live
run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import probes
from experiments.detection_faults import Fault, Injector
from experiments.detection_models import SETUPS, learning_rate_factor
from experiments.detection_suite import Run
from stability.divergence import ALL_LAYERS, Alert, Detector, Readings

FORMAT = 1


@dataclass
class Recording:
    """The readings of a run. As a detector it says nothing and keeps what it is given.

    Attributes:
        run: The run.
        steps: Step of each reading.
        readings: What detectors received there.
    """

    run: Run
    steps: list[int] = field(default_factory=list)
    readings: list[Readings] = field(default_factory=list)

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        self.steps.append(step)
        self.readings.append(readings)
        return []

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a recording is a file of its own."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""

    @property
    def losses(self) -> np.ndarray:
        """Loss of every step, float64 [steps]."""
        return np.array([readings["loss"][ALL_LAYERS] for readings in self.readings])

    def replay(self, detectors: Sequence[Detector], without: Collection[str] = ()) -> list[Alert]:
        """The verdicts of fresh detectors on the run.

        Args:
            detectors: In the order in which a probe asks them.
            without: Quantities that are withheld from them.
        """
        alerts: list[Alert] = []
        for step, everything in zip(self.steps, self.readings, strict=True):
            readings = {
                quantity: layers for quantity, layers in everything.items() if quantity not in without
            }
            for detector in detectors:
                alerts += detector.update(step, readings)
        return alerts

    def save(self, path: Path) -> None:
        """Writes a compressed .npz; a write that is cut short leaves no file of that name."""
        layouts: dict[str, int] = {}  # the series of a step: few different ones in a run
        layout_of_step: list[int] = []
        values: list[float] = []
        for readings in self.readings:
            layout = json.dumps([[quantity, list(layers)] for quantity, layers in readings.items()])
            layout_of_step.append(layouts.setdefault(layout, len(layouts)))
            values += [value for layers in readings.values() for value in layers.values()]
        header = {
            "format": FORMAT,
            "run": asdict(self.run),
            "layouts": [json.loads(text) for text in layouts],
        }
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                header=np.array(json.dumps(header)),
                steps=np.array(self.steps),
                layout_of_step=np.array(layout_of_step),
                values=np.array(values),
            )
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: There is no such recording.
            ValueError: It was written by another version of this module.
        """
        with np.load(path) as content:
            header = json.loads(str(content["header"]))
            steps, values = content["steps"].tolist(), content["values"].tolist()
            layout_of_step = content["layout_of_step"].tolist()
        if header["format"] != FORMAT:
            raise ValueError(f"{path} has format {header['format']}; expected {FORMAT}. Record it again.")
        fault = header["run"].pop("fault")
        run = Run(**header["run"], fault=None if fault is None else Fault(**fault))
        remaining = iter(values)
        readings: list[Readings] = [
            {
                quantity: {layer: next(remaining) for layer in layers}
                for quantity, layers in header["layouts"][i]
            }
            for i in layout_of_step
        ]
        return cls(run, steps, readings)


def build(run: Run) -> tuple[nn.Module, Optimizer]:
    """Model and optimizer of a run, and torch's global generator where the run begins."""
    torch.manual_seed(run.seed)
    setup = SETUPS[run.setup]
    model = setup.make_model()
    return model, setup.make_optimizer(model)


def train(run: Run, model: nn.Module, optimizer: Optimizer, watch: Callable[[int, Tensor], None]) -> None:
    """Trains a run to its end, fault included.

    Args:
        run: The run.
        model: As `build` made it.
        optimizer: Likewise.
        watch: Called with step and loss between backward pass and optimizer step.
    """
    setup = SETUPS[run.setup]
    injector = Injector(run.fault, model, optimizer)
    batches = setup.batches(run.seed, run.batch_size)
    for step, batch in zip(range(run.steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = setup.learning_rate * learning_rate_factor(run.schedule, step, run.steps)
        loss = setup.loss(model, injector.before_forward(step, batch))
        loss.backward()
        injector.before_optimizer(step)
        watch(step, loss)
        optimizer.step()
        optimizer.zero_grad()


def record(run: Run, detectors: Sequence[Detector] = ()) -> tuple[Recording, list[Alert]]:
    """Trains a run under a probe with its default periods.

    Args:
        run: The run.
        detectors: Detectors to judge it live.

    Returns:
        The recording, and the alerts of the detectors.
    """
    model, optimizer = build(run)
    recording = Recording(run)
    with probes.attach(model, optimizer, detectors=[*detectors, recording], on_divergence="ignore") as probe:
        train(run, model, optimizer, lambda step, loss: probe.log(loss=loss))
    return recording, probe.alerts

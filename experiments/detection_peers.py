"""Other tools on the same trainings, each with its defaults, told what its own documentation tells it.

A tool counts as speaking when it says something new: what it repeats at every step counts once, for as long
as it goes on. None may change the training. They are installed apart from this project:

    pip install --no-deps --target PEERS stabilityguard trainpulse trainscope neuraldbg traintools
    pip install --no-deps --target PEERS pyarrow psutil
    PYTHONPATH=.:PEERS python -m experiments.detection_benchmark peers --half scoring
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.detection_recording import build, train
from experiments.detection_scoring import Verdict
from experiments.detection_suite import Run
from stability.divergence import ALL_LAYERS


class Peer(Protocol):
    """A tool at work on one training."""

    def __call__(self, step: int, loss: Tensor) -> Iterable[tuple[str, str]]:
        """Sees a step between backward pass and optimizer step; answers with each verdict's layer, words."""
        ...


def peer_runs(runs: Sequence[Run], per_kind: int = 2) -> list[Run]:
    """The runs on which peers are compared: the first few of every kind, and their fault-free pairs.

    Args:
        runs: A half of the suite.
        per_kind: How many.
    """
    faulty: dict[str, list[Run]] = {}
    for run in runs:
        if run.fault is not None:
            faulty.setdefault(run.fault.kind, []).append(run)
    chosen = [run for of_kind in faulty.values() for run in of_kind[:per_kind]]
    return [*dict.fromkeys(run.pair for run in chosen), *chosen]


class StabilityGuard:
    """Its guarded optimizer, around one that does nothing: it would skip the steps it alerts of."""

    def __init__(self, package: ModuleType, model: nn.Module, optimizer: Optimizer) -> None:
        bystander = SimpleNamespace(
            param_groups=optimizer.param_groups, step=lambda: None, zero_grad=lambda **_: None
        )
        self.guard = package.GuardedOptimizer(bystander, model, verbose=False)
        self.reports: list = []
        self.guard._spike_logger.log_spike = self.reports.append  # which names the layer

    def __call__(self, step: int, loss: Tensor) -> list[tuple[str, str]]:
        """See :class:`Peer`."""
        self.reports.clear()
        self.guard.step(loss=loss.item())
        return [(report.snapshot.spike_layer or "", "spike") for report in self.reports]


class TrainPulse:
    """Its monitor of loss, gradient norm and learning rate."""

    def __init__(self, package: ModuleType, model: nn.Module, optimizer: Optimizer) -> None:
        self.monitor = package.Monitor()
        self.model, self.optimizer = model, optimizer

    def __call__(self, step: int, loss: Tensor) -> list[tuple[str, str]]:
        """See :class:`Peer`."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        values = {
            "loss": loss.item(),
            "grad_norm": nn.utils.get_total_norm(gradients).item(),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        alerts = [alert for name, value in values.items() for alert in self.monitor.log(name, step, value)]
        return [(ALL_LAYERS, alert.detector) for alert in alerts]


class TrainScope:
    """Its scope, which judges the loss."""

    def __init__(self, package: ModuleType, model: nn.Module, optimizer: Optimizer) -> None:
        self.scope = package.TrainScope(model, optimizer).attach()

    def __call__(self, step: int, loss: Tensor) -> list[tuple[str, str]]:
        """See :class:`Peer`."""
        return [] if self.scope.step(loss.item()) is None else [(ALL_LAYERS, "spike")]


class TrainTools:
    """Its gradient-health monitor."""

    def __init__(self, package: ModuleType, model: nn.Module, optimizer: Optimizer) -> None:
        self.monitor = package.GradientHealthMonitor()
        self.model, self.optimizer = model, optimizer

    def __call__(self, step: int, loss: Tensor) -> list[tuple[str, str]]:
        """See :class:`Peer`."""
        report = self.monitor.inspect(self.model, step=step, lr=self.optimizer.param_groups[0]["lr"])
        verdicts = []
        for warning in report.warnings:
            parameter, _, words = warning.partition(" ")
            layer = ALL_LAYERS if parameter == "global" else parameter.rpartition(".")[0]
            verdicts.append((layer, words.partition("(")[0]))
        return verdicts


class NeuralDbg:
    """Its debugger; its events count where something becomes other than healthy."""

    HEALTHY = ("healthy", "normal", "stable", "loss_plateau")

    def __init__(self, package: ModuleType, model: nn.Module, optimizer: Optimizer) -> None:
        self.debugger = package.NeuralDbg(model).__enter__()
        self.num_seen = 0

    def __call__(self, step: int, loss: Tensor) -> list[tuple[str, str]]:
        """See :class:`Peer`."""
        self.debugger.record_loss(loss.item())
        self.debugger.step_iteration()
        events = self.debugger.events[self.num_seen :]
        self.num_seen = len(self.debugger.events)
        return [
            (_neuraldbg_layer(event.layer_name), f"{event.event_type.value} {event.to_state}")
            for event in events
            if event.from_state != "NONE" and event.to_state not in self.HEALTHY
        ]


def _neuraldbg_layer(name: str) -> str:
    """The module: "Linear_blocks.1.mlp" is blocks.1.mlp, "optimizer" speaks of the loss."""
    return ALL_LAYERS if name == "optimizer" else name.partition("_")[2]


PEERS: dict[str, Callable[[ModuleType, nn.Module, Optimizer], Peer]] = {
    "stabilityguard": StabilityGuard,
    "trainpulse": TrainPulse,
    "trainscope": TrainScope,
    "neuraldbg": NeuralDbg,
    "traintools": TrainTools,
}


def installed_peers() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The peers that can be imported, by name, and why the others cannot."""
    packages, reasons = {}, {}
    for name in PEERS:
        try:
            packages[name] = importlib.import_module(name)
        except Exception as error:  # theirs may be any
            reasons[name] = f"{type(error).__name__}: {error}"
    return packages, reasons


def peer_verdicts(name: str, package: ModuleType, run: Run) -> tuple[Verdict, ...]:
    """What a peer says of a run: a training of its own, in a directory of its own.

    Args:
        name: A key of `PEERS`.
        package: As imported.
        run: The run.
    """
    model, optimizer = build(run)
    verdicts: list[Verdict] = []
    last: set[tuple[str, str]] = set()

    def watch(step: int, loss: Tensor) -> None:
        nonlocal last
        said = list(peer(step, loss))
        verdicts.extend(
            Verdict(step, step, layer, words) for layer, words in said if (layer, words) not in last
        )
        last = set(said)

    here = os.getcwd()
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.chdir(directory)  # most of them write files where they are run
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                peer = PEERS[name](package, model, optimizer)
                train(run, model, optimizer, watch)
        finally:
            os.chdir(here)
    return tuple(verdicts)

"""What is measured against bare training: our probes in several settings, and peers where installed.

A contender is a context manager around some training steps. It yields the function that the training calls
with the loss after each backward pass, and leaves nothing behind on process or model when it ends, so that
the next contender, bare training above all, runs free of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

import probes
from experiments.overhead_training import Training

Watch = Callable[[Tensor], None]
BARE = "bare"
OFF = {"every": 0, "activations_every": 0, "details_every": 0, "attention_every": 0}
# Importable name → the contender that needs it.
OPTIONAL_PEERS = {
    "transformers": "transformers DebugUnderflowOverflow",
    "lightning": "lightning grad_norm",
    "wandb": "wandb.watch gradients, each step",
}


@dataclass(frozen=True)
class Contender:
    """One way to watch a training.

    Attributes:
        name: As printed.
        kind: Whether it is the baseline or its repetition, ours, or a peer.
        watch: Context manager around steps of a training.
    """

    name: str
    kind: Literal["bare", "ours", "peer"]
    watch: Callable[[Training], AbstractContextManager[Watch]]


def contenders(directory: Path) -> list[Contender]:
    """Every contender that can run here, the baseline first.

    Args:
        directory: For what they write.

    Returns:
        The contenders.
    """
    ours: dict[str, dict[str, Any]] = {
        "idle (every period 0)": OFF,
        "attention_every=0": {"attention_every": 0},
        "defaults": {},
        "defaults, TensorBoard": {"log_dir": directory / "probes"},
        "attention only: each step, all rows": {**OFF, "attention_every": 1, "attention_rows": None},
        "everything each step, all rows": {
            "activations_every": 1,
            "details_every": 1,
            "attention_every": 1,
            "attention_rows": None,
        },
    }
    peers: dict[str, Callable[[Training], AbstractContextManager[Watch]]] = {
        "torch get_total_norm": _total_norm,
        "foreach norms, TensorBoard": partial(_foreach_norms, directory=directory / "foreach"),
        "torch detect_anomaly": _detect_anomaly,
    }
    optional: dict[str, Callable[[Training], AbstractContextManager[Watch]]] = {
        "transformers": _debug_underflow_overflow,
        "lightning": _lightning_grad_norm,
        "wandb": partial(_wandb_watch, directory=directory),
    }
    peers |= {OPTIONAL_PEERS[module]: optional[module] for module in optional if find_spec(module)}
    return [
        Contender(BARE, "bare", _nothing),
        # What the measurement makes of no difference at all.
        Contender("bare, a second copy", "bare", _nothing),
        Contender("detached (attached, then closed)", "ours", _detached),
        *(Contender(name, "ours", Probes(**arguments)) for name, arguments in ours.items()),
        *(Contender(name, "peer", watch) for name, watch in peers.items()),
    ]


def missing_peers() -> list[str]:
    """Contenders left out because their package is not installed."""
    return [name for module, name in OPTIONAL_PEERS.items() if not find_spec(module)]


class Probes:
    """Our probes, which go on where the last visit ended: step count and detectors' memory are kept.

    Args:
        **arguments: Of `probes.attach`.
    """

    def __init__(self, **arguments: Any) -> None:
        self._arguments = arguments
        self._state: dict[str, Any] | None = None

    @contextmanager
    def __call__(self, training: Training) -> Iterator[Watch]:
        """See :class:`Contender`."""
        with probes.attach(
            training.model, training.optimizer, on_divergence="ignore", **self._arguments
        ) as probe:
            if self._state is not None:
                probe.load_state_dict(self._state)
            yield lambda loss: probe.log(loss=loss)
            self._state = probe.state_dict()


@contextmanager
def _nothing(training: Training) -> Iterator[Watch]:
    yield lambda loss: None


@contextmanager
def _detached(training: Training) -> Iterator[Watch]:
    with probes.attach(training.model, training.optimizer, on_divergence="ignore"):
        training.step(lambda loss: None)
    yield lambda loss: None


@contextmanager
def _total_norm(training: Training) -> Iterator[Watch]:
    def watch(loss: Tensor) -> None:
        gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
        torch.nn.utils.get_total_norm(gradients).item()

    yield watch


@contextmanager
def _foreach_norms(training: Training, directory: Path) -> Iterator[Watch]:
    """The least that gives gradient norms by name: one fused call, one transfer, one scalar for each."""
    from torch.utils.tensorboard import SummaryWriter

    named = [(f"grad_norm/{name}", p) for name, p in training.model.named_parameters() if p.requires_grad]
    with SummaryWriter(str(directory)) as writer:

        def watch(loss: Tensor) -> None:
            seen = [(tag, p.grad) for tag, p in named if p.grad is not None]
            norms = torch._foreach_norm([gradient for _, gradient in seen])
            values = torch.stack([*norms, loss.detach()]).tolist()
            for tag, value in zip([*(tag for tag, _ in seen), "loss"], values, strict=True):
                writer.add_scalar(tag, value, training.steps_done)

        yield watch


@contextmanager
def _detect_anomaly(training: Training) -> Iterator[Watch]:
    with warnings.catch_warnings():
        # It warns that it is slow; how slow is measured here.
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        with torch.autograd.set_detect_anomaly(True):
            yield lambda loss: None


@contextmanager
def _debug_underflow_overflow(training: Training) -> Iterator[Watch]:
    from transformers.debug_utils import DebugUnderflowOverflow

    handles: list[RemovableHandle] = []

    class Removable(DebugUnderflowOverflow):
        def register_forward_hook(self) -> None:
            handles.extend(
                module.register_forward_hook(self.forward_hook) for module in training.model.modules()
            )

    Removable(training.model)
    try:
        yield lambda loss: None
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _lightning_grad_norm(training: Training) -> Iterator[Watch]:
    from lightning.pytorch.utilities import grad_norm

    def watch(loss: Tensor) -> None:
        grad_norm(training.model, norm_type=2)

    yield watch


@contextmanager
def _wandb_watch(training: Training, directory: Path) -> Iterator[Watch]:
    import wandb  # type: ignore[import-not-found, unused-ignore]

    settings = wandb.Settings(silent=True, console="off")
    with wandb.init(mode="offline", dir=str(directory), settings=settings) as run:
        run.watch(training.model, log="gradients", log_freq=1)
        try:
            yield lambda loss: run.log({"loss": loss.detach()})
        finally:
            run.unwatch(training.model)

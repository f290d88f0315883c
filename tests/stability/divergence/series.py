"""Readings of trainings that never were, healthy ones and others; detectors that say what they are told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

import numpy as np

from stability.divergence import Alert, Detector, Readings

LAYERS = ("embedding", "blocks.0.mlp", "blocks.1.mlp", "head")
ATTENTION = ("blocks.0.attention", "blocks.1.attention")
Step = dict[str, dict[str, float]]


def healthy(steps: int, seed: int = 0) -> Iterator[Step]:
    """What a probe records with its defaults: norms and loss at every step, attention at every tenth."""
    rng = np.random.default_rng(seed)
    weights = dict.fromkeys(LAYERS, 10.0)
    for step in range(steps):
        warm_up = min(1.0, (step + 1) / 20)
        for layer in LAYERS:
            weights[layer] *= 1 + 1e-3 * warm_up * rng.normal()
        gradients = {layer: float(rng.lognormal(0.0, 0.5)) for layer in LAYERS}
        readings: Step = {
            "weight_norm": dict(weights),
            "grad_norm": {"(all)": sum(gradients.values()), **gradients},
            "loss": {"(all)": 1 + 2 * float(np.exp(-step / 50)) + 0.1 * float(rng.normal())},
        }
        if step % 10 == 0:
            for quantity, value in (
                ("max_logit", 4.0),
                ("entropy", 2.0),
                ("saturated_share", 0.05),
                ("row_sum", 1.0),
                ("jacobian_frobenius", 0.3),
                ("off_diagonal_share", 0.1),
            ):
                readings[f"attention/{quantity}"] = {
                    layer: value * float(rng.lognormal(0.0, 0.1)) for layer in ATTENTION
                }
        if step % 100 == 0:
            readings["adam_update_rms"] = {layer: float(rng.lognormal(0.0, 0.2)) for layer in LAYERS}
            readings["update_ratio"] = {layer: 1e-3 * float(rng.lognormal(0.0, 0.2)) for layer in LAYERS}
        yield readings


def with_fault(
    steps: int, at: int, fault: Callable[[Step, int], None], seed: int = 0
) -> Iterator[tuple[int, Step]]:
    """A healthy training, of which ``fault`` changes the readings of a step, given how long it has lasted."""
    for step, readings in enumerate(healthy(steps, seed)):
        if step >= at:
            fault(readings, step - at)
        yield step, readings


def scaled(quantity: str, layer: str, factor: Callable[[int], float]) -> Callable[[Step, int], None]:
    """A fault that multiplies one quantity of one layer, where it is recorded."""

    def fault(readings: Step, since: int) -> None:
        if quantity in readings:
            readings[quantity][layer] *= factor(since)

    return fault


def verdicts(detector: Detector, series: Iterable[tuple[int, Readings]]) -> list[Alert]:
    """Everything a detector says."""
    return [alert for step, readings in series for alert in detector.update(step, readings)]


class Scripted:
    """A detector that says what it is told to say, at that step."""

    def __init__(self, *alerts: Alert) -> None:
        self._alerts = alerts

    def update(self, step: int, readings: Readings) -> list[Alert]:
        return [alert for alert in self._alerts if alert.step == step]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def num_calls(work: Callable[[], object]) -> int:
    """Python functions that it calls: time that no clock need be trusted for."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls

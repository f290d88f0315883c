"""What every detector takes and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

ALL_LAYERS = "(all)"
"""The layer name of quantities that belong to the whole model: its gradient norm, the loss."""

Readings = Mapping[str, Mapping[str, float]]
"""One step's numbers: quantity → layer → value. Layers stand in the order of the forward pass."""


Severity = Literal["warning", "divergence"]

# What happens at a step, and is over. Every other kind is a condition, which may last.
EVENTS = frozenset({"weight-jump", "initialisation", "non-finite", "loss-spike", "gradient-explosion"})


@dataclass(frozen=True)
class Alert:
    """A detector's verdict.

    Attributes:
        step: Optimizer step whose numbers led to the verdict.
        layer: Layer where it began; ALL_LAYERS where it is nobody's (the loss, the learning rate), or nothing
            recorded tells whose.
        quantity: Quantity that showed it.
        severity: "warning", or "divergence" where training as it runs will not recover by itself.
        value: The quantity's value at that step.
        reference: What it was compared with, in the same unit; None where there is nothing to compare.
        reason: One sentence for a person.
        kind: Signature of the fault, such as "gradient-explosion".
        onset_step: First step at which the quantity had left its range; None where that is not known.
        evidence: (step, value) of the quantity in that layer before and from onset, at most 16 points.
        spread: Layers that followed, in the order of time, then of the forward pass.
        remedies: What usually helps, with its literature.
        rank: Process of a distributed run where a value that is not finite came up first; None where that is
            not known, or there is one process.

    Example:
        >>> alert = Alert(120, "blocks.3.mlp", "grad_norm", "warning", 9.0, 0.1, "it grew", onset_step=114)
        >>> print(alert)
        step 120: warning in blocks.3.mlp, since step 114: it grew
    """

    step: int
    layer: str
    quantity: str
    severity: Severity
    value: float
    reference: float | None
    reason: str
    kind: str = ""
    onset_step: int | None = None
    evidence: tuple[tuple[int, float], ...] = ()
    spread: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()
    rank: int | None = None

    @property
    def name(self) -> str:
        """Its kind, or the quantity of one that has none."""
        return self.kind or self.quantity

    @property
    def is_event(self) -> bool:
        """Whether it tells of what happened (a jump, a spike) rather than of what a layer is like since."""
        return self.kind in EVENTS

    @property
    def in_short(self) -> str:
        """What, where and when, for a list of others."""
        return f"{self.name} in {self.layer} at step {self.step}"

    def __str__(self) -> str:
        since = "" if self.onset_step in (None, self.step) else f", since step {self.onset_step}"
        return f"step {self.step}: {self.severity} in {self.layer}{since}: {self.reason}"


def alert_from(fields: Mapping[str, Any]) -> Alert:
    """The alert of ``dataclasses.asdict``, also after JSON has made lists of its tuples."""
    return Alert(
        **{
            **fields,
            "evidence": tuple((step, value) for step, value in fields["evidence"]),
            "spread": tuple(fields["spread"]),
            "remedies": tuple(fields["remedies"]),
        }
    )


class Detector(Protocol):
    """Turns the numbers of one step after the other into alerts.

    Example:
        >>> class LossIsNaN:
        ...     def update(self, step, readings):
        ...         loss = readings.get("loss", {}).get(ALL_LAYERS, 0.0)
        ...         if loss == loss:
        ...             return []
        ...         return [Alert(step, ALL_LAYERS, "loss", "divergence", loss, None, "it is no number")]
        ...     def state_dict(self):
        ...         return {}
        ...     def load_state_dict(self, state):
        ...         pass
        >>> print(*LossIsNaN().update(5, {"loss": {ALL_LAYERS: float("nan")}}))
        step 5: divergence in (all): it is no number
    """

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """Takes the numbers of the next recorded step; answers with the alerts that begin there."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that later verdicts depend on, as plain Python values, for a checkpoint."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        ...


def what_it_reads(detector: Detector) -> str:
    """The quantity or the loss that tells a detector from others of its type; empty of one that has none."""
    names = (getattr(detector, attribute, None) for attribute in ("quantity", "name"))
    return next((name for name in names if isinstance(name, str)), "")

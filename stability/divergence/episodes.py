"""Several detectors as one voice: what follows from one fault is one alert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from stability.divergence.detector import Alert, Detector, Readings

# Of verdicts with the same onset the likeliest cause comes first: weights before what they compute, outputs
# before the loss, the loss before the gradients that come back from it.
_CAUSES = (
    "weight-jump",
    "initialisation",
    "dead-layer",
    "saturation",
    "row-sum-growth",
    "logit-growth",
    "entropy-collapse",
    "jacobian-growth",
    "dense-coupling",
    "update-rms",
    "update-ratio",
    "non-finite",
    "loss-spike",
    "gradient-explosion",
    "vanishing-gradient",
)
_MAX_CONSEQUENCES = 8


class EpisodeDetector:
    """Hears several detectors and speaks once per episode, naming where it began.

    An episode opens with the first verdict: of several at that step the one with the earliest onset. Later
    verdicts are its consequences for as long as none is ``quiet_steps`` after the one before, and are not
    told one by one. Only a first verdict of divergence is told again, under the episode's layer and onset,
    with what has followed since.

    Args:
        detectors: Whose verdicts are merged.
        quiet_steps: Steps without a verdict that end an episode.

    Raises:
        ValueError: If ``quiet_steps`` is not positive.

    Example:
        >>> from stability.divergence import GradientExplosionDetector, NonFiniteDetector
        >>> detector = EpisodeDetector([NonFiniteDetector(), GradientExplosionDetector(min_history=2)])
        >>> norms = [1.0, 1.0, 1.0, 500.0, float("nan")]
        >>> alerts = [detector.update(i, {"grad_norm": {"a": norm}}) for i, norm in enumerate(norms)]
        >>> [(alert.step, alert.severity, alert.onset_step) for step in alerts for alert in step]
        [(3, 'warning', 3), (4, 'divergence', 3)]
    """

    def __init__(self, detectors: Sequence[Detector], *, quiet_steps: int = 100) -> None:
        if quiet_steps < 1:
            raise ValueError(f"quiet_steps must be at least 1; got {quiet_steps}.")
        self._detectors = tuple(detectors)
        self._quiet_steps = quiet_steps
        self._origin: Alert | None = None
        self._last_step = 0
        self._consequences: list[str] = []

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        alerts = [alert for detector in self._detectors for alert in detector.update(step, readings)]
        if not alerts:
            return []
        if self._origin is not None and step - self._last_step > self._quiet_steps:
            self._origin = None
        self._last_step = step
        alerts.sort(key=_by_onset_and_cause)
        begins = self._origin is None
        if self._origin is None:
            self._origin, *alerts = alerts
            self._consequences = []
        followed = [f"{alert.kind} in {alert.layer} at step {step}" for alert in alerts]
        self._consequences = (self._consequences + followed)[:_MAX_CONSEQUENCES]
        diverges = self._origin.severity == "warning" and any(a.severity == "divergence" for a in alerts)
        if diverges:
            self._origin = replace(self._origin, severity="divergence")
        if not begins and not diverges:
            return []
        reason = self._origin.reason
        if self._consequences:
            reason += f" What followed: {', '.join(self._consequences)}."
        return [replace(self._origin, step=step, reason=reason)]

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {
            "detectors": [detector.state_dict() for detector in self._detectors],
            "origin": None if self._origin is None else asdict(self._origin),
            "last_step": self._last_step,
            "consequences": list(self._consequences),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        for detector, of_detector in zip(self._detectors, state["detectors"], strict=True):
            detector.load_state_dict(of_detector)
        self._origin = None if state["origin"] is None else _alert_from(state["origin"])
        self._last_step = state["last_step"]
        self._consequences = list(state["consequences"])


def _by_onset_and_cause(alert: Alert) -> tuple[int, int]:
    onset = alert.step if alert.onset_step is None else alert.onset_step
    is_weight = alert.kind == "non-finite" and alert.quantity == "weight_norm"
    cause = -1 if is_weight else _CAUSES.index(alert.kind) if alert.kind in _CAUSES else len(_CAUSES)
    return onset, cause


def _alert_from(fields: dict[str, Any]) -> Alert:
    """The alert of ``asdict``, also after JSON has made lists of its tuples."""
    return Alert(
        **{
            **fields,
            "evidence": tuple((step, value) for step, value in fields["evidence"]),
            "spread": tuple(fields["spread"]),
            "remedies": tuple(fields["remedies"]),
        }
    )

"""Several detectors as one voice: what follows from one fault is one alert, unless it is graver or stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from stability.divergence.aftermath import Aftermath
from stability.divergence.detector import ALL_LAYERS, Alert, Detector, Readings, alert_from, what_it_reads

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
    "frozen-layer",
)
_MAX_CONSEQUENCES = 8


def _quantity(detector: Detector) -> str:
    return getattr(detector, "quantity", "")


class Episode(NamedTuple):
    """What began, and what it led to.

    Attributes:
        origin: The first verdict; "divergence" as soon as one of its consequences is.
        consequences: The first eight verdicts that followed, each kind, layer and step once.

    Example:
        >>> first, second = (Alert(step, "ab"[step], "q", "warning", 9.0, 1.0, "") for step in range(2))
        >>> Episode(first, (second,)).spread
        ('b',)
    """

    origin: Alert
    consequences: tuple[Alert, ...] = ()

    @property
    def spread(self) -> tuple[str, ...]:
        """The other layers that the origin or a consequence names, in that order."""
        layers = [*self.origin.spread]
        for alert in self.consequences:
            layers += [alert.layer, *alert.spread]
        return tuple(dict.fromkeys(one for one in layers if one not in (self.origin.layer, ALL_LAYERS)))

    def followed_by(self, alerts: Sequence[Alert]) -> Episode:
        """The episode with later verdicts."""
        once: dict[tuple[str, str, int], Alert] = {}
        for alert in (self.origin, *self.consequences, *alerts):
            once.setdefault((alert.name, alert.layer, alert.step), alert)
        origin, *consequences = once.values()
        if any(alert.severity == "divergence" for alert in alerts):
            origin = replace(origin, severity="divergence")
        return Episode(origin, tuple(consequences[:_MAX_CONSEQUENCES]))

    def as_alert(self, step: int) -> Alert:
        """The origin, told at a step with what has followed until then."""
        reason = self.origin.reason
        if self.consequences:
            reason += f" What followed: {', '.join(alert.in_short for alert in self.consequences)}."
        return replace(self.origin, step=step, reason=reason, spread=self.spread)


class EpisodeDetector:
    """Hears several detectors and speaks once per episode, naming where it began; again of what is graver.

    An episode opens with the first verdict: of several at that step the one with the earliest onset. Later
    verdicts are its consequences for as long as none is ``quiet_steps`` after the one before, and are not
    told one by one. Only what is graver is: in an episode that began with a condition (logits that grow) the
    first event (a jump, a spike), which may have nothing to do with it; and a first verdict of divergence,
    under the episode's layer and onset, with what has followed since. A consequence that is still there when
    the episode is over, while what began it is not, is told then: attention that collapsed in the wake of a
    gradient spike.

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
        self._episode: Episode | None = None
        self._aftermath = Aftermath()
        self._has_event = False  # the episode
        self._last_step = 0

    @property
    def detectors(self) -> tuple[Detector, ...]:
        """Whose verdicts are merged."""
        return self._detectors

    @property
    def episode(self) -> Episode | None:
        """The newest episode, with the consequences that were not told; None before the first."""
        return self._episode

    def update(self, step: int, readings: Readings) -> list[Alert]:
        """See :class:`~stability.divergence.Detector`."""
        alerts = [alert for detector in self._detectors for alert in detector.update(step, readings)]
        self._aftermath.see(readings)
        is_over = step - self._last_step > self._quiet_steps
        stayed = self._aftermath.settle(step) if is_over else []
        if not alerts:
            return stayed
        alerts.sort(key=_by_onset_and_cause)
        before = None if is_over else self._episode
        if before is None:
            self._aftermath = Aftermath(alerts[0])
        self._aftermath.take(alerts)
        self._last_step = step
        self._episode = (before or Episode(alerts[0])).followed_by(alerts)
        had_event = before is not None and self._has_event
        events = [alert for alert in alerts if alert.is_event]
        self._has_event = had_event or bool(events)
        if before is None or before.origin.severity != self._episode.origin.severity:
            return [*stayed, self._episode.as_alert(step)]
        return [] if had_event else [_after(before.origin, event) for event in events[:1]]

    def state_dict(self) -> dict[str, Any]:
        """See :class:`~stability.divergence.Detector`."""
        return {
            "detectors": {name: detector.state_dict() for name, detector in self._named()},
            "last_step": self._last_step,
            "episode": [asdict(alert) for alert in self._alerts()],
            "aftermath": self._aftermath.state_dict(),
            "has_event": self._has_event,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :class:`~stability.divergence.Detector`."""
        saved = dict(state["detectors"])
        for (name, detector), (earlier, _) in zip(self._named(), self._named(_quantity), strict=True):
            for known in (name, earlier):  # as an earlier version named them
                if known in saved:  # not one that has been added since
                    detector.load_state_dict(saved[known])
                    break
        self._last_step = state["last_step"]
        alerts = [alert_from(fields) for fields in state["episode"]]
        self._episode = Episode(alerts[0], tuple(alerts[1:])) if alerts else None
        self._aftermath = Aftermath()
        self._has_event = any(alert.is_event for alert in alerts)
        if "aftermath" in state:  # not what an earlier version saved
            self._aftermath.load_state_dict(state["aftermath"])
            self._has_event = state["has_event"]

    def _named(self, reads: Callable[[Detector], str] = what_it_reads) -> Iterator[tuple[str, Detector]]:
        """Names for the state: a type, what it reads, and a number where that is not enough."""
        count: Counter[str] = Counter()
        for detector in self._detectors:
            name = f"{type(detector).__name__} {reads(detector)}".strip()
            count[name] += 1
            yield (f"{name} {count[name]}" if count[name] > 1 else name), detector

    def _alerts(self) -> list[Alert]:
        return [] if self._episode is None else [self._episode.origin, *self._episode.consequences]


def _by_onset_and_cause(alert: Alert) -> tuple[int, int]:
    onset = alert.step if alert.onset_step is None else alert.onset_step
    is_weight = alert.kind == "non-finite" and alert.quantity == "weight_norm"
    cause = -1 if is_weight else _CAUSES.index(alert.kind) if alert.kind in _CAUSES else len(_CAUSES)
    return onset, cause


def _after(origin: Alert, event: Alert) -> Alert:
    return replace(event, reason=f"{event.reason} It follows {origin.in_short}.")

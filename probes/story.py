"""A run in words: what happened, where and when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from probes.alerts import gravity
from probes.departures import Departure
from probes.quantities import QUANTITIES
from probes.record import ALL_LAYERS
from stability.divergence import Alert

# A layer that goes a factor of a hundred more or less than its peers stands out without a detector. Gradients
# of single layers in sound runs go a factor of thirty.
_STANDS_OUT = 2.0
# What led to a value that is not finite went on until then; a spike that was over long before did not.
_RECENT_SHARE, _RECENT_STEPS = 20, 20


class Story(NamedTuple):
    """What a report says first.

    Attributes:
        title: A few words: what, in which layer.
        sentence: The same with step and evidence; names are in backquotes.
        what: Signature of the fault.
        layer: Where it began; None where nothing stands out.
        step: When it began.
        quantity: What shows it.
        spread: Its other layers: the one that came before, those that followed.
        remedies: What usually helps.
    """

    title: str
    sentence: str
    what: str = "nothing that stands out"
    layer: str | None = None
    step: int | None = None
    quantity: str | None = None
    spread: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()


def tell(
    alerts: Sequence[Alert] | None, ranking: Sequence[Departure], before_broken: Sequence[Departure] = ()
) -> Story:
    """The story of a run: the first of its gravest alerts, or what is plain in the data.

    Divergence is graver than an event (a jump, a spike), an event than a condition, which may be harmless.

    Args:
        alerts: Of the run; None where what was read holds none of any run. The default detectors name the
            origin of an episode, not the loudest layer.
        ranking: As of :func:`probes.departures.departures`.
        before_broken: The same of the steps before anything was not finite, where something was.
    """
    if alerts:
        gravest, first = max(alerts, key=gravity), alerts[0]
        story = _of_alert(gravest)
        if gravest is first or gravest.severity != first.severity:
            return story
        # An event after a condition, which may be its cause, and may be its reason's last words.
        told = "" if first.in_short in gravest.reason else f" Before it came {in_short(first, '`')}."
        return story._replace(sentence=story.sentence + told, spread=(first.layer, *story.spread))
    no_alert = "Alerts are not in this file" if alerts is None else "No alert was recorded"
    if not ranking:
        return Story("Nothing to compare", f"{no_alert}, and no layer has two steps above zero to compare.")
    broken = [departure for departure in ranking if not math.isfinite(departure.farthest)]
    far = [one for one in (before_broken if broken else ranking) if one.decades >= _STANDS_OUT]
    if broken:
        first_broken = min(departure.step for departure in broken)
        recent = first_broken - max(first_broken // _RECENT_SHARE, _RECENT_STEPS)
        far = [departure for departure in far if departure.farthest_step >= recent]
    if not far and not broken:
        return Story(
            "Nothing stands out",
            f"{no_alert}, and no layer went a factor of 100 away from its past and its peers.",
        )
    origin = far[0] if far else min(broken, key=lambda departure: departure.step)
    what = f"{origin.quantity} left its range" if far else "non finite"
    sentence = (
        f"{no_alert}. What stands out: {origin.quantity} in `{origin.layer}` went from "
        f"{number(origin.usual)} to {number(origin.farthest)} ({unit(origin.quantity)}), away from its past "
        f"and its peers since step {origin.step}"
    )
    if far and broken:
        sentence += f"; from step {first_broken} on, values are not finite"
    return Story(
        f"{what} in {origin.layer}",
        f"{sentence}.",
        what,
        origin.layer,
        origin.step,
        origin.quantity,
        tuple(departure.layer for departure in (far or broken) if departure is not origin),
    )


def _of_alert(alert: Alert) -> Story:
    sentence = describe(replace(alert, remedies=()))
    what = alert.name.replace("-", " ")
    return Story(
        f"{what} {where(alert.layer)}",
        f"{sentence[0].upper()}{sentence[1:]}.",
        f"{what} ({alert.severity})",
        alert.layer,
        onset(alert),
        alert.quantity,
        alert.spread,
        alert.remedies,
    )


def describe(alert: Alert) -> str:
    """An alert as a clause: what, where, when, evidence, spread, remedies."""
    what = alert.name.replace("-", " ")
    place = where(alert.layer, "`")
    parts = [f"{what} ({alert.severity}) began {place} at step {onset(alert)}: {alert.reason.rstrip('.')}"]
    if len(alert.evidence) > 1:
        shown = alert.evidence[-6:]
        values = ", ".join(number(value) for _, value in shown)
        parts.append(f"{alert.quantity} went {values} over steps {shown[0][0]} to {shown[-1][0]}")
    if alert.spread:
        more = f" and {len(alert.spread) - 3} more" if len(alert.spread) > 3 else ""
        parts.append(f"it spread to {', '.join(f'`{layer}`' for layer in alert.spread[:3])}{more}")
    if alert.remedies:
        parts.append("what usually helps: " + "; ".join(remedy.rstrip(".") for remedy in alert.remedies))
    return "; ".join(parts)


def in_short(alert: Alert, quote: str = "") -> str:
    """An alert in a list of others: kind, where and when."""
    what = alert.name.replace("-", " ")
    return f"{what} {where(alert.layer, quote)} at step {alert.step}"


def onset(alert: Alert) -> int:
    """When it began, as far as that is known."""
    return alert.step if alert.onset_step is None else alert.onset_step


def where(layer: str, quote: str = "") -> str:
    """In which layer."""
    return "in the whole model" if layer == ALL_LAYERS else f"in {quote}{layer}{quote}"


def number(value: float | None) -> str:
    """A number with four digits."""
    return "–" if value is None else f"{value:.4g}"


def unit(quantity: str) -> str:
    """Unit of a quantity; what the script logs has the script's own."""
    return QUANTITIES[quantity].unit if quantity in QUANTITIES else "as logged"

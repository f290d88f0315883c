"""What an incident's report says, as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

import shlex
import traceback
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from probes.grids import group_steps
from probes.page import HOW_TO_READ, document, draw
from probes.pictures import RunView, pictures
from probes.record import StepRecords
from probes.story import describe, in_short, number, onset, unit, where
from stability.divergence import Alert
from stability.html_table import html_table

MAX_MAPS = 8
MAX_ALERTS = 40


class Incident(NamedTuple):
    """All that a report tells.

    Attributes:
        kind: Signature of the alert, "exit", or the name of the exception that ended the training.
        step: Step it is about.
        alert: The verdict it is about, or the gravest one before the end; None if there was none.
        alerts: All verdicts of the run so far, oldest first.
        consequences: What has followed from the alert, as far as detectors spoke of it.
        error: What ended the training, if anything did.
        layers: The model's layers in the order of the forward pass.
        steps: The flight recorder's steps.
        environment: Versions, device, command.
        checkpoint_step: Step that comes after the last checkpoint the probe knows of.
        folder: Where the report lies.
        files: The files beside the report and what they hold.
    """

    kind: str
    step: int
    alert: Alert | None
    alerts: Sequence[Alert]
    consequences: Sequence[Alert]
    error: BaseException | None
    layers: Sequence[str]
    steps: Sequence[StepRecords]
    environment: dict[str, Any]
    checkpoint_step: int
    folder: str
    files: dict[str, str]

    @property
    def summary(self) -> str:
        """What, where, when, the evidence, and what usually helps, in one sentence."""
        verdict = "no alert came before" if self.alert is None else describe(self.alert)
        if self.error is not None:
            first_line = traceback.format_exception_only(self.error)[0].splitlines()[0]
            return f"{first_line} ended the training in step {self.step}; {verdict}.{self._since_then}"
        if self.kind == "exit":
            return f"The training ended after step {self.step}; {verdict}.{self._since_then}"
        return f"{verdict[0].upper()}{verdict[1:]}."

    @property
    def _since_then(self) -> str:
        later = [one for one in self.consequences if self.alert is not None and one.step > self.alert.step]
        return f" Since then: {', '.join(in_short(one, '`') for one in later)}." if later else ""


def markdown(incident: Incident) -> str:
    """The report without pictures."""
    lines = [f"# {_title(incident)}", "", incident.summary, ""]
    for heading, rows in _tables(incident):
        head, *body = rows
        lines += [f"## {heading}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(_in_table(cell) for cell in row) + " |" for row in body] + [""]
    lines += ["## To reproduce", "", "```", *_recipe(incident), "```", ""]
    if incident.error is not None:
        lines += ["## Traceback", "", "```", _traceback(incident.error), "```", ""]
    return "\n".join(lines)


def html(incident: Incident) -> str:
    """The report with heat maps layer × step."""
    parts = []
    drawn = _pictures(incident)
    if drawn:
        parts.append(f"<h2>The last recorded steps</h2>{HOW_TO_READ}")
        parts += [f"<figure>{picture}</figure>" for picture in drawn]
    for heading, (head, *body) in _tables(incident):
        parts.append(f"<h2>{escape(heading)}</h2>{html_table(head, body)}")
    parts.append(f"<h2>To reproduce</h2><pre>{escape(chr(10).join(_recipe(incident)))}</pre>")
    if incident.error is not None:
        parts.append(f"<h2>Traceback</h2><pre>{escape(_traceback(incident.error))}</pre>")
    return document(_title(incident), incident.summary, parts)


def _in_table(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _title(incident: Incident) -> str:
    what = incident.kind.replace("-", " ")
    is_end = incident.error is not None or incident.kind == "exit"
    place = f" {where(incident.alert.layer)}" if incident.alert and not is_end else ""
    return f"Step {incident.step}: {what}{place}"


def _tables(incident: Incident) -> Iterable[tuple[str, list[list[str]]]]:
    alert = incident.alert
    if alert is not None:
        facts = [
            ["verdict", f"{alert.name}, {alert.severity}"],
            ["layer", f"`{alert.layer}`"],
            ["quantity", f"{alert.quantity} ({unit(alert.quantity)})"],
            ["seen at step", str(alert.step)],
            ["began at step", "–" if alert.onset_step is None else str(alert.onset_step)],
            ["value", number(alert.value)],
            ["compared with", number(alert.reference)],
            [
                "spread to",
                ", ".join(f"`{layer}`" for layer in alert.spread) or "no other layer that a detector named",
            ],
            *(["what usually helps", remedy] for remedy in alert.remedies),
        ]
        yield "What was seen", [["", ""], *facts]
        if alert.evidence:
            points = [[str(step), number(value)] for step, value in alert.evidence]
            yield f"Evidence: {alert.quantity} in {alert.layer}", [["step", alert.quantity], *points]
    if incident.consequences:
        yield "What followed, the first eight verdicts at most", _of_alerts(incident.consequences)
    if len(incident.alerts) > 1:
        newest = incident.alerts[-MAX_ALERTS:]
        yield f"Alerts of this run, the last {len(newest)} of {len(incident.alerts)}", _of_alerts(newest)
    yield "Files", [["file", "holds"], *([f"`{name}`", text] for name, text in incident.files.items())]
    rows = [[key, str(value)] for key, value in incident.environment.items()]
    yield "Environment", [["", ""], *rows]


def _of_alerts(alerts: Sequence[Alert]) -> list[list[str]]:
    rows = [[str(a.step), a.severity, a.name, f"`{a.layer}`", a.reason] for a in alerts]
    return [["step", "severity", "kind", "layer", "reason"], *rows]


def _recipe(incident: Incident) -> list[str]:
    step = incident.checkpoint_step
    changes = [*([f"the checkpoint of step {step} loaded"] if step else []), "another log_dir"]
    directory, command = incident.environment["directory"], incident.environment["command"]
    return [
        f"cd {shlex.quote(directory)} && {command}  # as before, with {' and '.join(changes)}",
        f"probes.load_rng_states({incident.folder!r})  # in the script, right before step {step} runs",
    ]


def _pictures(incident: Incident) -> list[str]:
    alert = incident.alert
    run = RunView(
        "",
        group_steps(incident.steps),
        incident.layers,
        alert.layer if alert else None,
        onset(alert) if alert else None,
        alert.spread if alert else (),
    )
    return [
        draw(picture) for picture in pictures([run], [alert.quantity] if alert else [], max_maps=MAX_MAPS)
    ]

"""What an incident's report says, as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

import shlex
import traceback
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from probes.charts import heat_map, line
from probes.quantities import QUANTITIES
from probes.record import ALL_LAYERS, StepRecords
from stability.divergence import Alert

MAX_ROWS = 40
MAX_COLUMNS = 240
MAX_MAPS = 8
MAX_ALERTS = 40
_USUAL_MAPS = (
    "grad_norm",
    "weight_norm",
    "activation_rms",
    "activation_grad_norm",
    "attention/entropy",
    "attention/max_logit",
    "update_ratio",
)

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em;
       color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
.lead { font-size: 1.15em; border-left: 4px solid currentColor; padding-left: 0.8em; }
table { border-collapse: collapse; } th, td { text-align: left; padding: 0.15em 1em 0.15em 0; vertical-align:
top; } td.number { text-align: right; font-variant-numeric: tabular-nums; } th { font-weight: 600;
border-bottom: 1px solid #888; } pre { background: #8882; padding: 0.8em; overflow-x: auto; } figure { margin:
1.2em 0; overflow-x: auto; } svg .title, svg .onset { font-weight: 700; } svg .frame, svg .key { fill: none;
stroke: #888; stroke-width: 1; } svg .key { fill: revert-layer; } @media (prefers-color-scheme: dark) { body {
color: #e8e8e8; background: #161616; } }
"""


class Incident(NamedTuple):
    """All that a report tells.

    Attributes:
        kind: Signature of the alert, "exit", or the name of the exception that ended the training.
        step: Step it is about.
        alert: The verdict it is about, or the gravest one before the end; None if there was none.
        alerts: All verdicts of the run so far, oldest first.
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
            return f"{first_line} ended the training in step {self.step}; {verdict}."
        if self.kind == "exit":
            return f"The training ended after step {self.step}; {verdict}."
        return f"{verdict[0].upper()}{verdict[1:]}."


def describe(alert: Alert) -> str:
    """An alert as a clause: what, where, when, evidence, spread, remedies."""
    onset = alert.step if alert.onset_step is None else alert.onset_step
    where = "in the whole model" if alert.layer == ALL_LAYERS else f"in `{alert.layer}`"
    what = (alert.kind or alert.quantity).replace("-", " ")
    parts = [f"{what} ({alert.severity}) began {where} at step {onset}: {alert.reason.rstrip('.')}"]
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


def number(value: float | None) -> str:
    """A number with four digits."""
    return "–" if value is None else f"{value:.4g}"


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
    title = escape(_title(incident))
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">',
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>",
        f'<p class="lead">{_with_code(incident.summary)}</p>',
    ]
    pictures = _pictures(incident)
    if pictures:
        parts.append(
            "<h2>The last recorded steps</h2><p>A layer a row, the first on top. A checkerboard is NaN or"
        )
        parts.append(" infinite, an empty cell was not recorded; ▶ and ▼ point at where it began.</p>")
        parts += [f"<figure>{picture}</figure>" for picture in pictures]
    for heading, (head, *body) in _tables(incident):
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        rows = "".join(f"<tr>{''.join(f'<td>{_with_code(cell)}</td>' for cell in row)}</tr>" for row in body)
        parts.append(f"<h2>{escape(heading)}</h2><table><tr>{cells}</tr>{rows}</table>")
    parts.append(f"<h2>To reproduce</h2><pre>{escape(chr(10).join(_recipe(incident)))}</pre>")
    if incident.error is not None:
        parts.append(f"<h2>Traceback</h2><pre>{escape(_traceback(incident.error))}</pre>")
    return "".join(parts) + "</body></html>\n"


def _in_table(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _title(incident: Incident) -> str:
    what = incident.kind.replace("-", " ")
    is_end = incident.error is not None or incident.kind == "exit"
    where = f" in {incident.alert.layer}" if incident.alert and not is_end else ""
    return f"Step {incident.step}: {what}{where}"


def _tables(incident: Incident) -> Iterable[tuple[str, list[list[str]]]]:
    alert = incident.alert
    if alert is not None:
        facts = [
            ["verdict", f"{alert.kind or alert.quantity}, {alert.severity}"],
            ["layer", f"`{alert.layer}`"],
            ["quantity", f"{alert.quantity} ({_unit(alert.quantity)})"],
            ["seen at step", str(alert.step)],
            ["began at step", "–" if alert.onset_step is None else str(alert.onset_step)],
            ["value", number(alert.value)],
            ["compared with", number(alert.reference)],
            ["spread to", ", ".join(f"`{layer}`" for layer in alert.spread) or "–"],
            *(["what usually helps", remedy] for remedy in alert.remedies),
        ]
        yield "What was seen", [["", ""], *facts]
        if alert.evidence:
            points = [[str(step), number(value)] for step, value in alert.evidence]
            yield f"Evidence: {alert.quantity} in {alert.layer}", [["step", alert.quantity], *points]
    if len(incident.alerts) > 1:
        newest = incident.alerts[-MAX_ALERTS:]
        rows = [[str(a.step), a.severity, a.kind or a.quantity, f"`{a.layer}`", a.reason] for a in newest]
        yield (
            f"Alerts of this run, the last {len(newest)} of {len(incident.alerts)}",
            [["step", "severity", "kind", "layer", "reason"], *rows],
        )
    yield "Files", [["file", "holds"], *([f"`{name}`", text] for name, text in incident.files.items())]
    rows = [[key, str(value)] for key, value in incident.environment.items()]
    yield "Environment", [["", ""], *rows]


def _recipe(incident: Incident) -> list[str]:
    step = incident.checkpoint_step
    checkpoint = f", with the checkpoint of step {step} loaded" if step else ""
    directory, command = incident.environment["directory"], incident.environment["command"]
    return [
        f"cd {shlex.quote(directory)} && {command}  # as before{checkpoint}",
        f"probes.load_rng_states({incident.folder!r})  # in the script, right before step {step} runs",
    ]


def _pictures(incident: Incident) -> list[str]:
    alert = incident.alert
    onset_layer = alert.layer if alert else None
    onset_step = None if alert is None else alert.step if alert.onset_step is None else alert.onset_step
    by_quantity = _by_quantity(incident.steps)
    pictures: list[str] = []
    for quantity in _in_order(by_quantity, [alert.quantity] if alert else []):
        by_layer = by_quantity[quantity]
        title = f"{quantity} ({_unit(quantity)})"
        whole = by_layer.pop(ALL_LAYERS, {})
        if by_layer and len(pictures) < MAX_MAPS:
            rows = _rows(by_layer, incident.layers, alert)
            steps = sorted({step for layer in rows for step in by_layer[layer]})[-MAX_COLUMNS:]
            values = _matrix([by_layer[layer] for layer in rows], steps)
            left_out = f", {len(rows)} of {len(by_layer)} layers" if len(rows) < len(by_layer) else ""
            pictures.append(
                heat_map(
                    title + left_out, steps, rows, values, onset_layer=onset_layer, onset_step=onset_step
                )
            )
        elif whole:
            steps = sorted(whole)[-MAX_COLUMNS:]
            pictures.append(line(title, steps, np.array([whole[s] for s in steps]), onset_step=onset_step))
    return pictures


def _matrix(rows: Sequence[dict[int, float]], steps: Sequence[int]) -> np.ma.MaskedArray:
    """Values [len(rows), len(steps)], masked where a row has none."""
    column_of = {step: column for column, step in enumerate(steps)}
    values, is_missing = np.zeros((len(rows), len(steps))), np.ones((len(rows), len(steps)), bool)
    for index, row in enumerate(rows):
        for step, value in row.items():
            column = column_of.get(step)
            if column is not None:
                values[index, column], is_missing[index, column] = value, False
    return np.ma.masked_array(values, is_missing)


def _by_quantity(steps: Iterable[StepRecords]) -> dict[str, dict[str, dict[int, float]]]:
    """Quantity → layer → step → value, whole layers only."""
    result: dict[str, dict[str, dict[int, float]]] = {}
    for records in steps:
        for series, value in zip(records.series, records.values.tolist(), strict=True):
            if series.head is None:
                layer = f"{series.layer}/call_{series.call}" if series.call else series.layer
                result.setdefault(series.quantity, {}).setdefault(layer, {})[records.step] = value
    return result


def _in_order(present: dict[str, Any], first: Sequence[str]) -> list[str]:
    """The alert's quantity, the usual ones, then what the script logs (the loss)."""
    logged = [quantity for quantity in present if quantity not in QUANTITIES]
    return [quantity for quantity in dict.fromkeys([*first, *logged, *_USUAL_MAPS]) if quantity in present]


def _rows(by_layer: dict[str, Any], order: Sequence[str], alert: Alert | None) -> list[str]:
    """The layers in the order of the forward pass; of too many, those of the alert and an even choice."""
    position = {layer: index for index, layer in enumerate(order)}

    def place(layer: str) -> int:
        while layer not in position and "." in layer:  # a module that is never called stands with its parent
            layer = layer.rpartition(".")[0]
        return position.get(layer, len(order))

    wanted = {alert.layer, *alert.spread[: MAX_ROWS // 2]} if alert else set()
    # Every tenth step measures blocks, every two hundredth all layers: rows that are nearly empty say little.
    fullest = max(map(len, by_layer.values()))
    layers = [layer for layer in by_layer if len(by_layer[layer]) > fullest // 2 or layer in wanted]
    layers.sort(key=lambda layer: place(layer.split("/call_")[0]))
    if len(layers) <= MAX_ROWS:
        return layers
    kept = wanted & set(layers)
    others = [layer for layer in layers if layer not in kept]
    room = MAX_ROWS - len(kept)
    kept |= {others[i * len(others) // room] for i in range(room)}
    return [layer for layer in layers if layer in kept]


def _unit(quantity: str) -> str:
    return QUANTITIES[quantity].unit if quantity in QUANTITIES else "as logged"


def _with_code(text: str) -> str:
    """HTML of a text in which names stand in backquotes."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))

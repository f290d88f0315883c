"""The report of runs as one HTML page: the story first, then where it shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from probes.page import HOW_TO_READ, document, draw
from probes.pictures import Curves, HeatMap, heat_map, pictures
from probes.reported_run import ReportedRun
from probes.story import number, unit
from stability.html_table import html_table

MAX_MAPS = 10
MAX_ALERTS = 40
NUM_RANKED = 10
_FIRST_ROWS = 16  # as many as a first screen has room for

RANKING_HEAD = (
    "layer",
    "quantity",
    "usual",
    "farthest",
    "over peers",
    "at step",
    "away since step",
    "unit",
)


def drawn(runs: Sequence[ReportedRun]) -> list[HeatMap | Curves]:
    """The pictures of a report, the one that shows the story first."""
    views = [run.view for run in runs]
    stories = [run.story.quantity for run in runs if run.story.quantity is not None]
    rest = list(pictures(views, stories, max_maps=MAX_MAPS))
    first = next((picture for picture in rest if isinstance(picture, HeatMap)), None)
    if first is None:
        return rest
    return [heat_map(first.quantity, views, _FIRST_ROWS), *(p for p in rest if p is not first)]


def html(runs: Sequence[ReportedRun], shown: Sequence[HeatMap | Curves]) -> str:
    """The page.

    Args:
        runs: The run, and those it is compared with.
        shown: As of :func:`drawn`.
    """
    run = runs[0]
    several = len(runs) > 1
    head = ("", *(one.view.name for one in runs)) if several else ("", "")
    parts = [html_table(head, _at_a_glance(runs))]
    figures = [f"<figure>{draw(picture)}</figure>" for picture in shown]
    parts += figures[:1]
    names = dict.fromkeys(name for one in runs for name in one.facts)
    facts = [[name, *(one.facts.get(name, "–") for one in runs)] for name in names]
    parts.append(f"<h2>In numbers</h2>{html_table(head, facts)}")
    for one in runs:
        if one.ranking:
            of = f" in {one.view.name}" if several else ""
            heading = f"Layers that went farthest from their past and their peers{of}"
            if one.broken_step is not None and all(math.isfinite(row.farthest) for row in one.ranking):
                heading += f", before step {one.broken_step}, where values are no longer finite"
            parts.append(f"<h2>{escape(heading)}</h2>")
            parts.append(html_table(RANKING_HEAD, ranking_rows(one)))
    if figures:
        parts.append(f"<h2>Layer by layer, step by step</h2>{HOW_TO_READ}")
        parts += figures[1:]
    for one in runs:
        if one.alerts:
            newest = one.alerts[-MAX_ALERTS:]
            of = f" in {one.view.name}" if several else ""
            parts.append(f"<h2>{escape(f'Alerts{of}, the last {len(newest)} of {len(one.alerts)}')}</h2>")
            rows = [[str(a.step), a.severity, a.name, f"`{a.layer}`", a.reason] for a in newest]
            parts.append(html_table(["step", "severity", "kind", "layer", "reason"], rows))
    return document(f"{run.view.name}: {run.story.title}", run.story.sentence, parts)


def _at_a_glance(runs: Sequence[ReportedRun]) -> list[list[str]]:
    """When, where, what and what helps; a column a run."""
    stories = [run.story for run in runs]
    rows = [
        ["where it began", *("–" if story.layer is None else f"`{story.layer}`" for story in stories)],
        ["when", *("–" if story.step is None else f"step {story.step}" for story in stories)],
        ["what", *(story.what for story in stories)],
    ]
    if any(story.remedies for story in stories):
        helps = ["; ".join(remedy.rstrip(".") for remedy in story.remedies) for story in stories]
        rows.append(["what usually helps", *(text or "–" for text in helps)])
    return rows


def ranking_rows(run: ReportedRun) -> list[list[str]]:
    """The layer of the story and the first of the ranking as texts."""
    ranked = sorted(run.ranking, key=lambda departure: departure.layer != run.story.layer)
    return [
        [
            f"`{departure.layer}`",
            departure.quantity,
            number(departure.usual),
            number(departure.farthest),
            _factor(departure.decades),
            str(departure.farthest_step),
            str(departure.step),
            unit(departure.quantity),
        ]
        for departure in ranked[:NUM_RANKED]
    ]


def _factor(decades: float) -> str:
    if not math.isfinite(decades):
        return "not finite"
    return f"×{10**decades:.3g}" if decades < 300 else f"×1e+{decades:.0f}"

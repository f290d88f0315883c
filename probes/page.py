"""What every HTML page of ours is made of: one file, no network, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from probes import charts
from probes.pictures import Curves, HeatMap
from stability.html_table import with_code

HOW_TO_READ = (
    "<p>A layer a row, the first on top. A checkerboard is NaN or infinite, an empty cell was not recorded; "
    "▶ and ▼ point at where it began.</p>"
)

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1120px; margin: 2em auto; padding: 0 1em;
       color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
.lead { font-size: 1.15em; border-left: 4px solid currentColor; padding-left: 0.8em; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: 0.15em 1em 0.15em 0; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #888; } td:first-child { white-space: nowrap; }
td code { overflow-wrap: anywhere; }
pre { background: #8882; padding: 0.8em; overflow-x: auto; } figure { margin: 1.2em 0; overflow-x: auto; }
svg .title, svg .onset { font-weight: 700; }
svg .frame { fill: none; } svg .frame, svg .key { stroke: #888; stroke-width: 1; }
@media (prefers-color-scheme: dark) { body { color: #e8e8e8; background: #161616; } }
"""


def document(title: str, lead: str, parts: Sequence[str]) -> str:
    """A page.

    Args:
        title: Plain text.
        lead: The first paragraph; names are in backquotes.
        parts: HTML.
    """
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f'<p class="lead">{with_code(lead)}</p>{"".join(parts)}</body></html>\n'
    )


def draw(picture: HeatMap | Curves) -> str:
    """Its SVG."""
    return charts.heat_map(picture) if isinstance(picture, HeatMap) else charts.curves(picture)

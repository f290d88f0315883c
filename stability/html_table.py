"""One small, plain HTML table: what notebooks show of results, and what reports are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

import torch
from torch import Tensor


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table without styles of its own; names in backquotes become code.

    Args:
        head: One title a column; all empty for a table without a head.
        rows: Texts, escaped here.

    Example:
        >>> html_table(["layer", "step"], [["`a<b`", "3"]])
        '<table><tr><th>layer</th><th>step</th></tr><tr><td><code>a&lt;b</code></td><td>3</td></tr></table>'
    """
    titles = "".join(f"<th>{escape(title)}</th>" for title in head) if any(head) else ""
    body = "".join(f"<tr>{''.join(f'<td>{with_code(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{f'<tr>{titles}</tr>' if titles else ''}{body}</table>"


def with_code(text: str) -> str:
    """HTML of a text in which names stand in backquotes.

    Example:
        >>> with_code("it began in `blocks.0`")
        'it began in <code>blocks.0</code>'
    """
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))


def spread_rows(named: Iterable[tuple[str, Tensor]]) -> list[list[str]]:
    """Name, smallest, median and largest of each tensor, for a table of results.

    Reading them waits for the device: a notebook that shows a result asks for its numbers.

    Example:
        >>> spread_rows([("spectral", torch.tensor([0.5, 0.25, 0.125]))])
        [['spectral', '0.125', '0.25', '0.5']]
    """
    rows = []
    for name, values in named:
        found = values.detach().cpu().double().flatten()
        if found.numel():
            numbers = torch.stack([found.min(), found.median(), found.max()]).tolist()
            rows.append([name, *(f"{number:.4g}" for number in numbers)])
        else:
            rows.append([name, "–", "–", "–"])
    return rows

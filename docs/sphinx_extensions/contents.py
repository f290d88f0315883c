"""Tables of contents that Markdown pages for GitHub do not have, made from the links they do have.

`index.md` lists every page under its headings; the site's sidebar is those headings with those pages, in that
order. `results/README.md` stands for its folder. A page that no list names is a warning, hence an error.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

_HEADING = re.compile(r"^## (.*)$", re.MULTILINE)
_LISTED = re.compile(r"^[*|] ?\[[^]]*\]\(([\w/-]+)\.md\)", re.MULTILINE)
_FOLDERS = {"results/README": "*", "signals/README": None, "reference/README": None}


def toctree(pages: list[str], *options: str) -> str:
    """A hidden toctree of pages, in MyST's notation."""
    return "\n".join(["", "```{toctree}", ":hidden:", *options, "", *pages, "```", ""])


def add_contents(app: Sphinx, name: str, content: list[str]) -> None:
    """Appends to the text of a page that lists others their toctrees."""
    if name == "index":
        _, *sections = _HEADING.split(content[0])
        for caption, text in zip(sections[::2], sections[1::2], strict=True):
            content[0] += toctree(_LISTED.findall(text), f":caption: {caption}")
    elif name in _FOLDERS:
        glob = _FOLDERS[name]
        content[0] += (
            toctree([glob], ":glob:", ":reversed:") if glob else toctree(_LISTED.findall(content[0]))
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
    return {"parallel_read_safe": True}

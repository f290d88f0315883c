"""``.. public-names:: module`` documents every name of a module's ``__all__``, so that none can be forgotten.

A name that an earlier room has already is only mentioned there, with a link.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

ROOMS = (
    "stability",
    "stability.attention",
    "stability.divergence",
    "probes",
    "probes.sinks",
    "probes.record",
)
"""The modules whose ``__all__`` is public, in the order in which a name found in several is documented."""


def first_room(name: str, value: object) -> str:
    """The first room that has this very object under this name."""
    return next(room for room in ROOMS if getattr(importlib.import_module(room), name, None) is value)


def text_of_constant(name: str, value: object) -> list[str]:
    """The docstring below a constant's assignment, wherever in our packages that stands."""
    for module_name, module in sorted(sys.modules.items()):
        if module_name.partition(".")[0] in ("stability", "probes") and vars(module).get(name) is value:
            text = ModuleAnalyzer.for_module(module_name).find_attr_docs().get(("", name))
            if text:
                return text
    raise LookupError(f"{name} has no docstring below its assignment.")


def lines(module: ModuleType) -> Iterator[str]:
    """ReST of all public names of a module."""
    room = module.__name__
    yield f".. py:module:: {room}"
    yield ""
    for name in module.__all__:
        value = getattr(module, name)
        if first_room(name, value) != room:
            yield f"* ``{name}``: :py:obj:`{first_room(name, value)}.{name}`"
            yield ""
        elif inspect.isfunction(inspect.unwrap(value)):
            yield f".. autofunction:: {room}.{name}"
            yield ""
        elif inspect.isclass(value):
            yield f".. autoclass:: {room}.{name}"
            yield "   :members:"
            yield ""
        else:
            yield f".. py:data:: {name}"
            if isinstance(value, int | float | str):
                yield f"   :value: {value!r}"
            yield ""
            yield from (f"   {line}" for line in text_of_constant(name, value))


class PublicNames(SphinxDirective):
    """The directive."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Documents the module's names."""
        module = importlib.import_module(self.arguments[0])
        self.env.note_dependency(str(module.__file__))
        return self.parse_text_to_nodes("\n".join(lines(module)))


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("public-names", PublicNames)
    return {"parallel_read_safe": True}

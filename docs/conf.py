"""Sphinx: the pages of this folder as a site, built by `make docs` without a network, warnings as errors.

The pages are written for GitHub and read there as they are. What a site needs beyond that, the tables of
contents, is added while it is built (sphinx_extensions/contents.py), and so are the pages of public names
(sphinx_extensions/public_names.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "sphinx_extensions")]

project = "stability-probes"
author = "the stability-probes maintainers"
html_title = project
html_theme = "furo"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "contents",
    "public_names",
]
root_doc = "index"
source_suffix = {".md": "markdown"}
exclude_patterns = ["examples"]  # notebooks, which pages link to

myst_heading_anchors = 4  # links to headings, as GitHub makes them

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of dataclasses and named tuples are described once, by their class
napoleon_custom_sections = ["Source"]
python_use_unqualified_type_names = True

"""The documentation site: the pages of this folder, which are also read on the forge, and the API from the docstrings.

`make docs` builds it with warnings as errors. No page asks another host for anything.
"""

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version as version_of
from itertools import groupby
from typing import Any

project = "jlt"
version = release = version_of("jlt")
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3  # as the forge makes them
html_theme = "furo"
html_title = f"jlt {release}"
html_show_copyright = False
html_copy_source = False
smartquotes = False  # what is quoted is often to be typed
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
suppress_warnings = ["myst.header"]  # pages that include the README's sections begin at their level
exclude_patterns = ["records"]


def restructured(docstring: list[str], table: Any = None) -> Iterator[str]:
    """Turn a docstring, which is plain text, into reStructuredText: `code` is code, indented lines stand as they are.

    Of a table (a choice's rows by name) the names are told.
    """
    if isinstance(table, Mapping):
        yield f"The options are {', '.join(f'``{name}``' for name in table)}."
        return
    for blank, group in groupby(docstring, key=lambda line: not line.strip()):
        lines = [] if blank else list(group)
        if lines and lines[0] in ("Args:", "Attributes:"):
            entries = re.findall(r"^ {4}(\w+): ((?:.|\n {5,})*)", "\n".join(lines[1:]), re.MULTILINE)
            yield from (lines[0], "", *(f"* ``{name}``: {prose(' '.join(told.split()))}" for name, told in entries))
            lines = []
        for indented, part in groupby(lines, key=lambda line: line.startswith("  ")):
            text = list(part)
            yield from ("", "::", "", *text) if indented else ("", *map(prose, text))
        yield ""


def prose(line: str) -> str:
    """Escape what reStructuredText would read as marks, but for `code`."""
    plain, *rest = re.split("`+", line)
    escape = re.compile(r"([\\*|_<>])").sub
    texts = [escape(r"\\\1", plain)]
    for k, text in enumerate(rest):
        texts.append(f"``{text}``\\ " if k % 2 == 0 else escape(r"\\\1", text))
    return "".join(texts)


def process(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Let autodoc read docstrings as they are written here."""
    lines[:] = restructured(lines, thing if what == "data" else None)


def setup(app: Any) -> None:
    """Register the reader of docstrings."""
    app.connect("autodoc-process-docstring", process)

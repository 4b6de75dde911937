"""The site: `make docs` makes it from the Markdown of this folder and from the docstrings.

The rules it keeps:

- A page is plain Markdown, good to read as it is. New pages and new public names come in by themselves.
- Nothing is fetched while it is made.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jd_hpc

project = "jd_hpc"
author = "the jd_hpc developers"
copyright = author
version = release = jd_hpc.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
html_theme = "furo"
html_title = f"jd_hpc {release}"
html_show_sphinx = False
html_copy_source = False
myst_heading_anchors = 3
default_role = "py:obj"  # docstrings name things in single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
numpydoc_show_class_members = False  # autodoc shows them

PAGES = {
    "To begin": ["tutorial", "cluster"],
    "What you can write": [
        "map_array", "executor", "pool", "dispatch", "pyopus", "shared", "groups", "nested", "reproducible", "messages", "progress",
    ],
    "While it runs": ["journal", "walltime", "history"],
}  # fmt: skip
"""The pages, in their order. A page that is not named here comes after the second part."""
LAST = ["api", "design"]
MODULES = ["jd_hpc.futures", "jd_hpc.kernel", "jd_hpc.chaos", "jd_hpc.pyopus"]
"""Modules that users import from. The API page has these, as far as they exist, and all of jd_hpc.__all__."""


def toctrees() -> str:
    """Return the table of contents, of all pages that there are."""
    there = {path.stem for path in Path(__file__).parent.glob("*.md")} - {"index"}
    parts = {caption: [page for page in pages if page in there] for caption, pages in PAGES.items()}
    parts["What you can write"] += sorted(there - set(LAST).union(*PAGES.values()))
    parts["Reference"] = LAST
    return "\n".join(
        "\n".join(["```{toctree}", f":caption: {caption}", "", *pages, "```", ""]) for caption, pages in parts.items() if pages
    )


def is_error(name: str) -> bool:
    """Whether a public name is an exception."""
    thing = getattr(jd_hpc, name)
    return isinstance(thing, type) and issubclass(thing, BaseException)


def automatic(name: str) -> str:
    """Return what documents a public name."""
    if is_error(name):
        return f".. autoexception:: jd_hpc.{name}\n   :members:\n   :show-inheritance:\n"
    if isinstance(getattr(jd_hpc, name), type):
        return f".. autoclass:: jd_hpc.{name}\n   :members:\n"
    return f".. autofunction:: jd_hpc.{name}\n"


def reference(names: list[str]) -> str:
    """Return what documents these names."""
    return "\n".join(["```{eval-rst}", *map(automatic, names), "```"])


def modules() -> str:
    """Return what documents the modules that users import from."""
    return "\n".join(
        f"### {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n   :ignore-module-all:\n```\n"
        for name in MODULES
        if importlib.util.find_spec(name) is not None
    )


def without_outer_links(text: str) -> str:
    """Return a page without its links to pages that are not on the site, such as ../README.md: only their words."""

    def words(link: re.Match[str]) -> str:
        path = Path(__file__).parent / link[2]
        return link[0] if path.is_file() and path.suffix != ".md" else link[1]

    return re.sub(r"\[([^\]]+)\]\((\.\./[^)#]*)[^)]*\)", words, text)


def fill_in(app: object, docname: str, source: list[str]) -> None:
    """Make a page fit for the site; put in place what `{{ }}` stands for on index.md and api.md."""
    source[0] = without_outer_links(source[0])
    if docname not in ("index", "api"):
        return
    names = [name for name in jd_hpc.__all__ if not name.startswith("__")]
    first = ["JobDispatcher"]
    for what, text in {
        "pages": toctrees(),
        "classes and functions": reference(first + [name for name in names if not is_error(name) and name not in first]),
        "errors": reference([name for name in names if is_error(name)]),
        "modules": modules(),
    }.items():
        source[0] = source[0].replace("{{ " + what + " }}", text)


def setup(app: object) -> None:
    """Tell Sphinx of that."""
    app.connect("source-read", fill_in)  # type: ignore[attr-defined]

"""The site: `make docs` makes it from the Markdown of this folder and from the docstrings.

The rules it keeps:

- A page is plain Markdown, good to read as it is. New pages and new public names come in by themselves.
- Nothing is fetched while it is made.
"""

from __future__ import annotations

import importlib.util
import os
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
html_static_path = ["_static"]
html_css_files = ["site.css"]
myst_heading_anchors = 3
highlight_language = "bash"  # blocks in plain backticks are commands
default_role = "py:obj"  # docstrings name things in single backticks
maximum_signature_line_length = 100  # a longer one gets a line for every parameter
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
numpydoc_show_class_members = False  # autodoc shows them

PAGES = {
    "To begin": ["overview", "tutorial", "examples", "cluster"],
    "What you can write": [
        "map_array", "executor", "pool", "dispatch", "pyopus", "shared", "groups", "nested", "reproducible", "messages", "progress",
    ],
    "While it runs": ["journal", "walltime", "history"],
}  # fmt: skip
"""The pages, in their order. A page that is not named here comes after the second part."""
LAST = ["api", "design"]
DOCS = Path(__file__).parent
SHOWN = {"overview": DOCS.parent / "README.md", "examples": DOCS.parent / "examples" / "README.md"}
"""Pages that show a file of another folder on the site, under a title of their own."""
MODULES = ["jd_hpc.futures", "jd_hpc.kernel", "jd_hpc.chaos", "jd_hpc.pyopus"]
"""Modules that users import from. The API page has these, as far as they exist, and all of jd_hpc.__all__."""
FOR_OTHER_ROOMS = {
    "jd_hpc.Executor": ["begin", "serve"],
    "jd_hpc.MPIMachine": ["channel", "claim", "group_comm", "grouping"],
    "jd_hpc.LocalMachine": ["group_comm"],
    "jd_hpc.kernel": ["Kernel", "is_one"],
    "jd_hpc.chaos": ["Chaos", "VARIABLE", "arm_from_environment"],
    "jd_hpc.pyopus": ["Task", "is_served", "note_end", "run_task"],
}
"""What other files of the package call, and users do not: it is not on the API page."""


def toctrees() -> str:
    """Return the table of contents, of all pages that there are."""
    there = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    parts = {caption: [page for page in pages if page in there] for caption, pages in PAGES.items()}
    parts["What you can write"] += sorted(there - set(LAST).union(*PAGES.values()))
    parts["Reference"] = LAST
    return "\n".join(
        "\n".join(["```{toctree}", ":maxdepth: 1", f":caption: {caption}", "", *pages, "```", ""])
        for caption, pages in parts.items()
        if pages
    )


def is_error(name: str) -> bool:
    """Whether a public name is an exception."""
    thing = getattr(jd_hpc, name)
    return isinstance(thing, type) and issubclass(thing, BaseException)


def members(name: str) -> str:
    """Return the options by which the members of a class or module are documented."""
    hidden = FOR_OTHER_ROOMS.get(name)
    return "   :members:\n" + (f"   :exclude-members: {', '.join(hidden)}\n" if hidden else "")


def automatic(name: str) -> str:
    """Return what documents a public name."""
    if is_error(name):
        return f".. autoexception:: jd_hpc.{name}\n   :members:\n   :show-inheritance:\n"
    if isinstance(getattr(jd_hpc, name), type):
        return f".. autoclass:: jd_hpc.{name}\n{members(f'jd_hpc.{name}')}"
    return f".. autofunction:: jd_hpc.{name}\n"


def reference(names: list[str]) -> str:
    """Return what documents these names."""
    return "\n".join(["```{eval-rst}", *map(automatic, names), "```"])


def modules() -> str:
    """Return what documents the modules that users import from."""
    return "\n".join(
        f"### {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n{members(name)}   :ignore-module-all:\n```\n"
        for name in MODULES
        if importlib.util.find_spec(name) is not None
    )


def shown(docname: str, text: str) -> str:
    """Return the text that a page shows, with links as the site has them."""
    path = SHOWN.get(docname, DOCS / f"{docname}.md")
    if docname in SHOWN:
        text = "\n".join([text.splitlines()[0], *path.read_text().splitlines()[1:]])
    pages = {file: f"{page}.md" for page, file in SHOWN.items()}

    def moved(link: re.Match[str]) -> str:
        """Return a link as seen from this folder; of a page that is not on the site, such as CHANGES.md, only the words."""
        words, target, anchor = link.groups()
        file = (path.parent / target).resolve()
        page = pages.get(file, os.path.relpath(file, DOCS))
        if not file.exists():
            return link[0]  # of another site, or no link at all
        if file.is_dir() or (page.startswith("..") and file.suffix == ".md"):
            return words
        return f"[{Path(words).stem if words.endswith('.md') else words}]({page}{anchor})"

    return re.sub(r"\[([^\]]+)\]\(([^)#]+)([^)]*)\)", moved, text)


def fill_in(app: object, docname: str, source: list[str]) -> None:
    """Make a page fit for the site; put in place what `{{ }}` stands for on index.md and api.md."""
    source[0] = shown(docname, source[0])
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


def link_pages(app: object, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Make links of the pages that a docstring names."""
    lines[:] = [re.sub(r"\bdocs/(\w+)\.md", r":doc:`\1`", line) for line in lines]


def setup(app: object) -> None:
    """Tell Sphinx of that."""
    app.connect("source-read", fill_in)  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", link_pages)  # type: ignore[attr-defined]

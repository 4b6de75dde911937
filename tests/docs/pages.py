"""The blocks of code on README.md and on the pages of docs/, and what is to become of each. CONTRIBUTING.md tells writers of pages.

The rule it keeps: what a block needs stands above it on the page, in comments that no reader sees.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parents[2]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
COMMENT = re.compile(r"<!-- (fragment|file|after|run|output|exit)(?:: (.*?))? -->")
SHELL = ("", "console", "bash", "sh")
IN_TURN = ("python", "mpiexec -n 4 python")
"""How a script on a page is run that names no way itself: the second one if it uses MPI."""
USES_MPI = re.compile(r"COMM_WORLD|\bPool\(|\bsetVM\(")


class Block(NamedTuple):
    """A block of code on a page.

    Attributes
    ----------
    page, line : str, int
        Where it begins.
    language : str
        What stands behind the three backticks.
    text : str
        The code.
    said : dict of str to list of str
        The comments directly above it: key → what follows the colon, each time.
    output : str or None
        The block below it that is marked as its output.
    """

    page: str
    line: int
    language: str
    text: str
    said: dict[str, list[str]]
    output: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether it is run as a whole."""
        return "fragment" not in self.said if self.language == "python" else "run" in self.said

    def script(self, files: dict[str, str]) -> str:
        """Return the script that it is, after those that it goes on from."""
        missing = set(self.said.get("after", [])) - set(files)
        assert not missing, f"{self} comes after {missing}, and no page has a block of that name"
        return "\n".join([files[name] for name in self.said.get("after", [])] + [self.text])

    def commands(self) -> list[str]:
        """Return what is run for it, in turn."""
        if self.language != "python":
            return shell_lines(self.text)
        ways = self.said.get("run") or IN_TURN[: 1 + (bool(USES_MPI.search(self.text)) or "after" in self.said)]
        return [f"{way} {self.name}" for way in ways]

    @property
    def name(self) -> str:
        """What its file is called."""
        return self.said.get("file", ["block.py"])[0]


def shell_lines(text: str) -> list[str]:
    """Return the commands in a block of shell, without prompts, comments and the dots that stand for more."""
    lines = (line.removeprefix("$ ").split(" #")[0].split(" ...")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def blocks_of(path: Path) -> list[Block]:
    """Return the blocks of code on a page.

    Raises
    ------
    ValueError
        If a comment above a block is misspelt, or a block has no end.
    """
    found: list[Block] = []
    begin, language, said = 0, "", {}
    lines: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path.name}:{number}"
        if begin:
            if line != "```":
                lines.append(line)
                continue
            text = "\n".join(lines) + "\n"
            if "output" in said:
                found[-1] = found[-1]._replace(output=text)
            elif not language.startswith("{"):
                found.append(Block(path.name, begin, language, text, said))
            begin, said, lines = 0, {}, []
        elif line.startswith("```"):
            begin, language = number, line[3:]
        elif match := COMMENT.fullmatch(line):
            said.setdefault(match[1], []).append(match[2] or "")
        elif said or line.startswith(("<!-- ", " ```")):
            raise ValueError(f"{where}: {line!r} is no comment of a block, or stands between a comment and its block")
    if begin or said:
        raise ValueError(f"{path.name}: a block without an end, or a comment without a block")
    return found


def all_blocks() -> list[Block]:
    """Return the blocks of all pages."""
    return [block for path in PAGES for block in blocks_of(path)]


def files(blocks: list[Block]) -> dict[str, str]:
    """Return the scripts that have a name."""
    named: dict[str, str] = {}
    for block in blocks:
        if "file" in block.said:
            assert block.name not in named, f"{block}: there is another {block.name}; call this one something else"
            named[block.name] = block.script(named)
    return named


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """Take a command apart: the settings before it, and its words."""
    settings, words = {}, shlex.split(command)
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    return settings, words

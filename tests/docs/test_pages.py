"""All code on README.md and docs/*.md runs, and the commands there exist. New pages and blocks are taken by themselves."""

from __future__ import annotations

import ast
import importlib.util
import os
import pkgutil
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launch_helpers import Ended, Launch, mpiexec
from pages import PAGES, PROJECT, SHELL, all_blocks, blocks_of, files, shell_lines, words_of

import jd_hpc
from jd_hpc import __main__ as supervised
from jd_hpc import cli

TIMEOUT_S = 60
AT_A_TIME = 3  # an mpiexec mostly waits
BLOCKS = all_blocks()
FILES = files(BLOCKS)
TO_RUN = [block for block in BLOCKS if block.is_run]
PROGRAMS = {"jd-hpc": [sys.executable, "-m", "jd_hpc.cli"], "python": [sys.executable]}


class Command(Launch):
    """A command as it stands on a page, in the folder of its block."""

    def __init__(self, folder: Path, command: str) -> None:
        settings, self.words = words_of(command)
        super().__init__(folder, 0, "", **settings)

    def command(self, *_):
        return [part for word in self.words for part in PROGRAMS.get(word, [mpiexec() if word == "mpiexec" else word])]


def outcome(block) -> list[tuple[str, Ended]]:
    """Run what a block is, and return what became of each of its commands."""
    folder = Path(tempfile.mkdtemp(prefix="jd_hpc_", dir="/tmp"))  # a short name, for MPI's sockets
    try:
        for name, text in (FILES | ({block.name: block.script(FILES)} if block.language == "python" else {})).items():
            (folder / name).write_text(text)
        return [(command, Command(folder, command).wait(TIMEOUT_S)) for command in block.commands()]
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def outcomes(request):
    """What becomes of the blocks, several at a time: block → future."""
    wanted = [item.callspec.params["block"] for item in request.session.items if item.name.startswith("test_a_block_runs[")]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        yield {str(block): pool.submit(outcome, block) for block in wanted}


def pattern(text: str) -> str:
    """Return the regular expression of an output on a page, in which ... stands for anything."""
    return r"\s*" + re.escape(text.strip()).replace(re.escape("..."), "(?s:.*?)") + r"\s*"


@pytest.mark.parametrize("block", TO_RUN, ids=str)
def test_a_block_runs(block, outcomes):
    printed = ""
    for command, ended in outcomes[str(block)].result():
        last = command == block.commands()[-1]
        code = int(block.said["exit"][0]) if "exit" in block.said and (last or block.language == "python") else 0
        assert ended.code == code, f"{command}\n{ended.out}\n{ended.err}"
        out = ended.out + (ended.err if code else "")
        printed = out if block.language == "python" else printed + out
        if block.output is not None and block.language == "python":
            assert re.fullmatch(pattern(block.output), out), f"{command} printed\n{out}"
    if block.output is not None:
        assert re.fullmatch(pattern(block.output), printed), printed


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_a_block_imports_what_is_public(block):
    """Fragments too. What pages tell users to import is on the API page."""
    modules = vars_of_conf()["MODULES"]
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module == "jd_hpc":
            assert {one.name for one in node.names} <= {*jd_hpc.__all__, *(name.removeprefix("jd_hpc.") for name in modules)}
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("jd_hpc."):
            assert node.module in modules
            assert all(hasattr(importlib.import_module(node.module), one.name) for one in node.names)
        elif isinstance(node, ast.Import):
            assert all(one.name in ("jd_hpc", *modules) for one in node.names if one.name.split(".")[0] == "jd_hpc")


def vars_of_conf():
    spec = importlib.util.spec_from_file_location("conf", PROJECT / "docs" / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    return vars(conf)


def is_ours(command):
    """Whether a line of shell is something that this project can know."""
    return re.search(r"\b(jd-hpc|make|sbatch|python)\b", command) and not command.startswith("pip ")


@pytest.mark.parametrize(
    ("block", "command"),
    [(block, line) for block in BLOCKS if block.language in SHELL for line in shell_lines(block.text) if is_ours(line)],
    ids=str,
)
def test_a_command_exists(block, command, monkeypatch):
    """Its options are known, its files are there."""
    monkeypatch.setattr(os, "environ", dict(os.environ))  # options change it
    check_command(command)


def check_command(command):
    _, words = words_of(command.split(" && ")[0].split(" > ")[0])
    if "jd-hpc" in words[0] or words[0] == "eval":
        words = words[1:] if words[0] == "jd-hpc" else re.search(r"\$\(jd-hpc (.*)\)", command)[1].split()
        if words[0] == "launch":
            own, _, program = cli.split_words(words[1:])
            check_python(program)
            words = ["launch", *own]
        cli.parser().parse_args(words)
    elif words[0] == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (PROJECT / "Makefile").read_text(), re.M)[1].split()
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] == "sbatch":
        assert (PROJECT / words[-1]).is_file()
    else:
        check_python(words[words.index("python") + 1 :])


def check_python(words):
    """Check what follows the word python."""
    if words[0] == "-m" and words[1].split(".")[0] == "jd_hpc":
        assert importlib.util.find_spec(words[1]), words[1]
        if words[1] == "jd_hpc":
            script = next((at for at, word in enumerate(words) if word.endswith(".py")), len(words))
            supervised.parse([*words[2:script], __file__])
    elif words[0].endswith(".py"):
        assert words[0] in FILES or (PROJECT / words[0]).is_file(), f"no page has a block called {words[0]}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_begins_with_its_title(path):
    assert re.match(r"# \S", path.read_text())


@pytest.mark.parametrize("path", [*PAGES, *PROJECT.glob("C*.md"), *PROJECT.glob("*/README.md")], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", re.sub(r"(?s)```.*?```", "", path.read_text())):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_api_page_has_every_public_name():
    conf = vars_of_conf()
    source = [(PROJECT / "docs" / "api.md").read_text()]
    conf["fill_in"](None, "api", source)
    documented = re.findall(r"^\.\. auto(?:class|function|exception):: jd_hpc\.(\w+)$", source[0], re.M)
    assert sorted(documented) == sorted(name for name in jd_hpc.__all__ if not name.startswith("__"))
    assert "{{" not in source[0]


def test_what_the_api_page_leaves_out_is_there():
    """Else it was renamed, and is on the page again."""
    for name, hidden in vars_of_conf()["FOR_OTHER_ROOMS"].items():
        thing = pkgutil.resolve_name(name)
        holders = [thing, *(held for held in vars(thing).values() if isinstance(held, type))]
        assert [member for member in hidden if not any(hasattr(holder, member) for holder in holders)] == [], name


def test_a_page_shows_another_file_with_its_links():
    shown = vars_of_conf()["shown"]
    overview, examples = (shown(name, "# Title\n\n[x](../README.md)\n") for name in ("overview", "examples"))
    assert overview.startswith("# Title\n")
    assert "## The class" in overview
    assert "([map_array](map_array.md))" in overview
    assert "[examples](examples.md), benchmarks, [design](design.md), CONTRIBUTING.md" in " ".join(overview.split())
    assert "[sunspots.py](../examples/sunspots.py)" in examples
    assert (
        shown("journal", "[README](../README.md#the-class) [x](https://a.b/c)")
        == "[README](overview.md#the-class) [x](https://a.b/c)"
    )


def test_the_table_of_contents_has_every_page():
    listed = re.findall(r"^([a-z_]+)$", vars_of_conf()["toctrees"](), re.M)
    assert sorted(listed) == sorted(path.stem for path in PAGES if path.parent.name == "docs" and path.stem != "index")


@pytest.mark.parametrize(
    ("printed", "shown", "fits"),
    [
        ("1\n2\n", "1\n2\n", True),
        ("1\n3\n", "1\n2\n", False),
        ("x\nJobError: y 7\n", "...\nJobError: ... 7\n", True),
        ("(1)", "1", False),
    ],
)
def test_the_comparison_of_outputs(printed, shown, fits):
    assert bool(re.fullmatch(pattern(shown), printed)) == fits


@pytest.mark.parametrize(
    "command",
    [
        "jd-hpc launch first.py",
        "jd-hpc launch -n 4 none.py",
        "jd-hpc journal shows a.journal",
        "jd-hpc slurm render --tasks 4",
        'eval "$(jd-hpc slurm environment)"',
        "make docks",
        "sbatch slurm/none.sbatch",
        "mpiexec -n 4 python none.py",
        "mpiexec -n 4 python -m jd_hpc --walltimes 1 first.py",
        "python -m jd_hpc.none first.py",
    ],
)
def test_a_wrong_command_is_found(command, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert is_ours(command)
    with pytest.raises((SystemExit, AssertionError)):
        check_command(command)


@pytest.mark.parametrize(
    "text",
    ["<!-- fragmant: why -->\n```python\n1\n```\n", "<!-- run -->\n\n```python\n1\n```\n", "```python\n1\n", "<!-- run -->\n"],
)
def test_a_wrong_page_is_found(text, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md"):
        blocks_of(path)

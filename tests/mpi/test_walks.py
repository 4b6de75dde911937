"""The walks example: the same line on any number of ranks, and the number that is known."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from mpi_helpers import everywhere

pytestmark = pytest.mark.mpi

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "walks.py"
LINE = "897517546 +- 11176671 walks of 20 steps; there are 897697164\n"


def test_the_same_line_on_all_ranks(comm, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("walks_example", EXAMPLE)
    walks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(walks)
    monkeypatch.setattr(sys, "argv", ["walks.py", "--jobs", "20"])
    walks.main()
    out = capsys.readouterr().out
    with everywhere(comm):
        assert out == ("" if comm.rank else LINE)
    found, error, _, known = map(int, re.findall(r"\d+", LINE))
    assert abs(found - known) < 3 * error

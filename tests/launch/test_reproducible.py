"""The same numbers to the bit: for any number of ranks, when a slave dies in the middle, and when the master does."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from launch_helpers import Launched

from jd_hpc.streams import stream

COUNT = 400
EXPECTED = hashlib.sha256(np.array([stream(2026, i).standard_normal(2) + i for i in range(COUNT)]).tobytes()).hexdigest()


@pytest.mark.parametrize("size", [0, 2, 4])
def test_any_number_of_ranks(launch, size):
    ended = launch(size, "reproducible.py", "hooks", *(["mpi"] if size else [])).wait(60)
    assert (ended.code, ended.out.split()) == (0, ["answer", EXPECTED, "0"]), ended


@pytest.mark.parametrize("form", ["hooks", "ordered", "map"])
def test_a_slave_that_dies(launch, form):
    ended = launch(4, "reproducible.py", form, "mpi", "kill", kind=Launched).wait(60)
    assert (ended.code, ended.out.split()) == (0, ["answer", EXPECTED, "0"]), ended
    assert "slave 2 is lost" in ended.err, ended


@pytest.mark.parametrize("form", ["hooks", "ordered"])
def test_a_master_that_dies_and_a_resume_in_which_a_slave_does(launching, tmp_path, form):
    seed = random.randrange(1 << 30)
    print("seed", seed)
    journal = f"journal={tmp_path / 'a.journal'}"
    with launching() as launch:
        die_s = random.Random(seed).uniform(1.7, 2.1)  # all is written after a second
        first = launch(0, "reproducible.py", form, journal, f"die_s={die_s}", "pause_s=0.007").wait(60)
    assert "answer" not in first.out
    with launching() as launch:
        ended = launch(4, "reproducible.py", form, "mpi", "kill", journal, kind=Launched).wait(60)
    assert ended.code == 0, ended
    word, answer, stored = ended.out.split()
    assert (word, answer) == ("answer", EXPECTED), ended
    with launching() as launch:
        again = launch(2, "reproducible.py", form, "mpi", journal).wait(60)
    assert again.out.split() == ["answer", EXPECTED, str(COUNT)], again
    assert 0 < int(stored) < COUNT


def test_slaves_do_not_wait_for_a_master_that_is_gone(launch):
    ended = launch(3, "no_news.py").wait(60)
    assert sorted(ended.out.splitlines()) == ["lost 1", "lost 2"], ended

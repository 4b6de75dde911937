"""A run in a thread works where MPI allows it, and is refused on all ranks where it does not."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("level", ["multiple", "serialized", "funneled"])
def test_a_run_in_a_thread(launch, level):
    ended = launch(2, "run_in_thread.py", level).wait()
    assert (ended.code, ended.err) == (0, ""), ended
    lines = sorted(ended.out.splitlines())
    if level == "multiple" or "answer 0" in ended.out:  # an MPI may give more than was asked for
        assert lines[:2] == ["answer 0 (100, 328350)", "answer 1 None"]
    else:
        told = [f"refused {rank} ThreadLevelError True" for rank in (0, 1)]
        assert lines == ["main 0 (100, 328350)", "main 1 None", *told]

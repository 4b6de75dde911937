"""Shared data: what it costs a node, and slaves that are lost over it."""

from __future__ import annotations

import pytest
from launch_helpers import Launched


def test_one_copy_per_node(launch):
    ended = launch(4, "shares.py", 200, "nothing").wait()
    assert (ended.code, ended.err) == (0, ""), ended
    lines = dict(line.split(maxsplit=1) for line in ended.out.splitlines())
    assert lines["answer"] == "30 8555 0"
    assert 180 < float(lines["MB"]) < 320, "four copies would be 800"


@pytest.mark.parametrize("fate", ["dies", "dies later"])
def test_a_keeper_that_dies(launch, fate):
    ended = launch(4, "shares.py", 3, fate, kind=Launched).wait()
    assert ended.code == 0, ended
    assert ended.out.splitlines() == ["answer 30 8555 1"], ended

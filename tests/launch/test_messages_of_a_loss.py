"""A slave that dies, or stops, amid messages costs neither the run nor anybody else's messages."""

from __future__ import annotations

import pytest
from launch_helpers import Launched


@pytest.mark.parametrize(("size_bytes", "name"), [(100, "SIGKILL"), (200_000, "SIGKILL"), (100, "SIGSTOP")])
def test_a_slave_is_lost_amid_messages(launch, size_bytes, name):
    ended = launch(4, "talks_and_dies.py", size_bytes, name, kind=Launched).wait()
    assert ended.code == 0, ended
    assert "answer 100 328350 1 True" in ended.out, ended

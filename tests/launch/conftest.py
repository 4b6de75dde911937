"""Launches of scripts: each in a folder of its own, which is the MPI's folder for temporary files too."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launch_helpers import UNDER_MPIEXEC, WRONG_WAYS, launches


def pytest_collection_modifyitems(items):
    for item in items:
        if UNDER_MPIEXEC and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="starts its own mpiexec: run it with plain pytest"))


@pytest.fixture
def launch():
    with launches() as start:
        yield start


@pytest.fixture(scope="session")
def launching():
    """`launch` as a context, for those who start several at a time."""
    return launches


@pytest.fixture(scope="module")
def wrong_ways():
    """What becomes of two ranks of ways_to_end.py, for every way that is an error. An mpiexec mostly waits: three at a time."""

    def end(way):
        with launches() as start:
            return start(2, "ways_to_end.py", way).wait()

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(WRONG_WAYS, pool.map(end, WRONG_WAYS), strict=True))


@pytest.fixture(params=[2, 4])
def size(request):
    return request.param

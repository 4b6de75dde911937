"""Launches of scripts: each in a folder of its own, which is the MPI's folder for temporary files too."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launch_helpers import UNDER_MPIEXEC, WRONG_WAYS, Launch


def pytest_collection_modifyitems(items):
    for item in items:
        if UNDER_MPIEXEC and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="starts its own mpiexec: run it with plain pytest"))


@contextlib.contextmanager
def launches():
    """Give a function that starts a script: `launch(size, script, *arguments, **environment)`. Of it nothing remains.

    `kind` is the class of launch, which tells how the script is started.
    """
    started = []

    def start(size, script, *arguments, kind=Launch, **settings):
        # Not below pytest's own folder: the names of sockets must be short.
        folder = Path(tempfile.mkdtemp(prefix="jd_hpc_", dir="/tmp"))
        started.append(kind(folder, size, script, *arguments, **settings))
        return started[-1]

    yield start
    for one in started:
        one.kill()
    left = [
        str(path.relative_to(one.folder))
        for one in started
        for path in one.folder.rglob("*")
        if one.size and one.process.returncode == 0 and not path.name.startswith(("shm.", "note."))
    ]
    for one in started:
        shutil.rmtree(one.folder)
    assert not left, f"{left} remain of MPI's temporary files"


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

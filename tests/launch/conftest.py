"""Launches of scripts: each in a folder of its own, which is the MPI's folder for temporary files too."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from launch_helpers import UNDER_MPIEXEC, Launch


def pytest_collection_modifyitems(items):
    for item in items:
        if UNDER_MPIEXEC and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="starts its own mpiexec: run it with plain pytest"))


@pytest.fixture
def launch():
    """Return a function that starts a script: `launch(size, script, *arguments, **environment)`."""
    folders, launches = [], []

    def start(size, script, *arguments, **settings):
        # Not below pytest's own: the names of sockets must be short.
        folders.append(Path(tempfile.mkdtemp(prefix="jd_hpc_", dir="/tmp")))
        launches.append(Launch(folders[-1], size, script, *arguments, **settings))
        return launches[-1]

    yield start
    for one in launches:
        one.kill()
    left = [
        str(path.relative_to(one.folder))
        for one in launches
        for path in one.folder.rglob("*")
        if one.size and one.process.returncode == 0 and not path.name.startswith(("shm.", "note."))
    ]
    for folder in folders:
        shutil.rmtree(folder)
    assert not left, f"{left} remain of MPI's temporary files"


@pytest.fixture(params=[2, 4])
def size(request):
    return request.param


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """numpy's thread pools of several ranks would only get in each other's way."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setitem(os.environ, name, "1")

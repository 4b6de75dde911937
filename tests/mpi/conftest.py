"""A watchdog for every test, and the communicators. Run with `mpiexec -n N python -m pytest --with-mpi tests/mpi`, N = 1, 2, 4."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

WATCHDOG_S = 60
"""A test that takes longer hangs: the rank shows where and exits, and mpiexec ends the others."""

stderr = pytest.StashKey()


def pytest_configure(config):
    config.stash[stderr] = os.dup(2)  # pytest captures 2 itself while a test runs


@pytest.fixture(autouse=True)
def watchdog(request):
    faulthandler.dump_traceback_later(WATCHDOG_S, exit=True, file=request.config.stash[stderr])
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def world():
    """All ranks."""
    return pytest.importorskip("mpi4py.MPI").COMM_WORLD


@pytest.fixture
def comm(world):
    """All ranks, on a communicator of this test alone."""
    duplicate = world.Dup()
    yield duplicate
    duplicate.Free()


KERNELS = """
#include <stdint.h>
#include <string.h>
#include <time.h>

int32_t square(const double *job, double *result, void *user_data)
{
    *result = *job * *job + (user_data ? *(double *) user_data : 0.0);
    return 0;
}

int32_t fails_on_odd(const int64_t *job, int64_t *result, void *user_data)
{
    *result = 7 * *job;
    return *job % 2 ? (int32_t) *job : 0;
}

int32_t sum_row(const double *job, double *result, const int64_t *length)
{
    *result = 0.0;
    for (int64_t i = 0; i < *length; i++)
        *result += job[i];
    return 0;
}

int32_t spread(const double *job, double *result, const int64_t *length)
{
    for (int64_t i = 0; i < *length; i++)
        result[i] = *job + i;
    return 0;
}

int32_t slow(const double *job, double *result, void *user_data)
{
    struct timespec pause = {0, 20 * 1000 * 1000};
    nanosleep(&pause, 0);
    *result = *job;
    return 0;
}
"""


@pytest.fixture(scope="session")
def kernels(world):
    """The functions above, compiled once and loaded on every rank."""
    folder = error = None
    if world.rank == 0:
        folder = tempfile.mkdtemp(prefix="jd_hpc_kernels")
        Path(folder, "kernels.c").write_text(KERNELS)
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", "kernels.so", "kernels.c"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        error = done.stderr if done.returncode else None
    folder, error = world.bcast((folder, error))
    assert error is None, error
    library = ctypes.CDLL(str(Path(folder, "kernels.so")))
    world.Barrier()
    if world.rank == 0:
        for name in ("kernels.c", "kernels.so"):
            Path(folder, name).unlink()
        Path(folder).rmdir()
    for name in ("square", "fails_on_odd", "sum_row", "spread", "slow"):
        function = getattr(library, name)
        function.restype = ctypes.c_int32
        function.argtypes = [ctypes.c_void_p] * 3
    return library

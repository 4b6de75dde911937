"""Many short calls by an Executor, so that they travel together, and one of them kills its slave."""

import os
import signal

from mpi4py import MPI
from script_helpers import say

from jd_hpc import Executor, JobError


def die_at(x):
    if x == 1500:
        os.kill(os.getpid(), signal.SIGKILL)
    return x


with Executor(MPI.COMM_WORLD, max_attempts=2) as pool:
    if pool is not None:
        futures = [pool.submit(die_at, x) for x in range(3000)]
        failed = [x for x, future in enumerate(futures) if isinstance(future.exception(), JobError)]
        good = sum(future.result() for x, future in enumerate(futures) if x not in failed)
        say("failed", failed, "good", good, futures[1500].exception().args[0])

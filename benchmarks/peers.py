"""What people use today for many small jobs under MPI, each at its best, for comparison with jd_hpc.

    mpiexec -n 4 python peers.py mpi4py     [--seconds 1]
    mpiexec -n 4 python peers.py futures    [--seconds 1] [--chunksize 1,100,10000]
    mpiexec -n 4 python peers.py schwimmbad [--seconds 1]

The job is the same everywhere: two float64 in (16 bytes), one float64 out (8 bytes), and the function does nothing.
numpy buffers are what is fastest for mpi4py's uppercase methods; tuples of Python floats are what is fastest for the
two that pickle (rows of an array would pickle ten times slower), so each gets what suits it.
One line of JSON is printed, with "rate" in jobs per second.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

RESULT = 1.5
JOB_TAG, STOP_TAG = 1, 2


def no_op(job: object) -> float:
    """The job; it is looked up by name in the slaves, so it must be at module level."""
    return RESULT


def timed(run: Callable[[int], None], seconds: float, trial: int, at_most: int) -> dict[str, float]:
    """Run `trial` jobs twice (the first time makes the connections), then as many as fill `seconds`."""
    run(trial)
    start = time.perf_counter()
    run(trial)
    rate = trial / (time.perf_counter() - start)
    jobs = min(max(int(rate * seconds), trial), at_most)
    start = time.perf_counter()
    run(jobs)
    elapsed = time.perf_counter() - start
    return {"rate": jobs / elapsed, "jobs": jobs, "seconds": elapsed}


# ---------------------------------------------------------------- mpi4py, by hand


def mpi4py_master(comm: MPI.Comm, count: int) -> None:
    """The loop of the textbooks: one job per message, one in flight per slave, blocking calls."""
    jobs = np.ones((count, 2))
    results = np.zeros(count)
    result = np.empty(1)
    status = MPI.Status()
    job_of_slave: dict[int, int] = {}
    sent = 0
    for slave in range(1, comm.Get_size()):
        if sent < count:
            comm.Send(jobs[sent], dest=slave, tag=JOB_TAG)
            job_of_slave[slave] = sent
            sent += 1
    for _ in range(count):
        comm.Recv(result, source=MPI.ANY_SOURCE, status=status)
        slave = status.Get_source()
        results[job_of_slave[slave]] = result[0]
        if sent < count:
            comm.Send(jobs[sent], dest=slave, tag=JOB_TAG)
            job_of_slave[slave] = sent
            sent += 1
    if not (results == RESULT).all():
        raise RuntimeError("a result is missing")


def mpi4py_slave(comm: MPI.Comm) -> None:
    job = np.empty(2)
    result = np.empty(1)
    status = MPI.Status()
    while True:
        comm.Recv(job, source=0, status=status)
        if status.Get_tag() == STOP_TAG:
            return
        result[0] = no_op(job)
        comm.Send(result, dest=0)


def run_mpi4py(seconds: float) -> dict[str, float] | None:
    comm = MPI.COMM_WORLD.Dup()
    if comm.Get_rank() > 0:
        mpi4py_slave(comm)
        return None
    record = timed(lambda count: mpi4py_master(comm, count), seconds, trial=2000, at_most=10_000_000)
    for slave in range(1, comm.Get_size()):
        comm.Send(np.zeros(2), dest=slave, tag=STOP_TAG)
    return record


# ---------------------------------------------------------------- mpi4py.futures


def run_futures(seconds: float, chunksizes: list[int]) -> dict[str, object] | None:
    """The rate at each chunksize, and the best of them as "rate"."""
    from mpi4py.futures import MPICommExecutor

    rates: dict[str, float] = {}
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        if executor is None:
            return None
        slaves = MPI.COMM_WORLD.Get_size() - 1
        for chunksize in chunksizes:

            def run(count: int, chunksize: int = chunksize) -> None:
                # repeat() hands out the same tuple: no time goes into making the jobs.
                jobs = itertools.repeat((1.0, 0.5), count)
                if sum(executor.map(no_op, jobs, chunksize=chunksize)) != RESULT * count:
                    raise RuntimeError("a result is missing")

            # Every slave gets several chunks, otherwise the last one decides.
            trial = max(400, 4 * slaves * chunksize)
            rates[str(chunksize)] = timed(run, seconds, trial, at_most=20_000_000)["rate"]
    best = max(rates, key=lambda chunksize: rates[chunksize])
    return {"rate": rates[best], "chunksize": int(best), "rates": rates}


# ---------------------------------------------------------------- schwimmbad


def run_schwimmbad(seconds: float) -> dict[str, float]:
    from schwimmbad import MPIPool

    pool = MPIPool()  # the slaves work in here and exit

    def run(count: int) -> None:
        if sum(pool.map(no_op, [(1.0, 0.5)] * count)) != RESULT * count:
            raise RuntimeError("a result is missing")

    # No close(): the pool closes itself at exit, and a second message to slaves that are gone can kill the run.
    return timed(run, seconds, trial=2000, at_most=2_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["mpi4py", "futures", "schwimmbad"])
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each timed run")
    parser.add_argument("--chunksize", default="1,100,1000,3000,10000,30000", help="for futures, with commas")
    arguments = parser.parse_args()
    record: dict[str, float] | dict[str, object] | None
    if arguments.peer == "mpi4py":
        record = run_mpi4py(arguments.seconds)
    elif arguments.peer == "futures":
        record = run_futures(arguments.seconds, [int(size) for size in arguments.chunksize.split(",")])
    else:
        record = run_schwimmbad(arguments.seconds)
    if record is not None:
        print(json.dumps({"peer": arguments.peer, **record}), flush=True)


if __name__ == "__main__":
    main()

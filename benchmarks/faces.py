"""The faces of jd_hpc that other libraries have too, for comparison with these: the job of peers.py, timed in its way.

    mpiexec -n 4 python faces.py map      [--seconds 1]    Executor.map, chunksize 1
    mpiexec -n 4 python faces.py submit   [--seconds 1]    Executor.submit
    mpiexec -n 4 python faces.py pool     [--seconds 1]    Pool.map, its own chunks
    mpiexec -n 4 python faces.py pool1    [--seconds 1]    Pool.map, chunksize 1

One line of JSON is printed, with "rate" in calls per second.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable

from mpi4py import MPI
from peers import RESULT, no_op, timed

from jd_hpc import Executor, Pool

JOB = (1.0, 0.5)


def run_face(face: str, seconds: float) -> dict[str, float] | None:
    with Executor(MPI.COMM_WORLD) if face in ("map", "submit") else Pool() as pool:
        if pool is None:
            return None

        def submit(count: int) -> Iterable[float]:
            futures = [pool.submit(no_op, JOB) for _ in range(count)]
            return (future.result() for future in futures)

        calls: dict[str, Callable[[int], Iterable[float]]] = {
            "map": lambda count: pool.map(no_op, itertools.repeat(JOB, count)),
            "submit": submit,
            "pool": lambda count: pool.map(no_op, [JOB] * count),
            "pool1": lambda count: pool.map(no_op, [JOB] * count, chunksize=1),
        }

        def run(count: int) -> None:
            if sum(calls[face](count)) != RESULT * count:
                raise RuntimeError("a result is missing")

        return timed(run, seconds, trial=2000, at_most=500_000 if face == "submit" else 5_000_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("face", choices=["map", "submit", "pool", "pool1"])
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each timed run")
    arguments = parser.parse_args()
    record = run_face(arguments.face, arguments.seconds)
    if record is not None:
        print(json.dumps({"face": arguments.face, **record}), flush=True)


if __name__ == "__main__":
    main()

"""A long job that says how far it has come.

    python examples/long_job.py                    one process, no MPI needed
    mpiexec -n 4 python examples/long_job.py       one master and three slaves

Each job estimates pi by throwing random points, for about a second. Now and then it tells the master what it has so far; the
master prints a line, and once all jobs together have thrown enough points it broadcasts that they may stop. A job that polls
hears that in the middle of its work.

Three rules that your own jobs can copy:

1. A message is an object of a class of your own; its class says what it is.
2. Handlers are added in `__init__`, which runs on every rank: the master has those for what jobs tell, slaves those for what the
   master broadcasts.
3. `poll()` costs next to nothing: call it wherever the job comes by often enough.
"""
from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np

from jd_hpc import JobDispatcher

CHUNK = 20_000  # points between two looks


class Progress(NamedTuple):
    """What a job tells."""

    job: int
    points: int
    inside: int


class Enough(NamedTuple):
    """What the master broadcasts."""

    points: int


class LongJobs(JobDispatcher):
    """Estimate pi until all jobs together have thrown `enough` points."""

    def __init__(self, jobs: int, points: int, enough: int, **run) -> None:
        super().__init__(credit=1, **run)
        self.jobs, self.points, self.enough = jobs, points, enough
        self.is_enough = False
        self.add_handler(Progress, self.on_progress)  # called on the master
        self.add_handler(Enough, self.on_enough)  # called on slaves

    def reset(self) -> None:
        """Master, at the start of a run."""
        self.todo = iter(range(self.jobs))
        self.so_far: dict[int, Progress] = {}
        self.reports = 0

    def next_job(self) -> int | None:
        """Master: the next job, none once there are enough points."""
        return None if self.is_enough else next(self.todo, None)

    def process_job(self, job: int) -> Progress:
        """Slave: throw points, and say how it goes."""
        random = np.random.default_rng((1, job))
        points = inside = 0
        while points < self.points and not self.is_enough:
            points += CHUNK
            inside += int((random.random((CHUNK, 2)) ** 2).sum(axis=1).__le__(1).sum())
            if points % (25 * CHUNK) == 0:
                self.tell(Progress(job, points, inside))
            self.poll()  # the master may have said that it is enough
        return Progress(job, points, inside)

    def on_progress(self, source: int, progress: Progress) -> None:
        """Master, while jobs run: one of them tells how far it is."""
        self.reports += 1
        self.so_far[progress.job] = progress
        total = sum(one.points for one in self.so_far.values())
        print(f"job {progress.job} at rank {source}: {progress.points / self.points:4.0%}, pi is about {self.estimate():.5f}")
        if total >= self.enough and not self.is_enough:
            self.is_enough = True
            self.broadcast(Enough(total))

    def on_enough(self, source: int, enough: Enough) -> None:
        """Slave, in the middle of a job: it may stop."""
        self.is_enough = True

    def process_result(self, index: int, job: int, result: Progress) -> None:
        """Master: a job has ended."""
        self.so_far[job] = result

    def estimate(self) -> float:
        """What all points together say."""
        return 4 * sum(one.inside for one in self.so_far.values()) / sum(one.points for one in self.so_far.values())

    def postprocess(self) -> tuple[float, int, int]:
        """Master: pi, points thrown, and how often jobs told the master something."""
        return self.estimate(), sum(one.points for one in self.so_far.values()), self.reports


def main(arguments: list[str] | None = None) -> None:
    """Run on all ranks; the master prints."""
    parser = argparse.ArgumentParser(description="Estimate pi by long jobs that report their progress.")
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--points", type=int, default=10_000_000, help="points of one job")
    parser.add_argument("--enough", type=int, default=20_000_000, help="points of all jobs: then they may stop")
    options = parser.parse_args(arguments)
    try:
        from mpi4py import MPI
        vm = MPI.COMM_WORLD
    except (ImportError, RuntimeError):  # no mpi4py, or no MPI
        vm = None
    answer = LongJobs(options.jobs, options.points, options.enough, vm=vm).run()
    if answer is not None:
        print("pi is about {:.4f}, from {} points; jobs reported {} times".format(*answer))


if __name__ == "__main__":
    main()

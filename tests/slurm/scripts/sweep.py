"""A sweep as a user would write it: squares of numbers. What came of it is in result.json.

sweep.py JOBS SECONDS: each job takes so long. A job may be told to kill its own slave, once: JD_TEST_KILL=<number of the job>.
In an array of jobs each task does its part.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from mpi4py import MPI

from jd_hpc import JobDispatcher

JOBS, SECONDS = int(sys.argv[1]), float(sys.argv[2])
TASK, TASKS = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0)), int(os.environ.get("SLURM_ARRAY_TASK_COUNT", 1))
TURN = os.environ.get("SLURM_RESTART_COUNT", "0")


class Sweep(JobDispatcher):
    def reset(self):
        self.todo = iter(range(TASK, JOBS, TASKS))
        self.squares = []
        self.lost = set()

    def next_job(self):
        return next(self.todo, None)

    def process_job(self, job):
        with Path(f"ran.{TASK}.{TURN}.{MPI.COMM_WORLD.Get_rank()}").open("a") as ran:
            ran.write(f"{job}\n")
        time.sleep(SECONDS)
        if str(job) == os.environ.get("JD_TEST_KILL") and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return job * job

    def process_result(self, index, job, result):
        self.squares.append((job, result))
        Path(f"progress.{TURN}").write_text(f"{len(self.squares)}\n")

    def on_slave_failed(self, slave, indices):
        self.lost.add(slave)

    def postprocess(self):
        wanted = [(job, job * job) for job in range(TASK, JOBS, TASKS)]
        answer = {
            "each job once": sorted(self.squares) == wanted,
            "jobs": sorted(job for job, _ in self.squares),
            "lost": sorted(self.lost),
            "size": MPI.COMM_WORLD.Get_size(),
            "hosts": sorted(self.machine.hosts),
        }
        Path(f"result.{TASK}.json").write_text(json.dumps(answer))


Sweep(vm=MPI.COMM_WORLD).run()

"""A sweep as a user would write it: squares of numbers. What came of it is in result.json.

sweep.py JOBS SECONDS: each job takes so long. A job may be told to kill its own slave, once: JD_TEST_KILL=<number of the job>.
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


class Sweep(JobDispatcher):
    def reset(self):
        self.todo = iter(range(JOBS))
        self.squares = []
        self.lost = []

    def next_job(self):
        return next(self.todo, None)

    def process_job(self, job):
        with Path(f"ran.{os.environ.get('SLURM_RESTART_COUNT', 0)}.{MPI.COMM_WORLD.Get_rank()}").open("a") as ran:
            ran.write(f"{job}\n")
        time.sleep(SECONDS)
        if str(job) == os.environ.get("JD_TEST_KILL") and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return job * job

    def process_result(self, index, job, result):
        self.squares.append((index, result))
        Path("progress").write_text(f"{len(self.squares)}\n")

    def on_slave_failed(self, slave, indices):
        self.lost.append(slave)

    def postprocess(self):
        answer = {
            "once": sorted(self.squares) == [(job, job * job) for job in range(JOBS)],
            "jobs": len(self.squares),
            "lost": sorted(self.lost),
            "size": MPI.COMM_WORLD.Get_size(),
            "hosts": sorted(self.machine.hosts),
        }
        Path("result.json").write_text(json.dumps(answer))
        print("finished:", json.dumps(answer), flush=True)
        return answer


Sweep(vm=MPI.COMM_WORLD).run()

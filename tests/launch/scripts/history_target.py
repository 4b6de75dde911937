"""Slave 2 is killed while it runs a job. Argument: the history's file."""

import os
import signal
import sys
import time

from mpi4py import MPI
from script_helpers import note_shared_memory

from jd_hpc import JobDispatcher

COUNT = 60
rank = MPI.COMM_WORLD.Get_rank()


class Target(JobDispatcher):
    def reset(self):
        self.asked = 0
        self.got = []

    def next_job(self):
        self.asked += 1
        return self.asked if self.asked <= COUNT else None

    def process_job(self, job):
        time.sleep(0.005)  # all slaves have work when the fault comes
        if rank == 2 and job > COUNT // 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return -job

    def process_result(self, index, job, result):
        self.got.append(index)


target = Target(MPI.COMM_WORLD, history=sys.argv[1])
note_shared_memory()
target.run()
if rank == 0:
    print("got", sorted(target.got) == list(range(COUNT)), flush=True)

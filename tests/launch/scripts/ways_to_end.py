"""Run jobs, and end in the way that the argument names."""

import os
import sys
import threading
import time

from mpi4py import MPI
from script_helpers import RANK, Squares, say

from jd_hpc import JobError

way = sys.argv[1]
options = {"debug": int(way[-1])} if way.startswith("debug") else {}


class Ways(Squares):
    def on_startup(self):
        if way == "slave cannot start" and RANK == 1:
            raise OSError("no licence for this slave")
        if way == "master cannot start" and RANK == 0:
            raise OSError("no licence for the master")

    def next_job(self):
        if way == "slave cannot start":
            time.sleep(0.001)
            return 1
        if way == "bad job" and self.at == 10:
            return threading.Lock()
        return super().next_job()

    def process_job(self, job):
        if job == 10:
            if way in ("job error", "job error is caught"):
                raise ValueError("ten is too much")
            if way == "job exits":
                sys.exit(0)
            if way == "bad result":
                return lambda: 1
        if way == "job error while others work" and job == 10:
            raise ValueError("ten is too much")
        if way == "job error while others work":
            time.sleep(0.3)
            return bytes(1_000_000)
        return super().process_job(job)

    def process_result(self, index, job, result):
        if way == "job error while others work":
            return
        if way == "hook error" and index == 10:
            raise OSError("disk full")
        if way == "hook exits" and index == 10:
            sys.exit(7)
        super().process_result(index, job, result)

    def postprocess(self):
        if way == "no good end":
            raise OSError("cannot write the report")
        return super().postprocess()


class Rows(Ways):
    job_dtype = result_dtype = "i8"


kind = Rows if "rows" in sys.argv else Ways
if way == "ranks disagree":
    options["grain"] = 1 + RANK % 2
if way == "slave's dtype is invalid" and RANK == 1:
    kind.job_dtype = "no such type"
if way == "slave's dtype is invalid":
    kind.next_job = lambda self: 1
if way == "world is split":
    comm = MPI.COMM_WORLD.Split(RANK % 2)
    answer = kind(comm).run()
    assert answer is None or answer == (100, 328350)
    say("answer", answer)
    sys.exit()

try:
    answer = kind(MPI.COMM_WORLD, **options).run()
except JobError as error:
    if way != "job error is caught":
        raise
    say("caught", error.index)
    answer = Squares(MPI.COMM_WORLD).run()
else:
    if way == "job error is caught" and RANK > 0:
        answer = Squares(MPI.COMM_WORLD).run()
assert (answer is None) == (RANK > 0)
if RANK == 0:
    say("answer", *answer, os.getpid())

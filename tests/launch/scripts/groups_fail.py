"""Slaves of two ranks, which add up by MPI; of the group that has job 5 one rank fails before that. Arguments: which, and how.

which: 0 is the first rank of the group, 1 the other one. how: "dies", "raises", or "raises, and nobody minds the job".
"""

import os
import signal
import sys
import time
from pathlib import Path

from mpi4py import MPI
from script_helpers import RANK, Squares, note_pid, say

from jd_hpc import MPIMachine

which, how = int(sys.argv[1]), sys.argv[2]
note_pid()


class Sums(Squares):
    count = 20
    failed = ()

    def process_job(self, job):
        time.sleep(0.02)
        if job == 5 and self.comm.rank == which:
            if how != "dies":
                raise ValueError("five is too much")
            if not Path("note.died").exists():
                Path("note.died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self.comm.allreduce(job * job) // self.comm.size

    def on_slave_failed(self, slave, indices):
        say("lost", slave)

    def process_failure(self, index, job, error):
        say("failed", index, error.type_name, error.message, "in process_job" in error.remote_traceback)
        if how == "raises":
            super().process_failure(index, job, error)


sums = Sums(MPIMachine(MPI.COMM_WORLD, 2), liveness_timeout_s=2.0)
answer = sums.run()
if RANK == 0:
    say("answer", *answer, sums.stats["slaves lost"])
    if how == "dies":
        say("again", *sums.run())
elif how == "dies":
    sums.run()

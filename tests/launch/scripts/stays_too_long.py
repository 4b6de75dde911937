"""Slave 1 stays in a hook for ever, and holds the GIL, while it gives signs of life: stays_too_long.py hook."""

import sys

from mpi4py import MPI
from script_helpers import RANK, Squares, say

from jd_hpc.chaos import strike

hook = sys.argv[1]


class Target(Squares):
    def on_startup(self):
        if RANK == 1 and hook == "startup":
            strike("hang")
        if RANK == 1 and hook == "slow startup":
            strike("compute", 2.0)

    def on_shutdown(self):
        if RANK == 1 and hook == "shutdown":
            strike("hang")

    def process_job(self, job):
        if hook == "slow startup" and job > 90:
            strike("compute", 0.3)  # so that the slow one still finds work
        return super().process_job(job)

    def on_slave_started(self, slave):
        say("started", slave)


target = Target(MPI.COMM_WORLD, heartbeat_s=0.1, liveness_timeout_s=0.5, job_timeout_s=0.5)
answer = target.run()
if answer:
    say("answer", *answer, target.stats["slaves lost"], target.stats["slaves reinstated"])

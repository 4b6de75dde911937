"""The only slave is stopped for longer than the timeout, and comes back: the job that it runs waits for it."""

from mpi4py import MPI
from script_helpers import Squares, say

from jd_hpc.chaos import strike


class Target(Squares):
    has_stopped = False

    def process_job(self, job):
        if job == 5 and not self.has_stopped and not self.machine.is_master:
            self.has_stopped = True
            strike("stop", 3.0)
        return super().process_job(job)


target = Target(MPI.COMM_WORLD, heartbeat_s=0.1, liveness_timeout_s=2.0)
answer = target.run()
if answer:
    say("answer", *answer, target.stats["slaves suspected"])

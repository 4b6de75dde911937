"""Ranks that talk to the master, to all and to each other; rank 2 is killed amid it: talks_and_dies.py bytes signal."""

import os
import signal
import sys
import time

from mpi4py import MPI
from script_helpers import RANK, Squares, say

SIZE, SIGNAL = int(sys.argv[1]), signal.Signals[sys.argv[2]]


class Talks(Squares):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.add_handler(tuple, self.hear)
        self.told, self.heard = set(), 0

    def process_job(self, job):
        for other in range(MPI.COMM_WORLD.size):
            if other != RANK:
                self.tell((job, bytes(SIZE)), other)
        if RANK == 2 and job > 20:
            os.kill(os.getpid(), SIGNAL)
        time.sleep(0.005)
        self.poll()
        return super().process_job(job)

    def hear(self, source, message):
        job, data = message
        assert len(data) == SIZE
        if RANK == 0:
            self.told.add(job)
            self.broadcast(message)

    def process_result(self, index, job, result):
        assert job in self.told, f"the result of job {job} came before what it told"
        super().process_result(index, job, result)


talks = Talks(MPI.COMM_WORLD, heartbeat_s=0.1, liveness_timeout_s=1.0, min_slaves=1)
answer = talks.run()
if answer:
    say("answer", *answer, talks.stats["slaves lost"] + talks.stats["slaves suspected"], talks.stats["own messages handled"] >= 100)

"""Many runs; in each of them every rank gets a signal, each at a random time of its own. Arguments: rounds, which signal."""

import os
import random
import signal
import sys
import threading
import time

from mpi4py import MPI
from script_helpers import RANK, Squares, note, say

from jd_hpc import JobError, SlaveError

rounds, by = int(sys.argv[1]), sys.argv[2]
comm = MPI.COMM_WORLD


class StopError(Exception):
    pass


def handler(number, frame):
    raise StopError


class Busy(Squares):
    count = 1_000_000

    def on_startup(self):
        # From inside of run(): what happens before a rank has entered it is no business of the run's.
        self.timer.start()

    def process_job(self, job):
        return bytes(10_000) if job % 3 else job

    def process_result(self, index, job, result):
        self.seen += 1


signal.signal(signal.SIGTERM, handler)
if by == "Ctrl-C":
    number, expected = signal.SIGINT, KeyboardInterrupt
else:
    number, expected = signal.SIGTERM, (StopError, JobError, SlaveError)  # in a job it is that job's failure
heard = 0
for i in range(rounds):
    own, common = random.Random(f"{i} {RANK}"), random.Random(i)
    delay_s = common.random() * 0.005 + own.choice([0, 0.0003, 0.002, 0.01]) * own.random()
    dispatcher = Busy(comm, credit=1 + i % 4)
    dispatcher.timer = threading.Timer(delay_s, os.kill, (os.getpid(), number))
    try:
        try:
            dispatcher.run()
        finally:  # a signal that comes after the run must not hit the next one
            dispatcher.timer.join()
            time.sleep(0.001)
    except expected:
        heard += 1
    comm.Barrier()
    answer = Squares(comm).run()
    assert answer == (None if RANK else (100, 328350)), (i, answer)
note(f"heard{RANK}", heard)
if RANK == 0:
    say("rounds", rounds)

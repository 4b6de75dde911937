"""Run for ever, until interrupted. Arguments: what the ranks are doing meanwhile, and whether the KeyboardInterrupt is caught."""

import sys
import time

import numpy as np
from mpi4py import MPI
from script_helpers import RANK, Squares, note, note_pid, say

doing, caught = sys.argv[1:3]


class Forever(Squares):
    started = 0

    def on_slave_started(self, slave):
        self.started += 1

    def next_job(self):
        self.at += 1
        return float(self.at)

    def process_job(self, job):
        if doing == "python":
            end = time.monotonic() + 0.01
            while time.monotonic() < end:
                pass
        elif doing == "sleeping":
            time.sleep(0.5)
        elif doing == "stuck" and job > 5:
            note("stuck", "yes")
            time.sleep(3600)
        elif doing == "large":
            return np.full(300_000, job)
        return job

    def process_result(self, index, job, result):
        if self.seen == 4:
            note("running", "yes")
        self.seen += self.started == self.machine.size - 1

    def on_shutdown(self):
        note(f"shutdown{RANK}", "yes")


class Rows(Forever):
    job_dtype = result_dtype = "f8"


note_pid()
if caught == "caught":
    try:
        (Rows if doing == "rows" else Forever)(MPI.COMM_WORLD).run()
        if RANK > 0:
            time.sleep(0.5)  # its own signal may come a little after the master's word to stop
    except KeyboardInterrupt:
        pass
    answer = Squares(MPI.COMM_WORLD).run()  # everything is in order for the next run
    if RANK == 0:
        say("answer", *answer)
else:
    (Rows if doing == "rows" else Forever)(MPI.COMM_WORLD).run()

"""Run small jobs with a line of progress now and then."""

import time

from mpi4py import MPI

import jd_hpc.progress
from jd_hpc import JobDispatcher, MPIMachine

jd_hpc.progress.LINE_EVERY_S = 0.1


class Small(JobDispatcher):
    def reset(self):
        self.at = 0

    def next_job(self):
        if self.at == 60:
            return None
        self.at += 1
        return self.at

    def process_job(self, job):
        time.sleep(0.02)

    def process_result(self, index, job, result):
        pass


Small(MPIMachine(MPI.COMM_WORLD), grain=1, progress=True).run()

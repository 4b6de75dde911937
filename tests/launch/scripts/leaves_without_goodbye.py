"""Slave 1 is interrupted again and again while the master is busy: it leaves the run without a goodbye, and lives on."""

import os
import signal
import threading
import time

from mpi4py import MPI
from script_helpers import RANK, Squares, say

comm = MPI.COMM_WORLD


class Busy(Squares):
    def on_startup(self):
        if RANK == 1:
            threading.Thread(target=self.interrupt).start()

    def interrupt(self):
        for _ in range(4):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)

    def process_result(self, index, job, result):
        time.sleep(2)


try:
    Busy(comm, credit=1).run()
except KeyboardInterrupt:
    if RANK == 0:
        say("the run ended")
        raise
    time.sleep(20)  # far longer than the master may need

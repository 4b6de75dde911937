"""A slave reports for the second run and is killed, while the first one still waits for another slave to leave it."""

import os
import signal
import threading
import time

from mpi4py import MPI
from script_helpers import RANK, Squares, say


class First(Squares):
    def on_startup(self):
        if RANK == 2:
            time.sleep(3.0)

    def on_shutdown(self):
        if RANK == 1:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGKILL)).start()


First(MPI.COMM_WORLD).run()
second = Squares(MPI.COMM_WORLD)
answer = second.run()
if answer:
    say("answer", *answer, second.stats["slaves lost"])

"""All slaves but one die at once, and the hook that is told of it raises."""

import os
import signal
import time

from mpi4py import MPI
from script_helpers import RANK, Squares, say


class CannotBearLosses(Squares):
    def on_startup(self):
        if RANK > 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def reset(self):
        super().reset()
        time.sleep(1.0)  # so that the master hears of all deaths in the same moment

    def on_slave_failed(self, slave, indices):
        say("failed", slave)
        raise OSError("a slave too few")


CannotBearLosses(MPI.COMM_WORLD).run()

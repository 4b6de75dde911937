"""Slaves share a table. Arguments: how many MB it has; what happens to slave 1.

"nothing"; "dies": slave 1, which is to keep the data for the host of all slaves, is killed when the first of it comes in;
"dies later": when the others have its address.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI
from script_helpers import RANK, Squares, note, note_pid, say

from jd_hpc import MPIMachine
from jd_hpc.sharing import Memory

megabytes, fate = int(sys.argv[1]), sys.argv[2]
note_pid()


def own_bytes():
    """Return what this process takes of the machine's memory: of a page that n processes have, one n-th (Pss)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


class Table(Squares):
    count = 30

    def shared(self):
        return np.arange(megabytes * 125_000, dtype="f8")

    def process_job(self, job):
        time.sleep(0.02)
        assert self.shared[job] == job
        assert self.shared.sum() == len(self.shared) * (len(self.shared) - 1) / 2  # every page is touched
        if fate == "dies later" and RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return job * job

    def on_startup(self):
        while fate == "dies" and RANK > 1 and not Path("note.keeper").exists():
            time.sleep(0.01)

    def on_shutdown(self):
        if fate == "nothing":
            self.shared.sum()
            MPI.COMM_WORLD.Barrier()
            taken = MPI.COMM_WORLD.gather(own_bytes() - before)
            if RANK == 0:
                say("MB", sum(taken) / 1e6)
            MPI.COMM_WORLD.Barrier()


if fate == "dies" and RANK == 1:

    def die(size):
        note("keeper", 1)
        time.sleep(0.5)  # the others are waiting by then
        os.kill(os.getpid(), signal.SIGKILL)

    Memory.create = die

machine = MPIMachine(MPI.COMM_WORLD)
if fate != "nothing":
    machine.channel().hosts = {"here": [0], "there": list(range(1, MPI.COMM_WORLD.size))}
before = own_bytes()
table = Table(machine)
answer = table.run()
if answer:
    say("answer", *answer, table.stats["slaves lost"])

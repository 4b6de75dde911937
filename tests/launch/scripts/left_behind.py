"""End without giving anything back: the dispatcher, its communicator and its results are alive when the interpreter ends."""

import numpy as np
from mpi4py import MPI
from script_helpers import RANK, Squares, say

kept = []


class Keeps(Squares):
    def process_job(self, job):
        kept.append(job)
        return np.full(50_000, job)

    def process_result(self, index, job, result):
        kept.append((job, result))


comm = MPI.COMM_WORLD.Dup()
dispatchers = [Keeps(MPI.COMM_WORLD), Keeps(comm), Keeps(comm.Dup())]
for dispatcher in dispatchers:
    dispatcher.run()
if RANK == 0:
    say("kept", len(kept))

"""Draws numbers, and prints a hash of them in the order in which they were handed over.

Arguments: hooks, ordered or map; then any of: mpi, kill (slave 2 dies in the middle), journal=PATH, pause_s=SECONDS (of each job),
die_s=SECONDS (then the master dies).
"""

import hashlib
import os
import signal
import sys
import threading
import time

import numpy as np

from jd_hpc import JobDispatcher, map_array

form, words = sys.argv[1], sys.argv[2:]
named = dict(word.split("=") for word in words if "=" in word)
vm, rank = None, 0
if "mpi" in words:
    import script_helpers  # notes what this rank leaves behind
    from mpi4py import MPI

    vm, rank = MPI.COMM_WORLD, MPI.COMM_WORLD.rank
    script_helpers.note_shared_memory()
COUNT = 400
if rank == 0 and "die_s" in named:
    threading.Timer(float(named["die_s"]), os.kill, (os.getpid(), signal.SIGKILL)).start()


def draw(job, rng):
    time.sleep(float(named.get("pause_s", 0.002)))
    if rank == 2 and job > 0.4 * COUNT and "kill" in words:
        os.kill(os.getpid(), signal.SIGKILL)
    return rng.standard_normal(2) + job


class Draws(JobDispatcher):
    job_dtype = "f8"
    result_dtype = ("f8", 2)

    def reset(self):
        self.at, self.stored = 0, 0
        self.got, self.out = [], np.zeros((COUNT, 2))

    def next_job(self):
        self.at += 1
        return float(self.at - 1) if self.at <= COUNT else None

    def process_job(self, job, rng):
        return draw(job, rng)

    def process_result(self, index, job, result):
        self.stored += self.from_journal
        self.got.append(index)
        self.out[index] = result

    def postprocess(self):
        assert not self.ordered or self.got == list(range(COUNT))
        return self.out


def answer(out, *more):
    print("answer", hashlib.sha256(out.tobytes()).hexdigest(), *more, flush=True)


options = {"rng": True, "seed": 2026, "grain": 3}
if form == "map":
    for times in (1, 2):  # the second time the dead slave is known to be dead
        out = map_array(draw, np.arange(times * COUNT / 2) if rank == 0 else None, ("f8", 2), vm=vm, **options)
    if rank == 0:
        answer(out, 0)
else:
    draws = Draws(vm, ordered=form == "ordered", **options)
    out = draws.run(journal=named.get("journal"))
    if rank == 0:
        answer(out, draws.stored)

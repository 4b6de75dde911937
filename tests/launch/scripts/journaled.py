"""A run with a journal: journaled.py journal evaluations count kill_after_s pause_s [mpi].

Every job that is evaluated is noted in the file `evaluations`. The master kills itself after kill_after_s, 0: never. At the end it
prints how many results there were, how many came from the journal, and a hash of all results in the order of their jobs.
"""

import hashlib
import os
import signal
import sys
import threading
import time

import numpy as np

from jd_hpc import JobDispatcher

journal, evaluations, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
kill_after_s, pause_s = float(sys.argv[4]), float(sys.argv[5])
vm = None
if sys.argv[6:] == ["mpi"]:
    import script_helpers  # notes what this rank leaves behind
    from mpi4py import MPI

    vm = MPI.COMM_WORLD
    script_helpers.note_shared_memory()
noted = os.open(evaluations, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


class Journaled(JobDispatcher):
    job_dtype = ("f8", 2)
    result_dtype = np.dtype([("sum", "f8"), ("n", "i4")])

    def reset(self):
        self.at, self.stored, self.results = 0, 0, np.zeros(count, self.result_dtype)
        if kill_after_s:
            threading.Timer(kill_after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def next_job(self):
        if self.at == count:
            return None
        self.at += 1
        return np.array([self.at - 1, np.pi])

    def process_job(self, job):
        os.write(noted, f"{int(job[0])}\n".encode())
        if pause_s:
            time.sleep(pause_s)
        return job[0] * job[1], int(job[0])

    def process_result(self, index, job, result):
        assert result["n"] == index
        self.results[index] = result
        self.stored += self.from_journal

    def postprocess(self):
        return self.at, self.stored, hashlib.sha256(self.results.tobytes()).hexdigest()


answer = Journaled(vm, grain=4).run(journal=journal)
if answer:
    print("answer", *answer)

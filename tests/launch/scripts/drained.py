"""Run jobs, but for those that an earlier start has done. Arguments: count, seconds of a job, what they do, options in JSON.

What a job does: sleep, or block (C code that holds the GIL).
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path

from mpi4py import MPI
from script_helpers import RANK, note, note_shared_memory, say

from jd_hpc import JobDispatcher, Unfinished

DONE = Path(os.environ.get("DONE", "note.done"))
count, job_s, what, options = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
saves, fails = options.pop("saves", False), options.pop("fails", False)


class Resumed(JobDispatcher):
    """Keeps a file of the jobs that ended: what a journal is for."""

    def reset(self):
        DONE.touch()
        done = set(map(int, DONE.read_text().split()))
        self.todo = iter(sorted(set(range(count)) - done))
        self.ended = 0

    def next_job(self):
        return next(self.todo, None)

    def process_job(self, job):
        note(f"pid{RANK}", os.getpid())
        if what == "sleep":
            time.sleep(job_s)
        elif what == "block":
            ctypes.PyDLL(None).usleep(int(1e6 * job_s))
        else:
            end = time.monotonic() + job_s
            while time.monotonic() < end:
                pass
        return job

    def process_result(self, index, job, result):
        with DONE.open("a") as file:
            file.write(f"{job}\n")
        self.ended += 1
        if self.ended == 4:
            note("running", 1)

    def process_failure(self, index, job, error):
        say("failed", job, error.attempts)
        raise error

    def postprocess(self):
        return f"ended {self.ended}"


note(f"rank{RANK}", os.getpid())
note_shared_memory()
try:
    answer = Resumed(MPI.COMM_WORLD, **options).run()
except Unfinished as unfinished:
    if RANK == 0 and saves:
        time.sleep(1)  # the others must not be the end of us meanwhile
        note("saved", f"{unfinished.ended} {unfinished.put_back} {unfinished.cut_off} {unfinished.reason}")
    if fails:
        raise OSError("cannot write the report") from None
    raise
if answer:
    say(answer)

"""For the scripts that the launch tests start: notes for the test, and a dispatcher to derive from."""

import atexit
import faulthandler
import os
import sys
import traceback
from pathlib import Path

from mpi4py import MPI

from jd_hpc import JobDispatcher

faulthandler.dump_traceback_later(25, exit=True)  # a rank that hangs says where
RANK = MPI.COMM_WORLD.rank


def print_in_one_write(*error):
    """Print an exception as Python does, but whole: two ranks' lines must not mix."""
    os.write(2, "".join(traceback.format_exception(*error)).encode())


sys.excepthook = print_in_one_write


def note(name, text):
    """Write a file for the test that started us."""
    path = Path(f"note.{name}")
    path.with_suffix(path.suffix + ".new").write_text(f"{text}\n")
    path.with_suffix(path.suffix + ".new").rename(path)


@atexit.register
def note_shared_memory():
    """The files of shared memory that this rank uses: they must be gone when mpiexec is."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    names = {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")}
    Path(f"shm.{RANK}").write_text("\n".join(names))


class Squares(JobDispatcher):
    """Squares of 0 .. count - 1."""

    count = 100

    def reset(self):
        self.at, self.total, self.seen = 0, 0, 0

    def next_job(self):
        self.at += 1
        return self.at - 1 if self.at <= self.count else None

    def process_job(self, job):
        return job * job

    def process_result(self, index, job, result):
        self.total += result
        self.seen += 1

    def postprocess(self):
        return self.seen, self.total


def say(*words):
    """Print one line, in one write: the ranks share the terminal."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def note_pid():
    note(f"pid{RANK}", os.getpid())

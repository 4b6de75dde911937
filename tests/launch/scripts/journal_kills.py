"""Kill the master of a run with a journal at random moments: journal_kills.py folder kills seed.

The masters are forked from here, so that each costs a few ms. What was evaluated is compared with what was stored every time.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from jd_hpc import JobDispatcher, journal_writer
from jd_hpc.journal_file import JournalReader

folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
journal, evaluations = folder / "a.journal", folder / "evaluations"
COUNT = 2000
MOST_S = 0.06
chance = random.Random(seed)


class Journaled(JobDispatcher):
    def __init__(self, **dtypes):
        super().__init__(grain=5)
        vars(self).update(dtypes)
        self.noted = os.open(evaluations, os.O_WRONLY | os.O_APPEND)

    def reset(self):
        self.at, self.results = 0, {}

    def next_job(self):
        self.at += 1
        return float(self.at - 1) if self.at <= COUNT else None

    def process_job(self, job):
        os.write(self.noted, f"{int(job)}\n".encode())
        time.sleep(0.0003)
        return job / 7 if self.result_dtype else [job / 7, "x" * (int(job) % 50)]

    def process_result(self, index, job, result):
        self.results[index] = result if self.result_dtype else result[0]


def stored():
    """Return what is whole in the journal; only its end may be torn."""
    if not journal.exists():
        return set()
    with JournalReader(str(journal)) as reader:
        found = {index for block in reader.blocks() for index in block.indices.tolist()}
        assert all(damage.until is None for damage in reader.damage), reader.damage
        return found


def killed_run(dispatcher):
    """Run in a child that is killed; nothing of what was stored may be evaluated again, or be lost."""
    before = stored()
    evaluations.write_bytes(b"")
    child = os.fork()
    if child == 0:
        try:
            journal_writer.FLUSH_S = chance.choice([0.001, 0.005, 0.02])
            dispatcher().run(journal=journal)
        finally:
            os._exit(0)
    if chance.random() < 0.7:  # else it may be opening the file
        while evaluations.stat().st_size == 0 and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
    time.sleep(chance.uniform(0, MOST_S))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    evaluated = evaluations.read_text().split()
    assert before.isdisjoint(map(int, evaluated)), "a stored result was computed again"
    assert before <= stored(), "a stored result is lost"
    return os.WIFSIGNALED(status)


def finish(dispatcher):
    """The next run comes to its end: all results are there, to the bit."""
    there = len(stored())
    dispatcher.run(journal=journal)
    assert dispatcher.stats["from journal"] == there
    assert np.array_equal([dispatcher.results[i] for i in range(COUNT)], np.arange(COUNT) / 7)
    journal.unlink(missing_ok=True)


for dtypes in ({"job_dtype": "f8", "result_dtype": "f8"}, {}):
    hit = most = 0
    for _ in range(kills // 2):
        hit += killed_run(lambda dtypes=dtypes: Journaled(**dtypes))
        most = max(most, len(stored()))
        if most == COUNT:
            finish(Journaled(**dtypes))
            most = 0
    finish(Journaled(**dtypes))
    print(f"killed {hit} stored {most}", flush=True)

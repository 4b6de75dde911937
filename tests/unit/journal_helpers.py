"""What the tests of the journal share: runs without MPI whose evaluations are counted, and a closer look at files."""

from __future__ import annotations

import numpy as np

from jd_hpc import JobDispatcher
from jd_hpc.journal_file import JournalReader, Table


class Counted(JobDispatcher):
    """Runs `job_list`; remembers what was evaluated, and what came from where."""

    def __init__(self, job_list, process=lambda job: job, job_dtype=None, result_dtype=None, **options):
        super().__init__(**options)
        self.job_list, self.process = job_list, process
        self.job_dtype, self.result_dtype = job_dtype, result_dtype
        self.bad = ()

    def reset(self):
        self.at = 0
        self.evaluated = 0
        self.results, self.stored, self.failures = {}, [], []

    def next_job(self):
        if self.at == len(self.job_list):
            return None
        self.at += 1
        return self.job_list[self.at - 1]

    def process_job(self, job):
        self.evaluated += 1
        if self.evaluated in self.bad:
            raise ArithmeticError("a bad moment")
        return self.process(job)

    def process_result(self, index, job, result):
        assert index not in self.results
        self.results[index] = result
        if self.from_journal:
            self.stored.append(index)

    def process_failure(self, index, job, error):
        assert not self.from_journal
        self.failures.append(index)


def squares(count, **options):
    return Counted([float(i) for i in range(count)], lambda job: job * job, "f8", "f8", **options)


def contents(path):
    """Return {index: fingerprint} of what is whole in a journal, and what is not."""
    with JournalReader(str(path)) as reader:
        table = Table(reader.dtype is None)
        for block in reader.blocks():
            table.add(block)
        return {int(i): int(table.fingerprints[i]) for i in table.indices()}, reader.damage


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def block_bounds(path):
    with JournalReader(str(path)) as reader:
        return [(block.at, block.end) for block in reader.blocks()]


def same(one, other):
    """Whether two results are the same to the bit."""
    if isinstance(one, np.ndarray | np.generic):
        one, other = np.asarray(one), np.asarray(other)
        if one.dtype.names is not None:  # what pads a record does not count
            return one.dtype == other.dtype and repr(one.tolist()) == repr(other.tolist())
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return type(one) is type(other) and one == other

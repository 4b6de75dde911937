"""Hundreds of small runs in one process, of all kinds in turn: no run finds anything of another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mpi_helpers import Sweep, Tolerant, check_healthy, everywhere, same

from jd_hpc import JobError, PayloadError

pytestmark = pytest.mark.mpi


class Objects(Tolerant):
    """Small objects; the salt makes the runs different."""

    salt = 0

    def make(self, index):
        return self.salt * 1000 + index

    def work(self, job):
        return job * 3

    def on_startup(self):
        self.job_list = [self.make(i) for i in range(len(self.job_list))]

    def process_job(self, job):
        if int(np.ravel(job)[0]) % 7 == self.bad:
            raise ValueError("one of those that fail")
        return self.work(job)

    bad = -1

    def postprocess(self):
        for index, job in enumerate(self.job_list):
            if int(np.ravel(job)[0]) % 7 == self.bad:
                assert self.failures.pop(index).message == "one of those that fail"
            else:
                assert same(np.asarray(self.results.pop(index)), np.asarray(self.work(job)))
        assert not self.failures
        assert not self.results
        return True


class LargeObjects(Objects):
    def make(self, index):
        return np.full(700, float(self.salt * 1000 + index))


class Rows(Objects):
    job_dtype = result_dtype = "f8"

    def make(self, index):
        return float(self.salt * 1000 + index)


class LargeRows(Objects):
    job_dtype = result_dtype = ("f8", 700)
    make = LargeObjects.make


class SmallToLarge(Objects):
    job_dtype = "i8"
    result_dtype = ("i8", 5000)

    def work(self, job):
        return np.full(5000, job)


class LargeToSmall(Objects):
    job_dtype = ("f8", 5000)

    def make(self, index):
        return np.full(5000, float(self.salt * 1000 + index))

    def work(self, job):
        return float(job.sum())


class InBlocks(Rows):
    def next_jobs(self, count):
        block = self.job_list[self.at : self.at + count]
        self.at += len(block)
        return block

    def process_results(self, indices, jobs, results):
        self.results.update(zip(indices.tolist(), results.tolist(), strict=True))


KINDS = [Objects, Rows, LargeObjects, LargeRows, SmallToLarge, LargeToSmall, InBlocks]


class Fails(LargeObjects):
    process_failure = Sweep.process_failure


class FailsRows(LargeRows):
    process_failure = Sweep.process_failure


class BadJob(LargeObjects):
    def next_job(self):
        return super().next_job() if self.at < 3 else (lambda: 1)


class BadHook(SmallToLarge):
    def process_result(self, index, job, result):
        if len(self.results) == 2:
            raise RuntimeError("a hook that fails")
        super().process_result(index, job, result)


def test_hundreds_of_runs_of_all_kinds(world):
    """Nothing holds the ranks together between the runs: slaves run ahead as far as they can."""
    results = []
    for i in range(420):
        kind = KINDS[i % len(KINDS)]
        dispatcher = kind(range(1 + i % 9), world, grain=1 + i % 3, credit=1 + i % 4)
        dispatcher.salt, dispatcher.bad = i, i % 11
        results.append(dispatcher.run())
    with everywhere(world):
        assert results == [True if world.rank == 0 else None] * 420
    check_healthy(world)


def test_hundreds_of_runs_with_and_without_errors(world):
    wrong = []
    plan = [(Fails, JobError), (None, None), (FailsRows, JobError), (None, None), (BadJob, PayloadError), (BadHook, RuntimeError)]
    for i in range(300):
        kind, expected = plan[i % len(plan)]
        if kind is BadJob and world.size == 1:
            continue
        dispatcher = (kind or KINDS[i % len(KINDS)])(range(12), world, grain=1 + i % 2, credit=1 + i % 3)
        dispatcher.salt, dispatcher.bad = i, 4
        raised = value = None
        try:
            value = dispatcher.run()
        except Exception as error:
            raised = error
        right = (type(raised) is expected) if expected and world.rank == 0 else raised is None
        if not right or value is not (True if world.rank == 0 and not expected else None):
            wrong.append((i, kind, raised, value))
    with everywhere(world):
        assert wrong == []
    check_healthy(world)


def test_hundreds_of_runs_of_one_dispatcher(comm):
    dispatcher = LargeRows(range(5), comm)
    right = 0
    for i in range(250):
        dispatcher.salt = i
        right += dispatcher.run() is (True if comm.rank == 0 else None)
    with everywhere(comm):
        assert right == 250


def test_empty_runs(comm):
    for _ in range(200):
        assert Objects([], comm).run() is (True if comm.rank == 0 else None)
    check_healthy(comm)


def test_runs_leave_no_files_open(comm):
    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    for i in range(40):
        if i == 5:
            before = count()
        Objects(range(3), comm).run()
    with everywhere(comm):
        assert count() <= before

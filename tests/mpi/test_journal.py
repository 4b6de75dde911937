"""Runs with a journal on real ranks: what is stored never goes to a slave, whatever the number of ranks was before."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import Sweep, Tolerant, check_healthy, error_of, everywhere, same, value_of

from jd_hpc import JobDispatcher, JobError, JournalHeldError, JournalMismatchError, JournalWriteError
from jd_hpc.journal_file import JournalReader
from jd_hpc.journal_lock import JournalLock

pytestmark = pytest.mark.mpi


@pytest.fixture
def path(comm):
    folder = comm.bcast(tempfile.mkdtemp(prefix="jd_hpc_journal") if comm.rank == 0 else None)
    yield str(Path(folder, "a.journal"))
    comm.Barrier()
    with everywhere(comm):
        if comm.rank == 0:
            left = sorted(each.name for each in Path(folder).iterdir())
            shutil.rmtree(folder)
            assert left in ([], ["a.journal"])


class Journaled:
    """Goes before a dispatcher of mpi_helpers: run() takes the journal, and everything is counted."""

    path = None

    def run(self):
        return super().run(journal=self.path)

    def reset(self):
        super().reset()
        self.stored = []

    def process_job(self, job):
        self.evaluated = getattr(self, "evaluated", 0) + 1
        return super().process_job(job)

    def process_result(self, index, job, result):
        super().process_result(index, job, result)
        if self.from_journal:
            self.stored.append(index)


class Plain(Journaled, Tolerant):
    pass


class Rows(Journaled, Tolerant):
    job_dtype = "f8"
    result_dtype = ("f8", 2)

    def process_job(self, job):
        super().process_job(job)
        return np.array([job, np.nan if job % 3 else 1 / (job + 1)])


class BigRows(Journaled, Tolerant):
    job_dtype = ("i4", 700)
    result_dtype = ("f8", 70_000)

    def process_job(self, job):
        super().process_job(job)
        return np.arange(70_000) + float(job[0])


class Blocks(Rows):
    def next_jobs(self, count):
        self.at, begin = min(self.at + count, len(self.job_list)), self.at
        return np.array(self.job_list[begin : self.at]) if begin < self.at else None

    def process_results(self, indices, jobs, results):
        for index, job, result in zip(indices.tolist(), jobs, results, strict=True):
            self.process_result(index, job, result)


KINDS = {
    "rows": (Rows, [float(i) for i in range(500)]),
    "blocks": (Blocks, [float(i) for i in range(500)]),
    "objects": (Plain, [{"i": i, "data": np.arange(i)} for i in range(60)]),
    "large rows": (BigRows, [np.full(700, i, "i4") for i in range(12)]),
    "large objects": (Plain, [np.full(50_000, float(i)) for i in range(12)]),
}


def run(dispatcher, comm, path):
    """Run with a journal: ({index: result}, stored indices, jobs evaluated on all ranks), the same on every rank."""
    dispatcher.path, dispatcher.evaluated = path, 0
    results, failures = value_of(dispatcher, comm)
    assert failures == {}
    return results, comm.bcast(getattr(dispatcher, "stored", None)), comm.allreduce(dispatcher.evaluated)


@pytest.mark.parametrize("grain", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_computes_only_the_rest(comm, path, kind, grain):
    make, jobs = KINDS[kind]
    part = 2 * len(jobs) // 3
    alone = run(make(jobs, comm, grain=grain), comm, None)[0]
    _, stored, evaluated = run(make(jobs[:part], comm, grain=grain), comm, path)
    assert (stored, evaluated) == ([], part)
    second = make(jobs, comm, grain=grain)
    results, stored, evaluated = run(second, comm, path)
    assert stored == list(range(part))
    assert evaluated == len(jobs) - part
    assert results.keys() == alone.keys()
    assert all(same(results[index], alone[index]) for index in alone)
    with everywhere(comm):
        if comm.rank == 0:
            assert second.stats["from journal"] == part
            assert second.stats["jobs"] == len(jobs)
    assert run(make(jobs, comm, grain=grain), comm, path)[1:] == (list(range(len(jobs))), 0)


@pytest.mark.parametrize("count", [1, 2])
def test_another_number_of_ranks(comm, path, count):
    """What was computed with so many ranks is there for all of them."""
    part = comm.Split(0 if comm.rank < count else MPI.UNDEFINED)
    if part != MPI.COMM_NULL:
        run(Rows([float(i) for i in range(50)], part), part, path)
        part.Free()
    comm.Barrier()
    results, stored, evaluated = run(Rows([float(i) for i in range(80)], comm, max_slaves=3), comm, path)
    assert (stored, evaluated, len(results)) == (list(range(50)), 30, 80)


class Flaky(Rows):
    bad = ()

    def process_job(self, job):
        if job in self.bad:
            raise ArithmeticError("a bad moment")
        return super().process_job(job)


class FlakyObjects(Plain):
    bad = ()

    def process_job(self, job):
        if job in self.bad:
            raise ArithmeticError("a bad moment")
        return super().process_job(job)


@pytest.mark.parametrize("grain", [1, 5])
@pytest.mark.parametrize("kind", [Flaky, FlakyObjects])
def test_failures_have_another_try(comm, path, kind, grain):
    jobs, bad = [float(i) for i in range(200)], {0.0, 17.0, 18.0, 199.0}
    first = kind(jobs, comm, grain=grain)
    first.path, first.bad = path, bad
    assert set(value_of(first, comm)[1]) == {int(job) for job in bad}
    results, stored, evaluated = run(kind(jobs, comm, grain=grain), comm, path)
    assert (len(results), len(stored), evaluated) == (200, 196, 4)
    assert set(stored).isdisjoint(int(job) for job in bad)


class Late(Rows):
    """A job that the journal lacks: it waits until all that it has was delivered."""

    gate = ""

    def process_job(self, job):
        end = time.monotonic() + 30
        while self.gate and not Path(self.gate).exists():
            assert time.monotonic() < end, "stored results wait for jobs that are computed"
            time.sleep(0.01)
        return super().process_job(job)

    def process_result(self, index, job, result):
        super().process_result(index, job, result)
        if len(self.stored) == 90 and self.gate:
            Path(self.gate).touch()


def test_stored_results_do_not_wait_for_the_others(comm, path):
    if comm.size == 1:
        return  # there a batch is run when its turn comes
    first = Flaky([float(i) for i in range(100)], comm)
    first.path, first.bad = path, set(range(0, 100, 10))
    value_of(first, comm)
    second = Late([float(i) for i in range(100)], comm)
    second.gate = str(Path(path).with_name("gate"))
    results, stored, evaluated = run(second, comm, path)
    assert (len(results), len(stored), evaluated) == (100, 90, 10)
    with everywhere(comm):
        if comm.rank == 0:
            Path(second.gate).unlink()


class Tree(Journaled, Sweep):
    """Each result makes two jobs: next_job says None in between, also while stored results come."""

    job_dtype = "i8"
    result_dtype = ("i8", 2)
    depth = 0

    def reset(self):
        super().reset()
        self.todo = [1]

    def next_job(self):
        if not self.todo:
            return None
        self.job_list.append(self.todo.pop(0))
        return self.job_list[-1]

    def process_job(self, job):
        self.evaluated += 1
        return [2 * job, 2 * job + 1]

    def process_result(self, index, job, result):
        super().process_result(index, job, result)
        if len(self.results) == len(self.job_list):  # a whole level: which result came first does not matter
            level = sorted(int(child) for index in self.results for child in self.results[index])
            self.todo = [child for child in level if len(self.job_list) < child < 2**self.depth]


def test_results_that_make_jobs(comm, path):
    for depth, expected in ((4, 15), (6, 48), (6, 0)):
        tree = Tree([], comm)
        tree.depth = depth
        results, _, evaluated = run(tree, comm, path)
        assert len(results) == 2**depth - 1
        assert evaluated == expected


# ---- errors end the run on all ranks ----------------------------------------------------------------------------------


def failing(dispatcher, comm, path):
    dispatcher.path = path
    error = error_of(dispatcher, comm)
    check_healthy(comm)
    return error


def test_another_job_set(comm, path):
    run(Rows([float(i) for i in range(50)], comm), comm, path)
    error = failing(Rows([float(i) if i != 40 else -1.0 for i in range(60)], comm), comm, path)
    assert isinstance(error, JournalMismatchError)
    assert "job 40 is not the one" in str(error)
    error = failing(BigRows([np.zeros(700, "i4")], comm), comm, path)
    assert isinstance(error, JournalMismatchError)
    assert run(Rows([float(i) for i in range(50)], comm), comm, path)[2] == 0


def test_a_second_writer(comm, path):
    lock = JournalLock(path) if comm.rank == 0 else None
    comm.Barrier()
    error = failing(Rows([1.0], comm), comm, path)
    assert isinstance(error, JournalHeldError)
    assert f"held by process {comm.bcast(os.getpid())} on " in str(error)
    if lock is not None:
        lock.release()


def test_a_full_disk(comm, path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if comm.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, limits[1]))
    try:
        error = failing(BigRows([np.full(700, i, "i4") for i in range(200)], comm), comm, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(error, JournalWriteError)
    assert "cannot be written any more" in str(error)
    comm.Barrier()
    with JournalReader(path) as reader:
        found = sorted(index for block in reader.blocks() for index in block.indices.tolist())
        assert reader.damage == []
    assert found
    _, stored, evaluated = run(BigRows([np.full(700, i, "i4") for i in range(20)], comm), comm, path)
    assert stored == [index for index in found if index < 20]
    assert evaluated == 20 - len(stored)


class Strict(Flaky):
    process_failure = JobDispatcher.process_failure


def test_a_failure_that_ends_the_run(comm, path):
    first = Strict([float(i) for i in range(300)], comm)
    first.bad = {250.0}
    assert isinstance(failing(first, comm, path), JobError)
    results, stored, evaluated = run(Rows([float(i) for i in range(300)], comm), comm, path)
    assert len(results) == 300
    assert len(stored) > 100
    assert evaluated == 300 - len(stored)

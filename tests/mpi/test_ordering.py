"""Results in the order of their jobs on real ranks, and a master that does not run ahead of the oldest one."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from mpi_helpers import check_healthy, error_of, everywhere, run, same, value_of

from jd_hpc import JobDispatcher, JobError, Unfinished
from jd_hpc.check import check_file

pytestmark = pytest.mark.mpi

COUNT = 150
SLOW = 20
"""This job takes longer than all the others together."""
BAD = (5, 6, 100)


@pytest.fixture
def folder(comm):
    path = comm.bcast(tempfile.mkdtemp(prefix="jd_hpc_ordering") if comm.rank == 0 else None)
    yield Path(path)
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


class InOrder(JobDispatcher):
    """Jobs 0 to COUNT - 1, of very different length; the value is what was handed over, in that order."""

    slow_s = 0.05
    bad = BAD
    journal = None

    def run(self):
        return super().run(journal=self.journal)

    def reset(self):
        self.at = self.most_ahead = 0
        self.got, self.failed, self.stored = [], [], []

    def make(self, index):
        return float(index)

    def next_job(self):
        if self.at == COUNT:
            return None
        self.at += 1
        self.most_ahead = max(self.most_ahead, self.at - len(self.got))
        return self.make(self.at - 1)

    def process_job(self, job):
        number = self.number_of(job)
        if number == SLOW:
            time.sleep(self.slow_s)
        if number in self.bad:
            raise ValueError("bad")
        return job

    def number_of(self, job):
        return int(job)

    def process_result(self, index, job, result):
        assert index == len(self.got)
        assert same(job, self.make(index))
        assert same(result, self.make(index))
        self.got.append(index)
        if self.from_journal:
            self.stored.append(index)

    def process_failure(self, index, job, error):
        assert index == len(self.got)
        assert same(job, self.make(index))
        self.got.append(index)
        self.failed.append(index)

    def postprocess(self):
        return self.got, self.failed, self.stored, self.most_ahead


class Rows(InOrder):
    job_dtype = result_dtype = "f8"

    def make(self, index):
        return np.float64(index)


class LargeRows(InOrder):
    job_dtype = result_dtype = ("f8", 3000)

    def make(self, index):
        return np.full(3000, float(index))

    def number_of(self, job):
        return int(job[0])


class Blocks(Rows):
    def next_jobs(self, count):
        begin, self.at = self.at, min(self.at + count, COUNT)
        self.most_ahead = max(self.most_ahead, self.at - len(self.got))
        return np.arange(begin, self.at, dtype="f8") if begin < self.at else None

    def process_results(self, indices, jobs, results):
        assert not jobs.flags.writeable
        assert not results.flags.writeable
        for index, job, result in zip(indices.tolist(), jobs, results, strict=True):
            self.process_result(index, job, result)


class ObjectBlocks(InOrder):
    def process_results(self, indices, jobs, results):
        for index, job, result in zip(indices.tolist(), jobs, results, strict=True):
            self.process_result(index, job, result)


KINDS = [InOrder, Rows, LargeRows, Blocks, ObjectBlocks]
ALL = list(range(COUNT))


def check_history(path, comm, **counts):
    with everywhere(comm):
        if comm.rank == 0:
            done = check_file(str(path))[-1]
            assert done.violations == []
            assert {name: done.counts[name] for name in counts} == counts


@pytest.mark.parametrize("options", [{}, {"isolate": True}], ids=["plain", "isolate"])
@pytest.mark.parametrize("grain", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_jobs_end_in_their_order(comm, folder, kind, grain, options):
    got, failed, *_ = value_of(kind(comm, ordered=True, grain=grain, history=folder / "h", **options), comm)
    assert (got, failed) == (ALL, list(BAD))
    check_history(folder / "h", comm, delivered=COUNT - 3, failed=3)


@pytest.mark.parametrize(("window", "grain", "most"), [(1, 1, 1), (10, 1, 10), (10, 4, 12), (3, 4, 4)])
@pytest.mark.parametrize("kind", [InOrder, Rows, Blocks])
def test_the_window_bounds_what_waits(comm, kind, window, grain, most):
    got, _, _, most_ahead = value_of(kind(comm, ordered=True, window=window, grain=grain), comm)
    assert got == ALL
    assert most_ahead <= most
    if comm.size > 2 and window > grain:
        assert most_ahead == most, "the others work on while one is slow"


@pytest.mark.parametrize("kind", [InOrder, Rows])
def test_the_window_by_default(comm, kind):
    """A job that takes long holds up the fetching, not the run's end."""
    waits = type("Waits", (kind,), {"slow_s": 0.4})
    got, _, _, most_ahead = value_of(waits(comm, ordered=True), comm)
    assert got == ALL
    if comm.size > 2:
        assert most_ahead == 8 * 2 * (comm.size - 1)
    unordered = type("Unordered", (waits,), {"process_result": lambda *_: None, "process_failure": lambda *_: None})
    assert value_of(unordered(comm), comm)[3] == COUNT


class KillsOnce(Rows):
    """Some jobs kill the process of their own that runs them, the first time."""

    folder = ""

    def process_job(self, job):
        if job % 31 == 3:
            try:
                os.close(os.open(f"{self.folder}/{job}", os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        return super().process_job(job)


@pytest.mark.parametrize("grain", [1, 7])
@pytest.mark.parametrize("window", [None, 1])
def test_jobs_that_are_tried_again_come_in_their_turn(comm, folder, grain, window):
    KillsOnce.folder = str(folder)
    options = {"ordered": True, "grain": grain, "window": window, "isolate": True, "history": folder / "h"}
    got, failed, *_ = value_of(KillsOnce(comm, **options), comm)
    assert (got, failed) == (ALL, list(BAD))
    check_history(folder / "h", comm, delivered=COUNT - 3, failed=3)


class Raises(InOrder):
    process_failure = JobDispatcher.process_failure

    def process_job(self, job):
        if job == 1:
            time.sleep(0.1)
        return super().process_job(job)

    def process_result(self, index, job, result):
        super().process_result(index, job, result)
        assert index < BAD[0]


def test_the_first_failure_in_order_ends_the_run(comm):
    error = error_of(Raises(comm, ordered=True), comm)
    assert isinstance(error, JobError)
    assert error.index == BAD[0]
    check_healthy(comm)


@pytest.mark.parametrize("grain", [1, 7])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_is_in_order_too(comm, folder, kind, window, grain):
    """The first run lacks the bad jobs: what is stored behind them waits, for the computed ones too."""
    options = {"ordered": True, "grain": grain, "window": window}
    first = kind(comm, **options)
    first.journal = folder / "a.journal"
    assert value_of(first, comm)[:2] == (ALL, list(BAD))
    second = type("Healed", (kind,), {"bad": BAD[:1], "slow_s": 0})(comm, history=folder / "h", **options)
    second.journal = folder / "a.journal"
    got, failed, stored, most_ahead = value_of(second, comm)
    assert (got, failed) == (ALL, [BAD[0]])
    assert stored == [index for index in ALL if index not in BAD]
    if window is not None:
        assert most_ahead < window + grain
    check_history(folder / "h", comm, stored=COUNT - 3, delivered=2, failed=1)


class Interrupted(InOrder):
    """The run is drained while job 20 runs, which is cut off; the others have come in by then."""

    bad = ()
    slow_s = 1.0

    def next_job(self):
        job = super().next_job()
        if job is not None and job > SLOW + 10 and not self.told:
            self.told = True
            os.kill(os.getpid(), signal.SIGUSR2)
        return job

    def reset(self):
        super().reset()
        self.told = False

    def process_job(self, job):
        time.sleep(0.001)
        return super().process_job(job)


def test_a_drained_run_hands_over_what_it_can(comm, folder):
    """Drained by a signal: what runs may end, so all that was sent is handed over."""
    dispatcher = Interrupted(comm, ordered=True, history=folder / "h")
    dispatcher.journal = folder / "a.journal"
    outcomes = run(dispatcher, comm)
    assert all(isinstance(outcome.error, Unfinished) for outcome in outcomes)
    got, error = comm.bcast((getattr(dispatcher, "got", None), outcomes[0].error))
    assert got == list(range(len(got)))
    assert error.ended == len(got)
    assert SLOW < len(got) < COUNT
    check_history(folder / "h", comm, delivered=len(got))
    again = type("Again", (Interrupted,), {"slow_s": 0, "next_job": InOrder.next_job})(comm, ordered=True)
    again.journal = folder / "a.journal"
    assert value_of(again, comm)[:3] == (ALL, [], got)


class TooLong(InOrder):
    """isolate lets a job be cut off at the hard end, without a rank lost."""

    bad = ()
    slow_s = 30.0


def test_what_came_in_behind_a_job_that_is_cut_off_is_in_the_journal(comm, folder):
    if comm.size < 3:
        return  # nothing comes in behind it
    end = time.monotonic() + 2.5
    options = {"ordered": True, "isolate": True, "walltime": lambda: end - time.monotonic(), "walltime_margin_s": 0}
    dispatcher = TooLong(comm, history=folder / "h", **options)
    dispatcher.journal = folder / "a.journal"
    outcomes = run(dispatcher, comm)
    assert all(isinstance(outcome.error, Unfinished) for outcome in outcomes), outcomes
    error = outcomes[0].error
    got, asked = comm.bcast((getattr(dispatcher, "got", None), getattr(dispatcher, "at", None)))
    assert got == list(range(SLOW))
    assert (error.ended, error.ended + error.put_back + error.cut_off) == (SLOW, asked)
    assert error.cut_off >= 1
    check_history(folder / "h", comm, delivered=SLOW)
    again = type("Again", (TooLong,), {"slow_s": 0})(comm, ordered=True)
    again.journal = folder / "a.journal"
    got, failed, stored, _ = value_of(again, comm)
    assert (got, failed) == (ALL, [])
    assert len(stored) == asked - error.cut_off, "what came in was kept, though no hook had had it"
    assert stored[:SLOW] == list(range(SLOW))

"""Histories of real runs: the checker finds nothing wrong, whatever the payloads and hooks are, and the counts are right."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from mpi_helpers import BigObjects, BigRows, Endless, SmallRows, Sweep, Tolerant, error_of, everywhere, value_of

from jd_hpc import HistoryError, check

pytestmark = pytest.mark.mpi


class Blocks(SmallRows):
    def next_jobs(self, count):
        block = self.job_list[self.at : self.at + count]
        self.at += len(block)
        return np.array(block, "f8") if block else None

    def process_jobs(self, jobs, results):
        results[:] = jobs * 3

    def process_results(self, indices, jobs, results):
        self.results.update(zip(indices.tolist(), results.tolist(), strict=True))


class Fails(Tolerant):
    def process_job(self, job):
        if job % 7 == 3:
            raise ValueError("planted")
        return job


class FailsInBlocks(Blocks):
    process_failure = Tolerant.process_failure

    def process_jobs(self, jobs, results):
        if (jobs % 7 == 3).any():
            raise ValueError("planted")
        results[:] = jobs


class Dies(Tolerant):
    """Under isolate: a job that always ends its process."""

    def process_job(self, job):
        if job == 5:
            os._exit(3)
        return job


@pytest.fixture
def path(comm):
    """A file that is not there yet, the same on all ranks."""
    folder = comm.bcast(tempfile.mkdtemp(prefix="jd_hpc_history") if comm.rank == 0 else None)
    path = Path(folder, "history.jsonl")
    yield path
    comm.Barrier()
    if comm.rank == 0:
        path.unlink(missing_ok=True)
        Path(folder).rmdir()


def verdicts(path, comm):
    """What the checker says, on every rank."""
    runs = check.check_file(str(path)) if comm.rank == 0 else None
    runs = comm.bcast(runs)
    assert [run.violations for run in runs] == [[]] * len(runs)
    return runs


@pytest.mark.parametrize("grain", [1, 3, 100])
@pytest.mark.parametrize("kind", [Sweep, SmallRows, Blocks])
def test_small_jobs(comm, path, kind, grain):
    dispatcher = kind([float(number) for number in range(2000)], comm, grain=grain, history=path)
    for _ in range(2):
        assert len(value_of(dispatcher, comm)[0]) == 2000
    for run in verdicts(path, comm):
        assert (run.how, run.sent_jobs, run.counts["delivered"], run.counts["failed"]) == ("ok", 2000, 2000, 0)
        assert run.counts["accepted"] == run.counts["sent"] == -(-2000 // grain)
        if comm.size > 1:
            assert 1 <= run.counts["up"] <= comm.size - 1
            assert sorted(rank for ranks in run.begin["hosts"].values() for rank in ranks) == list(range(comm.size))


@pytest.mark.parametrize(("kind", "job"), [(BigObjects, np.zeros(9000)), (BigRows, np.zeros(5000))])
def test_large_jobs(comm, path, kind, job):
    value_of(kind([job] * 40, comm, grain=3, history=path), comm)
    (run,) = verdicts(path, comm)
    assert (run.how, run.counts["delivered"]) == ("ok", 40)


@pytest.mark.parametrize("kind", [Fails, FailsInBlocks])
@pytest.mark.parametrize("grain", [1, 10])
def test_failures(comm, path, kind, grain):
    results, failures = value_of(kind([float(number) for number in range(100)], comm, grain=grain, history=path), comm)
    (run,) = verdicts(path, comm)
    assert (run.counts["delivered"], run.counts["failed"]) == (len(results), len(failures))
    assert len(failures) >= 14


@pytest.mark.parametrize("grain", [1, 4])
def test_processes_that_die(comm, path, grain):
    failures = value_of(Dies(list(range(20)), comm, grain=grain, isolate=True, history=path), comm)[1]
    assert list(failures) == [5]
    (run,) = verdicts(path, comm)
    assert (run.how, run.counts["delivered"], run.counts["failed"], run.counts["again"]) == ("ok", 19, 1, 2)


def test_the_master_alone(comm, path):
    """With fewer slaves than min_slaves it runs everything itself."""
    assert len(value_of(SmallRows([1.0] * 100, comm, min_slaves=comm.size, history=path), comm)[0]) == 100
    (run,) = verdicts(path, comm)
    assert (run.begin["slaves"], run.counts["up"], run.counts["delivered"]) == (0, 0, 100)


def test_a_run_that_ends_by_an_exception(comm, path):
    class Stops(Endless):
        def process_result(self, index, job, result):
            if index == 50:
                raise OSError("planted")

    assert str(error_of(Stops(comm, history=path), comm)) == "planted"
    (run,) = verdicts(path, comm)
    assert run.how == "OSError: planted"
    assert run.counts["delivered"] >= 1
    assert run.sent_jobs == run.counts["delivered"] + run.left_jobs


def test_a_path_that_cannot_be_written(comm, path):
    error = error_of(Sweep([1, 2, 3], comm, history=path / "no" / "file"), comm)
    with everywhere(comm):
        assert isinstance(error, HistoryError)
        assert "cannot be written: No such file or directory. Cure: name a file that can be" in str(error)
    assert len(value_of(Sweep([1, 2, 3], comm, history=path), comm)[0]) == 3
    assert len(verdicts(path, comm)) == 1

"""Random streams on real ranks: the numbers do not depend on how many there are, nor on what becomes of them."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
from mpi_helpers import Sweep, Tolerant, error_of, same, value_of

from jd_hpc import RanksDisagreeError
from jd_hpc.streams import stream

pytestmark = pytest.mark.mpi

COUNT = 60


@pytest.fixture
def folder(comm):
    path = comm.bcast(tempfile.mkdtemp(prefix="jd_hpc_streams") if comm.rank == 0 else None)
    yield path
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


class Drawn(Sweep):
    job_dtype = "f8"
    result_dtype = ("f8", 3)

    def process_job(self, job, rng):
        return rng.standard_normal(3) + job


class DrawnObjects(Drawn):
    job_dtype = result_dtype = None


class DrawnBlocks(Drawn):
    def process_jobs(self, jobs, results):
        for at, job in enumerate(jobs):
            results[at] = self.process_job(job, self.rng(self.first_index + at))


class DrawnObjectBlocks(DrawnBlocks):
    job_dtype = result_dtype = None


def expected(seed):
    return {index: stream(seed, index).standard_normal(3) + index for index in range(COUNT)}


def check(dispatcher, comm, seed):
    results, failures = value_of(dispatcher, comm)
    assert failures == {}
    assert sorted(results) == list(range(COUNT))
    assert all(same(results[index], value) for index, value in expected(seed).items())


JOBS = [float(i) for i in range(COUNT)]


@pytest.mark.parametrize("options", [{}, {"isolate": True}, {"min_slaves": 99}], ids=["plain", "isolate", "the master alone"])
@pytest.mark.parametrize("grain", [1, 7])
@pytest.mark.parametrize("kind", [Drawn, DrawnObjects, DrawnBlocks, DrawnObjectBlocks])
def test_the_same_numbers_on_any_ranks(comm, kind, grain, options):
    check(kind(JOBS, comm, rng=True, seed=21, grain=grain, **options), comm, 21)


class DiesOnce(Tolerant, Drawn):
    """Some jobs kill their process once, after they have drawn."""

    folder = ""

    def process_job(self, job, rng):
        result = super().process_job(job, rng)
        if job % 13 == 5:
            try:
                os.close(os.open(f"{self.folder}/{job}", os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        return result


@pytest.mark.parametrize("grain", [1, 7])
def test_jobs_that_are_tried_again_draw_the_same(comm, folder, grain):
    DiesOnce.folder = folder
    check(DiesOnce(JOBS, comm, rng=True, seed=8, grain=grain, isolate=True), comm, 8)
    assert len(list(Path(folder).iterdir())) == 5


class DrawsOnEveryRank(Sweep):
    job_dtype = result_dtype = "f8"

    def process_job(self, job):
        return self.rng(7).random()

    def process_result(self, index, job, result):
        assert result == self.rng(7).random()
        super().process_result(index, job, result)


def test_every_rank_can_make_any_stream(comm):
    results, _ = value_of(DrawsOnEveryRank(JOBS, comm, seed=2), comm)
    assert set(results.values()) == {stream(2, 7).random()}


@pytest.mark.parametrize("options", [("seed", 0, 1), ("rng", True, False)], ids=lambda option: option[0])
def test_ranks_that_disagree(comm, options):
    name, here, there = options
    if comm.size == 1:
        return  # nobody to disagree
    error = error_of(Drawn(JOBS, comm, **{"rng": True, name: here if comm.rank == 0 else there}), comm)
    assert isinstance(error, RanksDisagreeError)
    assert f"{name} is {there} there and {here} here" in str(error)


def test_objects_of_the_stream_survive_the_way(comm):
    """A generator can be a result: it goes on where the slave left it."""

    class Sends(Drawn):
        job_dtype = result_dtype = None

        def process_job(self, job, rng):
            return rng.random(), rng

    results, _ = value_of(Sends(JOBS[:5], comm, rng=True, seed=1), comm)
    for index, (first, rng) in results.items():
        again = stream(1, index)
        assert first == again.random()
        assert np.array_equal(rng.random(3), again.random(3))

"""What the MPI tests share.

The rule they keep: every rank executes the same runs and the same assertions, on what was gathered from all ranks. So a test
that fails does so on all ranks at once, and none waits for another one.
"""

from __future__ import annotations

import contextlib
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

from jd_hpc import JobDispatcher, JobError


class Outcome(NamedTuple):
    """What run() returned or raised on a rank."""

    value: Any
    error: BaseException | None


class StandInError(Exception):
    """Takes the place of an exception that cannot be pickled."""


def run(dispatcher: JobDispatcher, comm: MPI.Intracomm) -> list[Outcome]:
    """Run on every rank; return every rank's outcome on every rank."""
    try:
        outcome = Outcome(dispatcher.run(), None)
    except BaseException as error:
        outcome = Outcome(None, portable(error))
    return comm.allgather(outcome)


def portable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return StandInError("".join(traceback.format_exception(error)))
    return error


def value_of(dispatcher: JobDispatcher, comm: MPI.Intracomm) -> Any:
    """Run on every rank, and return to every rank what the master got; nobody may raise, and slaves get None."""
    outcomes = run(dispatcher, comm)
    expect_no_error(outcomes)
    assert [outcome.value for outcome in outcomes[1:]] == [None] * (comm.size - 1)
    return outcomes[0].value


def error_of(dispatcher: JobDispatcher, comm: MPI.Intracomm) -> BaseException:
    """Run on every rank, and return to every rank what the master raised; slaves leave quietly."""
    outcomes = run(dispatcher, comm)
    expect_no_error(outcomes[1:])
    assert outcomes[0].error is not None, f"run() returned {outcomes[0].value!r}"
    return outcomes[0].error


def error_alone(dispatcher: JobDispatcher, kind: type[BaseException]) -> BaseException:
    """Run without a vm, and return what it raises."""
    with pytest.raises(kind) as caught:
        dispatcher.run()
    return caught.value


def expect_no_error(outcomes: Iterable[Outcome]) -> None:
    wrong = ["".join(traceback.format_exception(outcome.error)) for outcome in outcomes if outcome.error is not None]
    assert not wrong, "\n".join(wrong)


@contextlib.contextmanager
def everywhere(comm: MPI.Intracomm) -> Iterator[None]:
    """What fails inside on one rank fails on all of them."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
    texts = comm.allgather(None if error is None else "".join(traceback.format_exception(error)))
    if error is not None:
        raise error
    failed = [f"rank {rank}:\n{text}" for rank, text in enumerate(texts) if text is not None]
    assert not failed, "\n".join(failed)


class Sweep(JobDispatcher):
    """Runs `job_list`; the value of the run is (results, failures), by the jobs' numbers."""

    def __init__(self, job_list: Iterable[Any], vm: Any = None, **options: Any) -> None:
        super().__init__(vm, **options)
        self.job_list = list(job_list)

    def reset(self) -> None:
        self.at = 0
        self.results: dict[int, Any] = {}
        self.failures: dict[int, JobError] = {}

    def next_job(self) -> Any:
        if self.at == len(self.job_list):
            return None
        self.at += 1
        return self.job_list[self.at - 1]

    def process_job(self, job: Any) -> Any:
        return job

    def process_result(self, index: int, job: Any, result: Any) -> None:
        assert index not in self.results, f"job {index} was delivered twice"
        assert index not in self.failures, f"job {index} was delivered after its failure"
        assert same(job, self.job_list[index])
        self.results[index] = result

    def postprocess(self) -> Any:
        return self.results, self.failures


class Tolerant(Sweep):
    """Goes on after failures."""

    def process_failure(self, index: int, job: Any, error: JobError) -> None:
        assert index not in self.results, f"job {index} failed after its result"
        assert index not in self.failures, f"job {index} failed twice"
        self.failures[index] = error


class Endless(Sweep):
    """Has jobs for ever: only an error ends the run."""

    def __init__(self, vm: Any = None, **options: Any) -> None:
        super().__init__([], vm, **options)

    def next_job(self) -> Any:
        return 1

    def process_result(self, index: int, job: Any, result: Any) -> None:
        pass


def same(one: Any, other: Any) -> bool:
    """Whether two jobs or results are the same to the bit, whatever they are made of."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        one, other = np.asarray(one), np.asarray(other)
        if one.dtype.hasobject:
            return one.shape == other.shape and all(map(same, one.ravel().tolist(), other.ravel().tolist()))
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


class BigObjects(Sweep):
    """Jobs and results with bodies: what an earlier run left behind would be mistaken for one of them."""

    def process_job(self, job: Any) -> Any:
        return {"rank": self.machine.rank, "twice": 2 * job}


class BigRows(Sweep):
    job_dtype = ("f8", 5000)
    result_dtype = ("i8", 6000)

    def process_job(self, job: Any) -> Any:
        return np.full(6000, job[0], "i8")


class SmallRows(Sweep):
    job_dtype = "f8"
    result_dtype = "f8"

    def process_job(self, job: Any) -> Any:
        return job * 3


def check_healthy(comm: MPI.Intracomm, salt: float = 1000.0) -> None:
    """Whatever happened before on this communicator, runs of every kind give the right results."""
    salts = salt + np.arange(3 * comm.size)
    objects = value_of(BigObjects([np.full(9000, s) for s in salts], comm), comm)[0]
    assert sorted(objects) == list(range(len(salts)))
    assert all(same(objects[i]["twice"], np.full(9000, 2 * s)) for i, s in enumerate(salts))
    rows = value_of(BigRows([np.full(5000, s) for s in salts], comm), comm)[0]
    assert sorted(rows) == list(range(len(salts)))
    assert all(same(rows[i], np.full(6000, s, "i8")) for i, s in enumerate(salts))
    small = value_of(SmallRows(salts.tolist(), comm), comm)[0]
    assert small == {i: 3 * s for i, s in enumerate(salts)}


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for something that another process does."""
    end = MPI.Wtime() + timeout_s
    while not condition():
        assert MPI.Wtime() < end, "waited in vain"

"""Whatever goes wrong gets one clear error on the master; nothing hangs, nothing is lost, nothing is left for the next run."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import tracemalloc

import numpy as np
import pytest
from mpi_helpers import (
    BigObjects,
    Endless,
    Sweep,
    Tolerant,
    check_healthy,
    error_alone,
    error_of,
    everywhere,
    expect_no_error,
    run,
    same,
    value_of,
)

from jd_hpc import JobError, KernelError, PayloadError, RanksDisagreeError, SlaveError

pytestmark = pytest.mark.mpi


class NotAnException(BaseException):
    """Neither Exception nor one of Python's own."""


class NeedsTwoError(Exception):
    """Pickles, but cannot be rebuilt."""

    def __init__(self, one, two):
        super().__init__(one)


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def local_error():
    class LocalError(Exception):
        """Cannot be pickled."""

    return LocalError("not importable")


def deep():
    return deep()


def chained():
    try:
        raise KeyError("the cause")
    except KeyError as error:
        raise ValueError("the effect") from error


def raise_it(error):
    raise error


FAULTS = {
    "ValueError": lambda: raise_it(ValueError("a plain one")),
    "chained": chained,
    "BaseException": lambda: raise_it(NotAnException("a plain one")),
    "SystemExit": lambda: raise_it(SystemExit("a plain one")),
    "SystemExit(0)": lambda: raise_it(SystemExit(0)),
    "GeneratorExit": lambda: raise_it(GeneratorExit("a plain one")),
    "StopIteration": lambda: next(iter(())),
    "ZeroDivisionError": lambda: 1 / 0,
    "RecursionError": deep,
    "MemoryError": lambda: bytearray(1 << 60),
    "unpicklable": lambda: raise_it(local_error()),
    "not to be rebuilt": lambda: raise_it(NeedsTwoError("a plain one", 2)),
    "unprintable": lambda: raise_it(UnprintableError()),
    "group": lambda: raise_it(ExceptionGroup("many", [ValueError(1), TypeError("2")])),
    "surrogate": lambda: raise_it(ValueError("\udc80\0")),
    "large message": lambda: raise_it(ValueError("x" * 200_000)),
    "large payload": lambda: raise_it(NeedsTwoError(np.zeros(1 << 18), 2)),
}


class Faulty(Tolerant):
    fault = "ValueError"

    def process_job(self, job):
        if int(np.ravel(job)[0]) % 3 == 1:
            FAULTS[self.fault]()
        return job


class FaultyRows(Faulty):
    job_dtype = result_dtype = "f8"


class FaultyLargeRows(Faulty):
    job_dtype = result_dtype = ("f8", 1000)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_job_that_raises_fails_alone(comm, fault):
    for kind in (Faulty, FaultyRows, FaultyLargeRows):
        jobs = [np.full(1000, float(i)) if kind is FaultyLargeRows else float(i) for i in range(12)]
        for options in ({}, {"grain": 5}, {"max_slaves": 0}):
            dispatcher = kind(jobs, comm, **options)
            dispatcher.fault = fault
            outcomes = run(dispatcher, comm)
            expect_no_error(outcomes)
            results, failures = outcomes[0].value
            assert sorted(results) == [i for i in range(12) if i % 3 != 1]
            assert all(same(results[i], np.asarray(jobs[i])) for i in results)
            assert sorted(failures) == [1, 4, 7, 10]
            for index, error in failures.items():
                assert isinstance(error, JobError)
                assert error.index == index
                assert (1 <= error.slave < comm.size) if comm.size > 1 and "max_slaves" not in options else error.slave == 0
                assert "process_job" in error.remote_traceback
                assert error.type_name in str(error)
                assert error.remote_traceback in str(error)
    check_healthy(comm)


def test_the_original_exception_is_the_cause(comm):
    class Causes(Tolerant):
        def process_job(self, job):
            raise_it((ValueError("a", 1), local_error(), NeedsTwoError(1, 2), OSError(2, "gone", "file"))[job])

        def process_failure(self, index, job, error):
            self.failures[index] = type(error.__cause__).__name__, getattr(error.__cause__, "args", None)

    causes = value_of(Causes(range(4), comm), comm)[1]
    assert causes == {
        0: ("ValueError", ("a", 1)), 1: ("NoneType", None), 2: ("NoneType", None), 3: ("FileNotFoundError", (2, "gone")),
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"grain": 4}, {"max_slaves": 0}], ids=str)
@pytest.mark.parametrize("kind", [Faulty, FaultyRows, FaultyLargeRows])
def test_default_raises_after_all_left(comm, kind, options):
    class Default(kind):
        process_failure = Sweep.process_failure

    jobs = [np.full(1000, float(i)) if kind is FaultyLargeRows else float(i) for i in range(200)]
    error = error_of(Default(jobs, comm, **options), comm)
    assert isinstance(error, JobError)
    assert error.index % 3 == 1
    assert error.type_name == "ValueError"
    assert error.message == "a plain one"
    assert f"job {error.index} failed on " in str(error)
    assert "in process_job" in str(error)
    check_healthy(comm)


def test_a_block_fails_as_a_whole(comm):
    class Blocks(Tolerant):
        def process_jobs(self, jobs, results):
            results[:] = jobs
            if 10 in jobs:
                raise ValueError("ten")

    results, failures = value_of(Blocks(range(30), comm, grain=6), comm)
    assert sorted(results | failures) == list(range(30))
    assert 10 in failures
    assert len(failures) <= 6
    assert all(error.message == "ten" for error in failures.values())


def test_large_failures(comm):
    """Whatever the report of a failure would take, it arrives, and names the cause."""

    class ManyAtOnce(Sweep):
        job_dtype = result_dtype = "f8"

        def process_jobs(self, jobs, results):
            raise ValueError("y" * 1000)

    class Carries(Sweep):
        def process_job(self, job):
            raise NeedsTwoError(np.zeros(10 << 20), 2)

    begin = time.monotonic()
    error = error_of(ManyAtOnce(range(40_000), comm, grain=40_000), comm)
    assert isinstance(error, JobError), error
    assert error.message == "y" * 1000
    assert "in process_jobs" in error.remote_traceback
    error = error_of(Carries([1], comm), comm)
    assert isinstance(error, JobError), error
    assert error.type_name == "NeedsTwoError"
    assert comm.allgather(time.monotonic() - begin < 10) == [True] * comm.size
    check_healthy(comm)


@pytest.mark.parametrize("change", [lambda r: r.append(1), lambda r: r.pop(), lambda r: r.clear()], ids=["append", "pop", "clear"])
def test_results_of_another_length(comm, change):
    class Resized(Tolerant):
        def process_jobs(self, jobs, results):
            change(results)

    results, failures = value_of(Resized(range(6), comm, grain=2), comm)
    assert results == {}
    assert sorted(failures) == list(range(6))
    assert all("length of results" in error.message for error in failures.values())
    check_healthy(comm)


# ---- hooks of the master ----------------------------------------------------------------------------------------------


class OwnError(Exception):
    pass


HOOKS = [
    "on_startup", "reset", "next_job", "next_jobs", "on_slave_started", "on_job_sent", "on_result", "on_slave_idle",
    "process_result", "process_results", "process_failure", "postprocess", "on_shutdown",
]  # fmt: skip


CALLED_ONCE = ["on_startup", "reset", "postprocess", "on_shutdown", "on_slave_started", "on_slave_idle"]


def with_broken_hook(base, name, error, call):
    """Derive from `base`; the hook `name` raises on the master at its `call`-th call."""
    calls = []

    def broken(self, *args):
        if self.machine.rank > 0:
            return None
        calls.append(args)
        if len(calls) == call:
            raise error
        if name == "next_jobs":
            return [job for job in (self.next_job() for _ in range(args[0])) if job is not None]
        return getattr(super(kind, self), name)(*args) if name != "process_results" else None

    kind = type("Broken", (base,), {name: broken})
    return kind


class HasFailures(Sweep):
    """Enough jobs for every hook to be called often; some fail."""

    def __init__(self, vm, **options):
        super().__init__(range(60), vm, **options)

    def process_job(self, job):
        if job % 4 == 2:
            raise ValueError("a failure that may be")
        return job

    def process_failure(self, index, job, error):
        pass


class HasFailuresRows(HasFailures):
    job_dtype = result_dtype = "f8"


class HasLargeResults(HasFailures):
    def process_job(self, job):
        super().process_job(job)
        return np.full(20_000, job)


@pytest.mark.parametrize("kind", [HasFailures, HasFailuresRows, HasLargeResults])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_of_the_master_that_raises(comm, hook, kind):
    if comm.size == 1 and hook in ("on_slave_started", "on_job_sent", "on_result", "on_slave_idle"):
        return  # there are no slaves to speak of
    for error in (OwnError("own"), SystemExit(3), NotAnException("own"), KeyboardInterrupt("own")):
        for call in (1,) if hook in CALLED_ONCE else (1, 5):
            dispatcher = with_broken_hook(kind, hook, error, call)(comm, credit=4)
            found = error_of(dispatcher, comm)
            assert type(found) is type(error)
            assert found.args == error.args
    check_healthy(comm)


def test_a_hook_raises_while_many_messages_wait(comm):
    """All that had come in when the hook raised must not be forgotten, or the end of the run is not heard."""

    class Waits(Endless):
        size = 1
        slow = "on_job_sent"

        def process_job(self, job):
            return bytes(self.size)

        def next_jobs(self, count):
            return [1] * count

        def on_job_sent(self, slave, index):
            if index == 8 * (comm.size - 1) - 1:
                time.sleep(0.3)

        def on_result(self, slave, index):
            raise OwnError("own")

        def process_result(self, index, job, result):
            raise OwnError("own")  # locally

    class Rows(Waits):
        job_dtype = "f8"
        result_dtype = "S1"

        def process_job(self, job):
            return b"x"

    for size in (1, 3000, 200_000):
        dispatcher = Waits(comm, credit=8)
        dispatcher.size = size
        assert isinstance(error_of(dispatcher, comm), OwnError)
        check_healthy(comm)
    assert isinstance(error_of(Rows(comm, credit=8), comm), OwnError)
    check_healthy(comm)


def test_shutdown_is_called_when_the_run_fails(comm):
    class Fails(Sweep):
        calls = ""

        def on_startup(self):
            self.calls += "u"

        def on_shutdown(self):
            self.calls += "d"

        def process_job(self, job):
            raise ValueError("fails")

    dispatcher = Fails([1, 2, 3], comm)
    for runs in (1, 2):
        assert isinstance(error_of(dispatcher, comm), JobError)
        assert comm.allgather(dispatcher.calls) == ["ud" * runs] * comm.size


def test_slaves_in_a_long_job_leave_too(comm):
    class Long(Sweep):
        def process_job(self, job):
            if job == 0:
                raise ValueError("at once")
            time.sleep(0.5)

    dispatcher = Long(range(20), comm)
    for _ in range(2):
        begin = time.monotonic()
        assert isinstance(error_of(dispatcher, comm), JobError)
        assert comm.allgather(time.monotonic() - begin < 3.0) == [True] * comm.size
    check_healthy(comm)


# ---- bad input --------------------------------------------------------------------------------------------------------


class Bad(Sweep):
    """Base of the bad ones: five good jobs and then `bad_job`, or a bad result for it."""

    good_job = 1.0
    bad_job = 1.0
    bad_result = None

    def __init__(self, vm, **options):
        super().__init__([self.good_job] * 5 + [self.bad_job] + [self.good_job] * 20, vm, **options)
        self.bad_count = 0

    def process_job(self, job):
        self.bad_count += 1
        if self.bad_count == 3 and type(self).bad_result is not None:
            return self.bad_result()
        return self.good_result

    def process_result(self, index, job, result):
        self.results[index] = result

    good_result = 1.0


class BadRows(Bad):
    job_dtype = result_dtype = "f8"


def bad(base=BadRows, **body):
    return type("BadOne", (base,), body)


class Sealed:
    def __reduce__(self):
        raise TypeError("sealed for ever")


class Exits:
    def __reduce__(self):
        raise SystemExit("no way to pickle")


BAD_JOBS = {
    "wrong shape": (bad(bad_job=[1.0, 2.0]), ["next_job", "shape (2,)", "declare"]),
    "too short": (
        bad(job_dtype=("f8", 3), good_job=[1.0, 2.0, 3.0], bad_job=[1.0, 2.0]),
        ["next_job", "shape (2,)", "(3,)", "declare"],
    ),
    "a scalar for a row": (bad(job_dtype=("f8", 3), good_job=[1.0, 2.0, 3.0], bad_job=1.0), ["next_job", "shape ()", "(3,)"]),
    "complex for float": (bad(bad_job=1j), ["next_job", "complex128", "float64", "convert"]),
    "float for int": (bad(job_dtype="i8", good_job=1, bad_job=1.5), ["next_job", "float64", "int64", "convert"]),
    "text for float": (bad(bad_job="text"), ["next_job", "float64", "convert"]),
    "object for float": (bad(bad_job=object()), ["next_job", "object", "float64"]),
    "too large for int8": (bad(job_dtype="i1", good_job=1, bad_job=300), ["next_job", "300", "int8"]),
    "negative for unsigned": (
        bad(job_dtype="u1", good_job=np.uint8(1), bad_job=np.int8(-1)),
        ["next_job", "int8", "uint8"],
    ),
    "text too long": (bad(job_dtype="S3", good_job=b"abc", bad_job=b"abcd"), ["next_job", "S3"]),
    "ragged": (bad(job_dtype=("f8", (2, 2)), good_job=np.eye(2), bad_job=[[1], [1, 2]]), ["next_job", "array"]),
    "record too short": (bad(job_dtype="f8,f8", good_job=(1.0, 2.0), bad_job=(1.0,)), ["next_job", "2 fields"]),
    "record with a bad field": (bad(job_dtype="f8,i4", good_job=(1.0, 2), bad_job=(1.0, 2.5)), ["next_job", "f1", "int32"]),
    "NaN": (bad(allow_nan=False, bad_job=float("nan")), ["next_job", "NaN", "allow_nan"]),
    "NaN in a record": (
        bad(allow_nan=False, job_dtype=[("a", "f8", 2), ("b", "i4")], good_job=([1, 2], 3), bad_job=([1, float("nan")], 3)),
        ["next_job", "NaN", "allow_nan"],
    ),
}  # fmt: skip
BAD_OBJECT_JOBS = {
    "a lambda": (bad(Bad, bad_job=lambda: 1), ["next_job", "cannot be pickled", "lambda"]),
    "a lock": (bad(Bad, bad_job=[threading.Lock()]), ["next_job", "cannot be pickled", "lock"]),
    "a generator": (bad(Bad, bad_job=(i for i in ())), ["next_job", "cannot be pickled", "generator"]),
    "sealed": (bad(Bad, bad_job=Sealed()), ["next_job", "cannot be pickled", "sealed for ever"]),
    "over the limit": (bad(Bad, payload_limit=5000, bad_job=bytes(5000)), ["next_job", "payload_limit = 5000"]),
    "array over the limit": (bad(Bad, payload_limit=5000, bad_job=np.zeros(5000)), ["next_job", "payload_limit = 5000"]),
}


@pytest.mark.parametrize("grain", [1, 3])
@pytest.mark.parametrize("name", BAD_JOBS)
def test_bad_jobs(comm, name, grain):
    kind, words = BAD_JOBS[name]
    for vm, options in ((comm, {}), (comm, {"max_slaves": 0}), (None, {})):
        dispatcher = kind(vm, grain=grain, **options)
        error = error_of(dispatcher, comm) if vm else error_alone(dispatcher, PayloadError)
        assert isinstance(error, PayloadError), error
        text = str(error) + str(getattr(error, "__notes__", ""))
        for word in words:
            assert word in text
        if "NaN" not in name:
            assert "job 5" in text
    check_healthy(comm)


@pytest.mark.parametrize("grain", [1, 3])
@pytest.mark.parametrize("name", BAD_OBJECT_JOBS)
def test_bad_object_jobs(comm, name, grain):
    if comm.size == 1:
        return  # nothing travels
    kind, words = BAD_OBJECT_JOBS[name]
    error = error_of(kind(comm, grain=grain), comm)
    assert isinstance(error, PayloadError), error
    text = str(error) + str(getattr(error, "__notes__", ""))
    for word in words:
        assert word in text
    assert f"job {5 if grain == 1 else 3}" in text
    check_healthy(comm)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (np.zeros((2, 3)), ["shape (2, 3)"]),
        (np.zeros(2, "c16"), ["complex128"]),
        ([1.0, "x"], ["float64"]),
        ([1.0, [2.0]], ["array"]),
        (np.array([1.0, np.nan]), ["NaN", "allow_nan"]),
    ],
    ids=["shape", "complex", "text", "ragged", "NaN"],
)
def test_bad_blocks_of_jobs(comm, block, words):
    class Blocks(Bad):
        job_dtype = result_dtype = "f8"
        allow_nan = False

        def next_jobs(self, count):
            return block

    for vm in (comm, None):
        error = error_of(Blocks(vm, grain=2), comm) if vm else error_alone(Blocks(None, grain=2), PayloadError)
        assert isinstance(error, PayloadError), error
        assert all(word in str(error) for word in ["next_job", *words])
    check_healthy(comm)


BAD_RESULTS = {
    "wrong shape": (bad(bad_result=lambda self: [1.0, 2.0]), ["process_job", "shape (2,)", "declare"]),
    "nothing": (bad(bad_result=lambda self: np.array([])), ["process_job", "shape (0,)"]),
    "None": (bad(bad_result=lambda self: np.array(None)), ["process_job", "object", "float64"]),
    "complex for float": (bad(bad_result=lambda self: 1j), ["process_job", "complex128", "float64", "convert"]),
    "too large for int8": (bad(result_dtype="i1", good_result=1, bad_result=lambda self: 300), ["process_job", "300", "int8"]),
    "text too long": (bad(result_dtype="S3", good_result=b"abc", bad_result=lambda self: b"abcd"), ["process_job", "S3"]),
    "time too fine": (
        bad(result_dtype="M8[s]", good_result=np.datetime64(1, "s"), bad_result=lambda self: np.datetime64(1500, "ms")),
        ["process_job", "datetime64[s]"],
    ),
    "NaN": (bad(allow_nan=False, bad_result=lambda self: float("nan")), ["NaN", "allow_nan"]),
    "complex NaN": (
        bad(allow_nan=False, result_dtype="c16", bad_result=lambda self: complex(0, float("nan"))),
        ["NaN", "allow_nan"],
    ),
    "NaN in a record": (
        bad(allow_nan=False, result_dtype="f4,f8", good_result=(1.0, 2.0), bad_result=lambda self: (1.0, float("nan"))),
        ["NaN", "allow_nan"],
    ),
}  # fmt: skip
BAD_OBJECT_RESULTS = {
    "a lambda": (bad(Bad, bad_result=lambda self: lambda: 1), ["process_job", "cannot be pickled", "lambda"]),
    "a lock": (bad(Bad, bad_result=lambda self: [threading.Lock()]), ["process_job", "cannot be pickled", "lock"]),
    "sealed": (bad(Bad, bad_result=lambda self: Sealed()), ["process_job", "cannot be pickled", "sealed for ever"]),
    "exits": (bad(Bad, bad_result=lambda self: Exits()), ["process_job", "no way to pickle"]),
    "over the limit": (
        bad(Bad, payload_limit=5000, bad_result=lambda self: os.urandom(5000)),
        ["process_job", "payload_limit = 5000"],
    ),
    "array over the limit": (
        bad(Bad, payload_limit=5000, bad_result=lambda self: np.zeros(999)),
        ["process_job", "payload_limit = 5000"],
    ),
}  # fmt: skip


def check_bad_result(comm, kind, words, **options):
    """The bad result fails its job, by default the run; every good one is delivered."""
    error = error_of(kind(comm, **options), comm)
    assert isinstance(error, JobError), error
    assert error.type_name in ("PayloadError", "SystemExit")
    for word in words:
        assert word in str(error)
    assert error.remote_traceback

    tolerant = type("TolerantOne", (kind,), {"process_failure": Tolerant.process_failure})
    results, failures = value_of(tolerant(comm, **options), comm)
    assert sorted([*results, *failures]) == list(range(26))
    bad_ones = max(1, comm.size - 1) if "max_slaves" not in options else 1
    assert 1 <= len(failures) <= bad_ones
    assert all(same(result, np.asarray(kind.good_result, kind.result_dtype)[()]) for result in results.values())
    check_healthy(comm)


@pytest.mark.parametrize("grain", [1, 3])
@pytest.mark.parametrize("name", BAD_RESULTS)
def test_bad_results(comm, name, grain):
    check_bad_result(comm, *BAD_RESULTS[name], grain=grain)
    check_bad_result(comm, *BAD_RESULTS[name], grain=grain, max_slaves=0)


@pytest.mark.parametrize("grain", [1, 3])
@pytest.mark.parametrize("name", BAD_OBJECT_RESULTS)
def test_bad_object_results(comm, name, grain):
    if comm.size == 1:
        return  # nothing travels
    check_bad_result(comm, *BAD_OBJECT_RESULTS[name], grain=grain)


def test_small_results_that_are_too_large_together(comm):
    class Together(Tolerant):
        payload_limit = 10_000

        def process_job(self, job):
            return os.urandom(4000)

    if comm.size == 1:
        return  # nothing travels
    results, failures = value_of(Together(range(12), comm, grain=4), comm)
    assert sorted([*results, *failures]) == list(range(12))
    assert all("payload_limit = 10000" in str(error) for error in failures.values())
    check_healthy(comm)


@pytest.mark.parametrize("large", ["job", "result"])
@pytest.mark.parametrize("grain", [1, 10])
def test_rows_over_the_limit(comm, large, grain):
    class TooLarge(Sweep):
        payload_limit = 5000
        job_dtype = ("f8", 1000 if large == "job" else 1)
        result_dtype = ("f8", 1000 if large == "result" else 1)

        def process_job(self, job):
            return np.zeros(1000 if large == "result" else 1)

    if comm.size == 1:
        return  # nothing travels
    outcomes = run(TooLarge([np.zeros(1000 if large == "job" else 1)] * 30, comm, grain=grain), comm)
    assert "payload_limit = 5000" in str(outcomes[0].error)
    assert "raise payload_limit" in str(outcomes[0].error)
    check_healthy(comm)


@pytest.mark.parametrize("limit", [200, 1000, 3000])
def test_failures_are_reported_whatever_the_limit(comm, limit):
    class Fails(Tolerant):
        payload_limit = limit

        def process_job(self, job):
            raise ValueError("why " * 1000)

    results, failures = value_of(Fails(range(5), comm), comm)
    assert results == {}
    assert sorted(failures) == list(range(5))
    assert all("why why" in error.message for error in failures.values())
    if comm.size > 1:
        outcomes = run(StartsBadly(comm, 1, payload_limit=limit), comm)
        assert isinstance(outcomes[0].error, SlaveError)
        assert "cannot start" in str(outcomes[0].error)
    check_healthy(comm)


# ---- pickles that cannot be read --------------------------------------------------------------------------------------


def explode(kind, size):
    raise kind("cannot be read here")


class Bomb:
    """Pickles well, and raises when it is rebuilt."""

    def __init__(self, kind, size=0):
        self.kind, self.size = kind, size

    def __reduce__(self):
        return explode, (self.kind, bytes(self.size))


@pytest.mark.parametrize("size", [0, 10_000])
@pytest.mark.parametrize("kind", [ValueError, NotAnException, SystemExit])
@pytest.mark.parametrize("grain", [1, 3])
def test_a_result_that_cannot_be_read_on_the_master(comm, kind, grain, size):
    class Bombs(Sweep):
        def process_job(self, job):
            return Bomb(kind, size) if job == 4 else job

    class TolerantBombs(Bombs):
        process_failure = Tolerant.process_failure

    if comm.size == 1:
        return  # nothing travels
    error = error_of(Bombs(range(12), comm, grain=grain), comm)
    assert isinstance(error, JobError), error
    assert error.type_name == kind.__name__
    assert "cannot be read here" in str(error)
    assert "explode" in error.remote_traceback
    results, failures = value_of(TolerantBombs(range(12), comm, grain=grain), comm)
    assert sorted([*results, *failures]) == list(range(12))
    assert 4 in failures
    assert len(failures) <= grain
    check_healthy(comm)


@pytest.mark.parametrize("size", [0, 10_000])
@pytest.mark.parametrize("kind", [ValueError, NotAnException, SystemExit])
@pytest.mark.parametrize("grain", [1, 3])
def test_a_job_that_cannot_be_read_on_the_slave(comm, kind, grain, size):
    class Bombs(Sweep):
        def process_job(self, job):
            return 1

        def process_result(self, index, job, result):
            self.results[index] = result

    class TolerantBombs(Bombs):
        process_failure = Tolerant.process_failure

    if comm.size == 1:
        return  # nothing travels
    jobs = [Bomb(kind, size) if i == 4 else i for i in range(12)]
    error = error_of(Bombs(jobs, comm, grain=grain), comm)
    assert isinstance(error, JobError), error
    assert error.type_name == kind.__name__
    assert "cannot be read here" in str(error)
    assert "explode" in error.remote_traceback
    results, failures = value_of(TolerantBombs(jobs, comm, grain=grain), comm)
    assert sorted([*results, *failures]) == list(range(12))
    assert 4 in failures
    assert len(failures) <= grain
    check_healthy(comm)


# ---- ranks that disagree, slaves that cannot start ---------------------------------------------------------------------


@pytest.mark.parametrize("what", ["job_dtype", "result_dtype", "grain", "credit", "large dtype"])
def test_ranks_disagree(comm, what):
    if comm.size == 1:
        return
    last = comm.rank == comm.size - 1
    options = {what: 3} if what in ("grain", "credit") and last else {}
    dispatcher = Endless(comm, **options)
    if what == "large dtype":  # its description is too long for an inline payload
        dispatcher.job_dtype = dispatcher.result_dtype = [(f"field{i}_{last}", "f8") for i in range(500)]
        dispatcher.next_job = lambda: np.zeros((), dispatcher.job_dtype)[()]
    elif "dtype" in what:
        dispatcher.job_dtype = dispatcher.result_dtype = "f8"
        setattr(dispatcher, what, "f4" if last else "f8")
    error = error_of(dispatcher, comm)
    assert isinstance(error, RanksDisagreeError)
    assert f"slave {comm.size - 1} and the master disagree" in str(error)
    assert ("job_dtype" if what == "large dtype" else what) in str(error)
    assert "same script" in str(error)
    check_healthy(comm)


class StartsBadly(Endless):
    """A slave raises in on_startup."""

    def __init__(self, vm, bad_rank, error=ValueError, payload_limit=1 << 30, **options):
        super().__init__(vm, **options)
        self.bad_rank, self.error, self.payload_limit = bad_rank, error, payload_limit

    def on_startup(self):
        if self.machine.rank == self.bad_rank:
            raise self.error("cannot start")


@pytest.mark.parametrize("error", [ValueError, NotAnException, SystemExit, OSError])
def test_a_slave_that_cannot_start(comm, error):
    if comm.size == 1:
        return
    for rank in range(1, comm.size):
        outcomes = run(StartsBadly(comm, rank, error), comm)
        found = outcomes[0].error
        assert isinstance(found, SlaveError), found
        assert found.slave == rank
        assert found.type_name == error.__name__
        assert f"slave {rank}" in str(found)
        assert "cannot start" in str(found)
        assert "in on_startup" in found.remote_traceback
        assert type(outcomes[rank].error) is error
        expect_no_error(outcome for at, outcome in enumerate(outcomes) if at not in (0, rank))
        check_healthy(comm)


def test_all_slaves_cannot_start(comm):
    if comm.size == 1:
        return

    class Nobody(Endless):
        def on_startup(self):
            if self.machine.rank:
                raise ValueError("cannot start")

    for _ in range(5):
        outcomes = run(Nobody(comm), comm)
        assert isinstance(outcomes[0].error, SlaveError)
        assert all(isinstance(outcome.error, ValueError) for outcome in outcomes[1:])
    check_healthy(comm)


@pytest.mark.parametrize(
    ("name", "value", "kind", "words"),
    [
        ("job_dtype", "no such type", PayloadError, "no numpy dtype"),
        ("job_dtype", "O", PayloadError, "holds Python objects"),
        ("result_dtype", "S", PayloadError, "has no size"),
        ("kernel", 42, KernelError, "compiled kernel"),
    ],
)
def test_a_plan_that_cannot_be(comm, name, value, kind, words):
    """On one slave, on the master, on all ranks."""

    def dispatcher(ranks):
        one = Endless(comm)
        one.job_dtype = one.result_dtype = "f8"
        if comm.rank in ranks:
            setattr(one, name, value)
        return one

    last = comm.size - 1
    outcomes = run(dispatcher([last]), comm)
    assert isinstance(outcomes[last].error, kind)
    assert words in str(outcomes[last].error)
    if last > 0:
        assert isinstance(outcomes[0].error, SlaveError)
        assert outcomes[0].error.slave == last
        assert words in str(outcomes[0].error)
        expect_no_error(outcomes[1:last])
    check_healthy(comm)
    outcomes = run(dispatcher([0]), comm)
    assert isinstance(outcomes[0].error, kind)
    expect_no_error(outcomes[1:])
    check_healthy(comm)
    outcomes = run(dispatcher(range(comm.size)), comm)
    assert all(isinstance(outcome.error, kind) and words in str(outcome.error) for outcome in outcomes)
    check_healthy(comm)


def test_a_slave_that_is_a_run_ahead_cannot_start(comm):
    """Its report reaches the master while that still waits for another slave of the run before."""

    class First(Sweep):
        def process_job(self, job):
            if self.machine.rank == 1:
                raise ValueError("at once")
            time.sleep(0.3)

    if comm.size == 1:
        return
    for name_length in (10, 3000, 100_000):
        for ranks in ([1], range(comm.size)):
            first, second = First(range(20), comm), Endless(comm)
            second.job_dtype = second.result_dtype = "f8"
            if comm.rank in ranks:
                second.job_dtype = [("f" * name_length, "O")]
            if comm.rank == 0:
                with pytest.raises(JobError):
                    first.run()
            else:
                first.run()
            outcomes = run(second, comm)  # until here nothing held back slave 1
            assert isinstance(outcomes[0].error, PayloadError if 0 in ranks else SlaveError)
            check_healthy(comm)


def test_a_slave_that_is_a_run_ahead(comm):
    """Errors and all: some slaves are one run ahead of others all the time."""

    class Uneven(Sweep):
        def process_job(self, job):
            time.sleep(0.002 * (self.machine.rank % 3))
            if job == 5:
                raise ValueError("at once")
            return np.full(1000, job)

    for i in range(30):
        dispatcher = Uneven([j + i % 2 * 100 for j in range(12)], comm, credit=1 + i % 3)
        if comm.rank == 0 and i % 2 == 0:
            with pytest.raises(JobError):
                dispatcher.run()
        else:
            found = dispatcher.run()
            if comm.rank == 0:
                assert all(same(found[0][j], np.full(1000, j + 100)) for j in range(12))
    check_healthy(comm)


# ---- interrupts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pids(comm):
    """The process of every rank, or a skip where they are not on one host."""
    hosts = comm.allgather(os.uname().nodename)
    assert len(set(hosts)) == 1, "these tests send signals: run them on one host"
    yield comm.allgather(os.getpid())
    comm.Barrier()


@pytest.mark.parametrize("kind", [Endless, FaultyRows])
@pytest.mark.parametrize("large", [False, True])
def test_interrupt_in_a_job(comm, pids, kind, large):
    class Interrupts(kind):
        count = 0

        def next_job(self):
            return 1.0

        def process_job(self, job):
            self.count += 1
            if self.machine.rank == comm.size - 1 and self.count == 5:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            return bytes(100_000) if large and self.result_dtype is None else job

        def process_result(self, index, job, result):
            pass

    for _ in range(3):
        outcomes = run(Interrupts(comm) if kind is Endless else Interrupts([], comm), comm)
        assert isinstance(outcomes[0].error, KeyboardInterrupt)
        assert isinstance(outcomes[-1].error, KeyboardInterrupt)
        expect_no_error(outcomes[1:-1])
        if comm.size > 1:
            assert f"slave {comm.size - 1}" in str(outcomes[0].error)
        check_healthy(comm)


@pytest.mark.parametrize("hook", ["next_job", "process_result", "on_result", "on_job_sent"])
def test_interrupt_in_a_hook_of_the_master(comm, pids, hook):
    class Interrupts(Endless):
        count = 0

        def process_job(self, job):
            return bytes(50_000)

        def hit(self, name):
            if name != hook:
                return
            self.count += 1
            if self.count == 10:
                os.kill(os.getpid(), signal.SIGINT)

        def next_job(self):
            self.hit("next_job")
            return 1

        def process_result(self, index, job, result):
            self.hit("process_result")
            if self.machine.size == 1:
                self.hit(hook)

        def on_result(self, slave, index):
            self.hit("on_result")

        def on_job_sent(self, slave, index):
            self.hit("on_job_sent")

    assert isinstance(error_of(Interrupts(comm, credit=4), comm), KeyboardInterrupt)
    check_healthy(comm)


def test_interrupt_while_the_master_waits(comm, pids):
    class Interrupts(Endless):
        def process_job(self, job):
            time.sleep(0.05)
            os.kill(pids[0], signal.SIGINT)
            time.sleep(0.2)

    for _ in range(3):
        begin = time.monotonic()
        assert isinstance(error_of(Interrupts(comm, credit=1, max_slaves=1), comm), KeyboardInterrupt)
        assert comm.allgather(time.monotonic() - begin < 10) == [True] * comm.size
    check_healthy(comm)


def test_interrupt_while_a_slave_waits(comm, pids):
    if comm.size == 1:
        return

    class Interrupts(Endless):
        """Gives the slaves nothing to do for a while."""

        sent = False

        def process_result(self, index, job, result):
            time.sleep(0.1)
            if not self.sent:
                self.sent = True
                os.kill(pids[-1], signal.SIGINT)
            time.sleep(0.1)

        def on_startup(self):
            self.begin = time.monotonic()

        def next_job(self):
            assert time.monotonic() - self.begin < 20, "the interrupt of a slave was not heard"
            return 1

    outcomes = run(Interrupts(comm, credit=1), comm)
    assert isinstance(outcomes[0].error, KeyboardInterrupt)
    assert isinstance(outcomes[-1].error, KeyboardInterrupt)
    expect_no_error(outcomes[1:-1])
    check_healthy(comm)


def test_interrupt_of_a_slave_that_runs_a_slow_kernel(comm, pids, kernels):
    class Slow(Endless):
        """Each call of the kernel takes 20 ms, and Python is never needed in between."""

        job_dtype = result_dtype = "f8"
        kernel = kernels.slow
        sent = False

        def reset(self):
            self.begin = time.monotonic()

        def next_job(self):
            return 1.0 if time.monotonic() - self.begin < 30 else None

        def process_result(self, index, job, result):
            if not self.sent:
                self.sent = True
                os.kill(pids[-1], signal.SIGINT)

    begin = time.monotonic()
    outcomes = run(Slow(comm), comm)
    assert comm.allgather(time.monotonic() - begin < 20) == [True] * comm.size, "the interrupt was heard when the jobs had run out"
    assert isinstance(outcomes[-1].error, KeyboardInterrupt)
    assert isinstance(outcomes[0].error, KeyboardInterrupt)
    check_healthy(comm)


def test_interrupt_of_all_ranks_at_once(comm, pids):
    """As the terminal does it: every process gets the signal, at about the same time, whatever it is doing."""

    class Busy(Endless):
        started = sent = False

        def on_slave_started(self, slave):
            self.started += 1

        def process_job(self, job):
            return bytes(20_000)

        def process_result(self, index, job, result):
            if index > 50 and self.started == comm.size - 1 and not self.sent:
                self.sent = True
                for pid in reversed(pids):
                    os.kill(pid, signal.SIGINT)

    for _ in range(10):
        heard = False
        try:
            Busy(comm).run()
            time.sleep(0.3)  # a slave may hear of the end first
        except KeyboardInterrupt:
            heard = True
        assert comm.allgather(heard) == [True] * comm.size
        check_healthy(comm)


def test_interrupt_of_a_master_that_waits_for_the_last_slave(comm, pids):
    """It waits until all have left; what came in for the next run meanwhile, from slaves that are ahead, is not lost."""

    class Uneven(Sweep):
        def process_job(self, job):
            if self.machine.rank == 1:
                time.sleep(0.05)
                raise ValueError("ends the run")
            time.sleep(0.2)
            os.kill(pids[0], signal.SIGINT)
            time.sleep(0.2)

    for _ in range(3):
        first, second = Uneven(range(40), comm, credit=1), BigObjects([np.arange(2000)] * 9, comm)
        raised = None
        try:
            first.run()
        except (KeyboardInterrupt, JobError) as error:
            raised = error
        results = second.run()  # until here nothing held back slave 1
        with everywhere(comm):
            assert isinstance(raised, KeyboardInterrupt if comm.size != 2 else JobError) == (comm.rank == 0)
            if comm.rank == 0:
                assert all(same(result["twice"], 2 * np.arange(2000)) for result in results[0].values())
                assert len(results[0]) == 9
    check_healthy(comm)


def test_other_signals_reach_python(comm, pids):
    """A handler of the user's is called, and its exception ends the run."""

    class AlarmError(Exception):
        pass

    def handler(number, frame):
        raise AlarmError("time is up")

    class Slow(Endless):
        def on_startup(self):  # before it ranks wait for each other, and none of them may leave
            if comm.rank == 0:
                signal.setitimer(signal.ITIMER_REAL, 0.2)

        def process_job(self, job):
            time.sleep(0.01)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        outcomes = run(Slow(comm), comm)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "time is up" in str(outcomes[0].error)
    expect_no_error(outcomes[1:])
    check_healthy(comm)


def test_handlers_of_signals_stay(comm):
    """Python's own handler is back after the run, and one that a hook put there is not taken away."""

    def handler(number, frame):
        pass

    class Sets(Sweep):
        def on_startup(self):
            signal.signal(signal.SIGINT, handler)

    class Fails(Sweep):
        def process_job(self, job):
            raise ValueError("fails")

    with everywhere(comm):
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    value_of(Sweep(range(5), comm), comm)
    error_of(Fails(range(5), comm), comm)
    with everywhere(comm):
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        signal.signal(signal.SIGINT, handler)
        value_of(Sweep(range(5), comm), comm)
        before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        value_of(Sets(range(5), comm), comm)
        within = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with everywhere(comm):
        assert before is handler
        assert within is handler


def test_failed_runs_leave_no_memory(comm):
    """What a failed run held is free again."""

    class Fails(Sweep):
        def process_job(self, job):
            if job[0] == 3:
                raise ValueError("fails")
            return job

    def held_bytes():
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    # What malloc keeps for later use says nothing about us: what Python and numpy hold is counted instead.
    tracemalloc.start()
    try:
        before = 0
        for i in range(12):
            error = error_of(Fails([np.full(1 << 17, j) for j in range(8)], comm), comm)
            assert isinstance(error, JobError)
            del error
            if i == 1:
                before = held_bytes()
        grown = held_bytes() - before
    finally:
        tracemalloc.stop()
    with everywhere(comm):
        assert grown < 1 << 20  # each run held 8 to 16 MB

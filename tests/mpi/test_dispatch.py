"""dispatch() with slaves: results, collectors, generators that wait for results, and errors of every kind; nothing hangs."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import check_healthy, error_of, value_of

from jd_hpc import CallError, CollectorError, JobError, dispatch

pytestmark = pytest.mark.mpi


class Boom(Exception):
    """Raised on purpose."""


class Call:
    """dispatch(...), for the helpers that call run(). Every rank calls `make`, but what it makes serves the master only."""

    def __init__(self, make, **options):
        self.make, self.options = make, options

    def run(self):
        return dispatch(*self.make(), **self.options)


def of(jobs, collector=None):
    """Both the same on all ranks."""
    return lambda: (jobs() if callable(jobs) else jobs, None if collector is None else collector())


def square(n):
    return n * n


def rank_and(n):
    return MPI.COMM_WORLD.rank, n


def fail_on(n, wrong):
    if n == wrong:
        raise Boom("three")
    return n * n


def collect(seen, ends):
    try:
        while True:
            seen.append((yield))
    except GeneratorExit:
        ends.append("closed")


def on_master(comm, thing):
    """What the master has, on every rank."""
    return comm.bcast(thing)


@pytest.mark.parametrize("options", [{}, {"grain": 7}, {"credit": 1}, {"isolate": True, "grain": 4}], ids=str)
def test_results_come_in_the_order_of_the_jobs(comm, options):
    for jobs in (lambda: [(square, [n]) for n in range(100)], lambda: ((square, (n,), {}, object()) for n in range(100))):
        assert value_of(Call(of(jobs), vm=comm, **options), comm) == [n * n for n in range(100)]
    assert value_of(Call(of([]), vm=comm, **options), comm) == []


def test_slaves_do_the_work_and_need_no_jobs_of_their_own(comm):
    def jobs():
        return ((rank_and, [n]) for n in range(40)) if comm.rank == 0 else None

    results = value_of(Call(of(jobs), vm=comm), comm)
    assert [n for _, n in results] == list(range(40))
    here = on_master(comm, MPI.COMM_WORLD.rank)
    assert (here in {rank for rank, _ in results}) == (comm.size == 1)


def test_the_master_alone(comm):
    seen, ends = [], []
    results = value_of(Call(of([(rank_and, [n]) for n in range(9)], lambda: collect(seen, ends)), vm=comm, remote=False,
                            build_result_list=True), comm)  # fmt: skip
    assert results == [(on_master(comm, MPI.COMM_WORLD.rank), n) for n in range(9)]
    assert (len(seen), len(ends)) == ((9, 1) if comm.rank == 0 else (0, 0))


def test_a_collector_gets_everything_once(comm):
    seen, ends = [], []
    extra = threading.Lock()  # cannot travel, and need not
    jobs = [(square, [n], None, extra) for n in range(50)]
    assert value_of(Call(of(jobs, lambda: collect(seen, ends)), vm=comm, grain=3), comm) is None
    if comm.rank == 0:
        assert sorted((index, result) for index, _, result in seen) == [(n, n * n) for n in range(50)]
        assert all(job is jobs[index] for index, job, _ in seen)
    assert ends == (["closed"] if comm.rank == 0 else [])


@pytest.mark.parametrize("grain", [1, 5])
def test_a_generator_may_go_by_what_the_collector_has_seen(comm, grain):
    seen, ends = [], []

    def jobs():
        n = 0
        while not any(result >= 900 for _, _, result in seen):
            yield square, [n]
            n += 1

    value_of(Call(of(jobs, lambda: collect(seen, ends)), vm=comm, grain=grain), comm)
    indices, credit = on_master(comm, sorted(index for index, _, _ in seen)), 2
    assert indices == list(range(len(indices)))
    assert 31 <= len(indices) <= 31 + grain * (1 + credit * comm.size)


@pytest.mark.parametrize("grain", [1, 4])
def test_a_generator_may_wait_for_results(comm, grain):
    seen, ends, rounds = [], [], []

    def jobs():
        for size in (5, 2, 9, 1):
            before = len(seen)
            for n in range(size):
                yield square, [n]
            while len(seen) < before + size:
                yield None
            rounds.append(sorted(result for _, _, result in seen[before:]))

    value_of(Call(of(jobs, lambda: collect(seen, ends)), vm=comm, grain=grain), comm)
    assert on_master(comm, rounds) == [[n * n for n in range(size)] for size in (5, 2, 9, 1)]


def test_callables_of_every_kind(comm):
    offset = 100

    def closure(n):
        return n + offset

    class Counter:
        def __init__(self):
            self.count = 0

        def up(self, n):
            self.count += n
            return self.count

    jobs = [
        (closure, [1]), (lambda n: n + offset, [2]), (functools.partial(square), [3]), (np.hypot, [3.0, 4.0]), (max, [1, 2], None),
        (Counter().up, [5]), (int, ["ff"], {"base": 16}), (os.path.join, ("a", "b")),
    ]  # fmt: skip
    assert value_of(Call(of(jobs), vm=comm), comm) == [101, 102, 9, 5.0, 2, 5, 255, "a/b"]
    counter = Counter()  # what one call changes in it is not seen by another one, but where nothing travels
    results = value_of(Call(of([(counter.up, [5])] * 3), vm=comm), comm)
    assert results == ([5, 5, 5] if comm.size > 1 else [5, 10, 15])


def test_arrays_travel(comm):
    jobs = [(np.add, [np.full(5000, n), np.ones(5000)]) for n in range(20)]
    results = value_of(Call(of(jobs), vm=comm, grain=2), comm)
    assert [(len(result), result[0], result[-1]) for result in results] == [(5000, n + 1, n + 1) for n in range(20)]


def test_errors_in_the_places_of_results(comm):
    results = value_of(Call(of([(fail_on, [n, n % 5 * n]) for n in range(20)]), vm=comm, on_error="return", grain=3), comm)
    failed = [n for n in range(20) if n == n % 5 * n]
    assert [n for n, result in enumerate(results) if isinstance(result, JobError)] == failed
    assert all((results[n].index, results[n].type_name) == (n, "Boom") for n in failed)


def holding(thing):
    return lambda: thing


def jobs_then(last):
    """Ten good jobs, and one that is not."""
    return lambda: [*((square, [n]) for n in range(10)), last]


def raising_jobs():
    yield square, [0]
    time.sleep(0.01)
    raise Boom("no more")


def strict():
    for _ in range(3):
        yield
    raise Boom("I do not like it")


def two():
    yield
    yield


def not_primed():
    return
    yield


def late():
    try:
        while True:
            yield
    except GeneratorExit:
        raise Boom("cannot write the report") from None


WRONG = {
    "job raises": (of(jobs_then((fail_on, [3, 3]))), JobError, "job 10 failed on .*Boom: three"),
    "job exits": (of(jobs_then((sys.exit, [3]))), JobError, "job 10 failed on .*SystemExit: 3"),
    "no job": (of(jobs_then(5)), CallError, "job 10 is 5"),
    "not callable": (of(jobs_then(("f", [1]))), CallError, "job 10: 'f' cannot be called"),
    "args are none": (of(jobs_then((square, 5))), CallError, "job 10: args is 5"),
    "no iterable": (of(5), CallError, "jobs is 5"),
    "nothing to wait for": (of([None]), CallError, "None in place of job 0"),
    "generator raises": (of(raising_jobs), Boom, "no more"),
    "collector raises": (of(jobs_then((square, [1])), strict), Boom, "I do not like it"),
    "collector raises at the end": (of(jobs_then((square, [1])), late), Boom, "cannot write the report"),
    "collector ends early": (of(jobs_then((square, [1])), two), CollectorError, "ended when it was given the result of job "),
    "collector has no yield": (of(jobs_then((square, [1])), not_primed), CollectorError, "ended before it came to a yield"),
    "collector is none": (of(jobs_then((square, [1])), lambda: 5), CollectorError, "collector = 5 is no coroutine"),
}


@pytest.mark.parametrize("grain", [1, 4])
@pytest.mark.parametrize("way", WRONG)
def test_what_goes_wrong(comm, way, grain):
    make, kind, words = WRONG[way]
    error = error_of(Call(make, vm=comm, grain=grain), comm)
    assert type(error) is kind
    with pytest.raises(kind, match=words):
        raise error
    check_healthy(comm)


@pytest.mark.parametrize(
    ("job", "kind", "words"),
    [
        (lambda: (holding(threading.Lock()),), CallError, "job 10: the function .*<lambda> cannot be pickled.*lock"),
        (lambda: (id, [threading.Lock()]), CallError, "job 10: an argument of id cannot be pickled.*lock"),
        (lambda: (threading.Lock,), JobError, "job 10 failed on slave .*cannot be pickled"),
    ],
    ids=["callable", "argument", "result"],
)
def test_what_cannot_travel(comm, job, kind, words):
    if comm.size == 1:  # it need not
        assert len(dispatch(jobs_then(job())(), vm=comm)) == 11
        return
    with pytest.raises(kind, match=words):
        raise error_of(Call(of(jobs_then(job())), vm=comm), comm)
    check_healthy(comm)


def test_a_lambda_without_cloudpickle(comm, monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    if comm.size == 1:
        assert dispatch([(lambda: 1,)], vm=comm) == [1]
        return
    with pytest.raises(CallError, match=r"job 10: the function .*<lambda> cannot be pickled.*pip install cloudpickle"):
        raise error_of(Call(of(jobs_then((lambda: 1,))), vm=comm), comm)
    check_healthy(comm)


def count_and_sum(totals):
    count = total = 0
    with contextlib.suppress(GeneratorExit):
        while True:
            _, _, result = yield
            count += 1
            total += result
    totals.append((count, total))


def highest_memory_kib():
    """Of this process; ru_maxrss begins with that of the process that started it."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))


def test_memory_does_not_grow_with_the_number_of_jobs(comm):
    most = 300_000 if comm.size == 1 else 100_000  # benchmarks/dispatch_memory.py has more
    grown_kib = []
    for jobs in (10_000, most):
        totals = []
        before = highest_memory_kib()
        make = of(lambda jobs=jobs: ((abs, [-1]) for _ in range(jobs)), functools.partial(count_and_sum, totals))
        value_of(Call(make, vm=comm, grain=50), comm)
        assert totals == ([(jobs, jobs)] if comm.rank == 0 else [])
        grown_kib.append(highest_memory_kib() - before)
    assert max(comm.allgather(grown_kib[1])) < 3000  # a list of so many tuples would take 15 MB and more

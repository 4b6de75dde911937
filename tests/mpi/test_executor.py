"""Executor on all ranks of a communicator: the master uses it, the slaves serve; everybody asserts the same."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import BrokenExecutor, CancelledError, as_completed, wait

import numpy as np
import pytest
from mpi_helpers import check_healthy, expect_no_error, portable

from jd_hpc import Executor, JobError, PayloadError


def together(comm, use, **options):
    """Have the master use an executor; return what that gave, or raised, on every rank."""
    outcome = error = None
    try:
        with Executor(comm, **options) as pool:
            assert (pool is not None) == (comm.rank == 0)
            if pool is not None:
                outcome = use(pool)
    except BaseException as caught:
        error = portable(caught)
    told = comm.allgather((outcome, error))
    expect_no_error([Told(*one) for one in told[1:]])
    if told[0][1] is not None:
        raise told[0][1]
    return told[0][0]


class Told:
    def __init__(self, value, error):
        self.value, self.error = value, error


def square(x):
    return x * x


def add(*args, **kwargs):
    return sum(args) + sum(kwargs.values())


def fail(x):
    raise ZeroDivisionError(f"no {x}")


def fail_at_three(x):
    if x == 3:
        raise ValueError("three")
    return x


def nap(seconds):
    time.sleep(seconds)
    return seconds


def set_up(value):
    global known
    known = value


def get_known(x):
    return known + x


def lock(x):
    return threading.Lock()


def test_submit(comm):
    assert together(comm, lambda pool: pool.submit(add, 1, 2, c=3).result()) == 6
    check_healthy(comm)


def test_many_futures(comm):
    def use(pool):
        futures = [pool.submit(square, i) for i in range(300)]
        assert {future.result() for future in as_completed(futures)} == {i * i for i in range(300)}
        return [future.result() for future in futures]

    assert together(comm, use) == [i * i for i in range(300)]


@pytest.mark.parametrize("chunksize", [1, 7, 1000])
@pytest.mark.parametrize("buffersize", [None, 1, 3])
def test_map(comm, chunksize, buffersize):
    def use(pool):
        return list(pool.map(add, range(100), range(100, 300), chunksize=chunksize, buffersize=buffersize))

    assert together(comm, use) == [100 + 2 * i for i in range(100)]


def test_map_of_nothing(comm):
    assert together(comm, lambda pool: list(pool.map(square, []))) == []


def test_map_is_lazy_with_a_buffersize(comm):
    def use(pool):
        taken = []

        def members():
            for i in range(100):
                taken.append(i)
                yield i

        results = pool.map(square, members(), buffersize=4)
        before = len(taken)
        first = [next(results) for _ in range(10)]
        return before, len(taken), first

    assert together(comm, use) == (4, 14, [i * i for i in range(10)])


def test_an_exception_and_where_it_came_from(comm):
    def use(pool):
        error = pool.submit(fail, 7).exception()
        assert isinstance(error.__cause__, JobError)
        return type(error), str(error), error.__cause__.slave, error.__cause__.remote_traceback

    kind, text, slave, trace = together(comm, use)
    assert (kind, text) == (ZeroDivisionError, "no 7")
    assert (slave > 0) == (comm.size > 1)
    assert 'raise ZeroDivisionError(f"no {x}")' in trace


@pytest.mark.parametrize("chunksize", [1, 2])
def test_an_exception_in_a_map(comm, chunksize):
    def use(pool):
        results = pool.map(fail_at_three, range(100), chunksize=chunksize)
        got = []
        with pytest.raises(ValueError, match="three"):
            for result in results:
                got.append(result)
        return got

    assert together(comm, use) == ([0, 1, 2] if chunksize == 1 else [0, 1])
    check_healthy(comm)


def test_arrays_travel_whole(comm):
    def use(pool):
        given = [np.arange(i * 1000.0).reshape(-1, 10) for i in (1, 100)]
        return [np.array_equal(result, array * array) for result, array in zip(pool.map(square, given), given, strict=True)]

    assert together(comm, use) == [True, True]


def test_a_timeout(comm):
    def use(pool):
        results = pool.map(nap, [0.0, 1.5], timeout=0.5)
        with pytest.raises(TimeoutError):
            list(results)
        future = pool.submit(nap, 1.0)
        with pytest.raises(TimeoutError):
            future.result(timeout=0.1)
        return future.result()

    assert together(comm, use) == 1.0


def test_an_initializer(comm):
    options = {"initializer": set_up, "initargs": (10,)}
    assert together(comm, lambda pool: list(pool.map(get_known, range(20))), **options) == list(range(10, 30))


def test_cancel(comm):
    def use(pool):
        futures = [pool.submit(nap, 0.2) for _ in range(2 * comm.size + 20)]
        while not futures[0].running() and not futures[0].done():
            time.sleep(0.001)
        assert futures[-1].cancel()
        pool.shutdown(cancel_futures=True)
        with pytest.raises(CancelledError):
            futures[-1].result()
        with pytest.raises(RuntimeError, match="after shutdown"):
            pool.submit(nap, 0)
        return futures[0].result(), sum(future.cancelled() for future in futures) >= 10

    assert together(comm, use) == (0.2, True)
    check_healthy(comm)


def test_who_waits_hears_of_a_cancellation_at_once(comm):
    def use(pool):
        futures = [pool.submit(nap, 1.0) for _ in range(comm.size + 1)]
        heard = []

        def listen(how):
            with pytest.raises(CancelledError):
                how()
            heard.append(futures[0].done())

        threads = [threading.Thread(target=listen, args=(how,)) for how in (futures[-1].result, futures[-1].exception)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        assert futures[-1].cancel()
        for thread in threads:
            thread.join(20)
        assert wait(futures[:1], timeout=0) == (set(), {futures[0]})
        pool.shutdown(cancel_futures=True)
        return heard, futures[0].result()

    assert together(comm, use) == ([False, False], 1.0)


def test_waiting_leaves_nothing_behind(comm):
    def use(pool):
        slow = pool.submit(nap, 0.3)
        for look in (slow.result, slow.exception):
            with pytest.raises(TimeoutError):
                look(0.01)
        assert len(wait([slow], 0.01).not_done) == 1
        assert not slow._waiters
        failed = pool.submit(fail, 1)
        with pytest.raises(ZeroDivisionError):
            failed.result()
        told, seen = failed.exception(), weakref.ref(failed)
        gc.disable()  # a cycle would stay
        try:
            del failed
            return slow.result(), slow.exception(), str(told), seen() is None
        finally:
            gc.enable()

    assert together(comm, use) == (0.3, None, "no 1", True)


def test_callbacks(comm):
    def use(pool):
        seen = []
        for i in range(50):
            pool.submit(square, i).add_done_callback(lambda future: seen.append(future.result()))
        pool.shutdown()
        return sorted(seen)

    assert together(comm, use) == [i * i for i in range(50)]


def test_calls_from_many_threads(comm):
    def use(pool):
        sums = []
        threads = [threading.Thread(target=lambda: sums.append(sum(pool.map(square, range(100))))) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sums

    assert together(comm, use) == [328350] * 5


def test_max_workers(comm):
    def use(pool):
        list(pool.map(square, range(20)))

    together(comm, use, max_workers=1)
    for wrong in (0, -3):
        with pytest.raises(ValueError, match="must be greater than 0"):
            Executor(comm, wrong)


def test_a_lambda(comm):
    pytest.importorskip("cloudpickle")
    more = comm.size
    assert together(comm, lambda pool: list(pool.map(lambda x: x + more, range(3)))) == [more, more + 1, more + 2]


class Sealed:
    def __reduce__(self):
        raise OSError("it cannot leave")


def test_what_cannot_be_pickled(comm):
    def use(pool):
        error = pool.submit(square, Sealed()).exception()
        assert isinstance(error, PayloadError)
        with pytest.raises(PayloadError, match="an argument of square cannot be pickled"):
            list(pool.map(square, [1, Sealed()]))
        assert pool.submit(lock, 1).exception() is not None if comm.size > 1 else True
        return str(error), pool.submit(square, 3).result()

    text, value = together(comm, use)
    assert "an argument of square cannot be pickled" in text
    assert "it cannot leave" in text
    assert value == 9


def test_an_iterable_that_raises(comm):
    def members():
        yield 1
        raise OSError("no more")

    def use(pool):
        with pytest.raises(OSError, match="no more"):
            pool.map(square, members())
        return pool.submit(square, 3).result()

    assert together(comm, use) == 9


def test_an_initializer_that_raises(comm):
    if comm.size == 1:
        with Executor(comm, initializer=fail, initargs=(1,)) as pool, pytest.raises(BrokenExecutor, match="no 1"):
            pool.submit(square, 2).result()
        return
    try:
        with Executor(comm, initializer=fail, initargs=(1,)) as pool:
            if pool is not None:
                with pytest.raises(BrokenExecutor, match="no 1"):
                    for _ in range(1000):
                        pool.submit(square, 2).result()
                        time.sleep(0.01)
    except ZeroDivisionError:
        assert comm.rank > 0
    comm.Barrier()
    check_healthy(comm)


def test_one_executor_after_the_other(comm):
    for i in range(20):
        assert together(comm, lambda pool, i=i: pool.submit(square, i).result()) == i * i


def test_a_slave_cannot_submit(comm):
    if comm.size == 1:
        return
    pool = Executor(comm)
    if comm.rank > 0:
        with pytest.raises(RuntimeError, match="a slave serves"):
            pool.submit(square, 1)
    comm.Barrier()
    check_healthy(comm)


def test_a_journal(comm, tmp_path):
    path = comm.bcast(str(tmp_path / "a.journal"))
    for _ in range(2):
        assert together(comm, lambda pool: list(pool.map(square, range(50))), journal=path) == [i * i for i in range(50)]
    pool = Executor(comm, journal=path)
    with pool as used:
        if used is not None:
            assert list(used.map(square, range(50))) == [i * i for i in range(50)]
    assert comm.bcast(pool.stats.get("from journal")) == 50


def test_an_exception_that_was_caught_keeps_nothing(comm):
    class Large:
        pass

    def raises(use):
        kept = Large()
        with pytest.raises(ZeroDivisionError):
            use()
        return weakref.ref(kept)

    def use(pool):
        gc.collect()
        gc.disable()  # a cycle would be found in the end, and until then a caller's arrays take their memory
        try:
            return [raises(lambda: pool.submit(fail, 1).result())(), raises(lambda: list(pool.map(fail, [1, 2])))()]
        finally:
            gc.enable()

    assert together(comm, use) == [None, None]


def test_an_executor_is_entered_once(comm):
    """On a second time all ranks hear of it, and none waits for the others."""
    executor = Executor(comm)
    with executor as pool:
        if pool is not None:
            pool.submit(square, 2).result()
    with pytest.raises(RuntimeError, match="after shutdown"), executor:
        pass
    check_healthy(comm)

"""Pool on all ranks of a communicator: the master uses it, the slaves serve; everybody asserts the same."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from mpi_helpers import Outcome, check_healthy, expect_no_error, portable

from jd_hpc import JobError, PayloadError, Pool, register_parallel_backend


def together(comm, use, **options):
    """Have the master use a pool; return what that gave, or raise what it raised, on every rank."""
    outcome = error = None
    try:
        with Pool(comm, serve=False, **options) as pool:
            if pool.is_master():
                outcome = use(pool)
            else:
                pool.wait()
    except BaseException as caught:
        error = portable(caught)
    told = [Outcome(*one) for one in comm.allgather((outcome, error))]
    expect_no_error(told[1:])
    if told[0].error is not None:
        raise told[0].error
    return told[0].value


def square(x):
    return x * x


def add(x, y=100):
    return x + y


def fail_at_13(x):
    if x == 13:
        raise ValueError("no 13")
    return x


def where(x):
    time.sleep(0.05)
    return os.getpid()


def how_many(rows):
    """The rows of the array that a row is part of."""
    return rows.base.size // 3


def nap(seconds):
    time.sleep(seconds)
    return seconds


def nest(x):
    from joblib import Parallel, delayed

    return Parallel()(delayed(square)(y) for y in range(4))


def leave_a_trace(folder):
    with (folder / "traces").open("ab") as traces:
        return traces.write(b"x")


def change(array):
    array += 1
    return array


def set_up(value):
    global known
    known = value


def known_value(x):
    return known + x


def test_who_is_who(comm):
    facts = together(comm, lambda pool: (pool.rank, pool.size, sorted(pool.workers), pool.is_master(), pool.is_worker()))
    slaves = list(range(1, comm.size)) or [0]
    assert facts == (0, len(slaves), slaves, True, False)


@pytest.mark.parametrize("chunksize", [None, 1, 7, 10_000])
def test_map_is_in_order(comm, chunksize):
    def use(pool):
        return [pool.map(square, iterable, chunksize) for iterable in (range(1000), list(range(5)), iter(range(50)), (3,), ())]

    assert together(comm, use) == [[x * x for x in range(count)] for count in (1000, 5, 50)] + [[9], []]


def test_rows_of_an_array_travel_as_an_array(comm):
    table = np.arange(3000.0).reshape(1000, 3)
    sums, sizes, changed = together(
        comm, lambda pool: (pool.map(np.sum, table), pool.map(how_many, table, 250), pool.map(change, np.zeros((4, 2))))
    )
    assert sums == table.sum(axis=1).tolist()
    assert sizes == [250] * 1000
    assert all(row.tolist() == [1, 1] for row in changed)


@pytest.mark.parametrize("length", [3, 5000])  # in the pickle, and apart from it
def test_arrays_can_be_written_to(comm, length):
    def use(pool):
        results = pool.map(change, [np.zeros(length) for _ in range(5)])
        for result in results:
            result += 1
        return [float(result.sum()) for result in results], [float(array.sum()) for array in pool.imap(change, results)]

    assert together(comm, use) == ([2.0 * length] * 5, [3.0 * length] * 5)


def test_starmap(comm):
    def use(pool):
        pairs = [(x, 2 * x) for x in range(200)]
        return pool.starmap(add, pairs), pool.starmap(add, [[1], [2]], 2), pool.starmap_async(add, iter(pairs)).get(30)

    assert together(comm, use) == ([3 * x for x in range(200)], [101, 102], [3 * x for x in range(200)])


def test_map_calls_back_here_with_every_result(comm):
    def use(pool):
        here, seen = threading.current_thread(), []

        def callback(value):
            seen.append((value, threading.current_thread() is here))

        by_name = pool.map(square, range(300), callback=callback)
        in_its_place = pool.map(square, range(300), callback)  # schwimmbad's
        return by_name, in_its_place, sorted(seen)

    squares = [x * x for x in range(300)]
    assert together(comm, use) == (squares, squares, [(value, True) for value in sorted(2 * squares)])


def test_a_callback_that_raises_ends_the_map_alone(comm):
    def use(pool):
        with pytest.raises(OSError, match="disk full"):
            pool.map(square, range(100_000), callback=lambda value: (_ for _ in ()).throw(OSError("disk full")))
        return pool.map(square, range(3))

    assert together(comm, use) == [0, 1, 4]


@pytest.mark.parametrize("chunksize", [None, 1, 20])
def test_the_first_exception_is_raised_with_its_place(comm, chunksize):
    def use(pool):
        with pytest.raises(ValueError, match="no 13") as caught:
            pool.map(fail_at_13, range(100), chunksize)
        assert isinstance(caught.value.__cause__, JobError)
        assert "in fail_at_13" in str(caught.value.__cause__)
        return pool.map(fail_at_13, range(13))

    assert together(comm, use) == list(range(13))


def test_after_a_failure_nothing_more_begins(comm):
    def use(pool):
        begun_s = time.monotonic()
        with pytest.raises(TypeError):
            pool.map(nap, [None] + [0.05] * 2000)
        pool.map(square, range(5))
        return time.monotonic() - begun_s

    assert together(comm, use) < 20  # of 100 s or, on three slaves, 33


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
@pytest.mark.parametrize("chunksize", [1, 5])
def test_imap_is_lazy(comm, name, chunksize):
    def use(pool):
        asked = []
        endless = (asked.append(x) or x for x in itertools.count())
        results = getattr(pool, name)(square, endless, chunksize)
        first = [next(results) for _ in range(50)]
        del results
        return sorted(first) if name == "imap_unordered" else first, len(asked), pool.size, pool.map(square, [7])

    first, asked, size, after = together(comm, use)
    if name == "imap":
        assert first == [x * x for x in range(50)]
    assert len(set(first)) == 50
    assert asked <= 50 + (4 * size + 1) * chunksize
    assert after == [49]


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_imap_goes_on_after_a_call_that_raised(comm, name):
    def use(pool):
        results, came, errors = getattr(pool, name)(fail_at_13, range(40)), [], 0
        while True:
            try:
                came.append(next(results))
            except StopIteration:
                return came, errors
            except ValueError:
                errors += 1

    came, errors = together(comm, use)
    assert sorted(came) == [*range(13), *range(14, 40)]
    assert errors == 1


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_a_result_of_imap_may_be_waited_for(comm, name):
    def use(pool):
        results = getattr(pool, name)(nap, [0.5])
        with pytest.raises(multiprocessing.TimeoutError):
            results.next(timeout=0.01)
        return results.next(timeout=20), next(results, "no more")

    assert together(comm, use) == (0.5, "no more")


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
@pytest.mark.parametrize("joins", [False, True])
def test_what_imap_has_begun_goes_on_after_close(comm, name, joins):
    def use(pool):
        results = getattr(pool, name)(square, iter(range(100)), 3)
        pool.close()
        if joins:
            pool.join()
        return sorted(results)

    assert together(comm, use) == [x * x for x in range(100)]


@pytest.mark.parametrize("name", ["imap", "imap_unordered"])
def test_imap_ends_where_the_pool_has_ended(comm, name):
    def use(pool):
        results = getattr(pool, name)(square, itertools.count())
        first = next(results)
        pool.terminate()
        for _ in range(100):
            try:
                next(results)
            except StopIteration:
                return first
            except Exception as error:
                assert type(error).__name__ in ("CancelledError", "BrokenExecutor", "RuntimeError")
        return "no end"

    assert together(comm, use) != "no end"


def test_what_an_async_map_was_given_may_change(comm):
    def use(pool):
        naps, rows = [0.01] * 40, np.arange(40.0)
        slow, fast = pool.map_async(nap, naps), pool.starmap_async(add, np.stack([rows, rows], axis=1))
        rows_later = pool.map_async(square, rows)
        naps.clear()
        rows[:] = -1
        return len(slow.get(20)), fast.get(20), rows_later.get(20)

    assert together(comm, use) == (40, [2.0 * x for x in range(40)], [1.0 * x * x for x in range(40)])


def test_imap_unordered_does_not_wait_for_the_slow(comm):
    results = together(comm, lambda pool: list(pool.imap_unordered(nap, [0.8, 0.0, 0.01, 0.02])))
    assert sorted(results) == [0.0, 0.01, 0.02, 0.8]
    if comm.size > 2:
        assert results[-1] == 0.8


def test_apply(comm):
    def use(pool):
        heard = []
        done = pool.apply_async(add, (1,), {"y": 2}, callback=heard.append)
        failed = pool.apply_async(fail_at_13, (13,), error_callback=heard.append)
        later = pool.apply_async(nap, (0.5,))
        with pytest.raises(multiprocessing.TimeoutError):
            later.get(0.01)
        with pytest.raises(ValueError, match="has not ended"):
            later.successful()
        assert not later.ready()
        assert later.get(20) == 0.5
        assert later.ready()
        assert later.successful()
        failed.wait()
        assert not failed.successful()
        with pytest.raises(ValueError, match="no 13"):
            failed.get()
        assert done.get() == pool.apply(add, [1], {"y": 2}) == 3
        end = time.monotonic() + 20
        while len(heard) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return [value if isinstance(value, int) else str(value) for value in heard]

    assert sorted(together(comm, use), key=str) == [3, "no 13"]


def test_map_async(comm):
    def use(pool):
        heard = []
        all_at_once = [pool.map_async(square, range(count), callback=heard.append) for count in (10, 0, 1000)]
        failed = pool.map_async(fail_at_13, range(100))
        with pytest.raises(ValueError, match="no 13"):
            failed.get(20)
        return [len(one.get(20)) for one in all_at_once]

    assert together(comm, use) == [10, 0, 1000]


def test_long_calls_are_spread_one_by_one(comm):
    pids = together(comm, lambda pool: pool.map(where, range(10 * pool.size)))
    counts = sorted(pids.count(pid) for pid in set(pids))
    assert len(counts) == max(1, comm.size - 1)
    assert counts[0] >= 1


def test_an_initializer(comm):
    assert together(comm, lambda pool: pool.map(known_value, range(3)), initializer=set_up, initargs=(5,)) == [5, 6, 7]


def test_fewer_slaves(comm):
    size, pids = together(comm, lambda pool: (pool.size, set(pool.map(where, range(4)))), max_slaves=1)
    assert (size, len(pids)) == (1, 1)


def test_maps_from_several_threads(comm):
    def use(pool):
        found = [None] * 4

        def one(at):
            found[at] = pool.map(add, range(200 + at))

        threads = [threading.Thread(target=one, args=(at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    assert together(comm, use) == [list(range(100, 300 + at)) for at in range(4)]


def test_what_a_slave_may_not_do(comm):
    pool = Pool(comm, serve=False)
    if not pool.is_master():
        with pytest.raises(RuntimeError, match="a slave runs calls"):
            pool.map(square, [1])
    pool.close()
    pool.join()
    pool.wait()
    check_healthy(comm)


def test_what_is_too_large_is_refused_alone(comm):
    def use(pool):
        with pytest.raises(PayloadError, match="over payload_limit = 100000"):
            pool.apply(len, (bytes(200_000),))
        return pool.map(len, [bytes(50_000)] * 4)

    assert together(comm, use, payload_limit=100_000) == [50_000] * 4


def test_joblib_runs_on_the_slaves(comm):
    def use(pool):
        from joblib import Parallel, delayed, parallel_config

        register_parallel_backend()
        with parallel_config("jd_hpc", pool=pool):
            pids = set(Parallel()(delayed(where)(x) for x in range(10 * pool.size)))
            squares = Parallel(n_jobs=2)(delayed(square)(x) for x in range(500))
            nested = Parallel()(delayed(nest)(x) for x in range(3))
            unordered = sorted(Parallel(return_as="generator_unordered")(delayed(square)(x) for x in range(20)))
            with pytest.raises(ValueError, match="no 13"):
                Parallel()(delayed(fail_at_13)(x) for x in range(100))
            after = Parallel()(delayed(square)(x) for x in range(3))
        return len(pids), squares, nested, unordered, after

    squares = [x * x for x in range(500)]
    assert together(comm, use) == (max(1, comm.size - 1), squares, [squares[:4]] * 3, squares[:20], squares[:3])


@pytest.fixture
def folder(comm):
    """One for all ranks."""
    path = Path(comm.bcast(tempfile.mkdtemp(prefix="jd_hpc_pool") if comm.rank == 0 else None))
    yield path
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


def test_a_journal_spares_the_calls(comm, folder):
    def use(pool):
        return pool.map(leave_a_trace, [folder] * 30), list(pool.imap(square, range(5)))

    for _ in range(2):
        assert together(comm, use, journal=folder / "journal") == ([1] * 30, [0, 1, 4, 9, 16])
        assert (folder / "traces").stat().st_size == 30


def test_pools_one_after_the_other(comm):
    for count in range(3):
        assert together(comm, lambda pool, count=count: pool.map(square, range(count))) == [x * x for x in range(count)]
    check_healthy(comm)

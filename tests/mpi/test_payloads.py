"""What travels: every kind and size of jobs and results, compared value by value with what was sent or with a local run."""

from __future__ import annotations

import ctypes
import pickle
from itertools import product

import numpy as np
import pytest
from mpi_helpers import Sweep, everywhere, run, same, value_of

from jd_hpc import JobDispatcher, KernelError

pytestmark = pytest.mark.mpi

# Around the limits of an inline payload, of the eager protocols, and far beyond.
SIZES = [1, 7, 8, 64, 1900, 1983, 1984, 1985, 2048, 2049, 4032, 4096, 8192, 16384, 65536, 65537, 300_001, 1 << 20]


class OwnType:
    """An object that tells how it was pickled."""

    def __init__(self, array, protocol=None):
        self.array, self.protocol = array, protocol

    def __reduce_ex__(self, protocol):
        return OwnType, (pickle.PickleBuffer(self.array), protocol)


def zoo():
    rng = np.random.default_rng(3)
    return [
        False, 0, -1, 1 << 70, 1.5, float("inf"), "text", "\udc80 lone surrogate", b"", b"bytes", (), [], {}, {1: [2, (3,)]}, set(),
        {"a", "b"}, range(5), np.float64(2.5), np.int8(-3), np.datetime64("2020-01-01"), complex(1, -2),
        np.array(5.0), np.array([]), np.zeros((0, 4)), rng.normal(size=(3, 4, 5)), np.asfortranarray(rng.normal(size=(40, 30))),
        rng.normal(size=(50, 60))[::2, ::3], rng.normal(size=300).astype(">f8"), np.array(["a", None, 3], object),
        np.array([(1, 2.5)], [("i", "i4"), ("f", "f8")]), np.arange(1000) % 2 == 0, np.array(["abc", "de"]),
        [np.arange(n) for n in range(40)], {"big": rng.bytes(70_000), "array": rng.normal(size=9000)},
    ]  # fmt: skip


def test_objects_of_every_kind(comm):
    jobs = zoo()
    for options in ({}, {"grain": 5}, {"credit": 7, "grain": 2}, {"max_slaves": 0}):
        results, failures = value_of(Sweep(jobs, comm, **options), comm)
        assert failures == {}
        assert sorted(results) == list(range(len(jobs)))
        assert all(same(results[i], job) for i, job in enumerate(jobs))


def test_none_is_a_result(comm):
    class Nothing(Sweep):
        def process_job(self, job):
            return None

    assert value_of(Nothing(range(10), comm, grain=3), comm)[0] == dict.fromkeys(range(10))


class Bytes(Sweep):
    """The job says how long the result is to be."""

    def process_job(self, job):
        seed, length, _ = job
        return np.random.default_rng(seed).bytes(length)


@pytest.mark.parametrize("credit", [1, 6])
def test_objects_of_every_size(comm, credit):
    lengths = [*zip(SIZES, reversed(SIZES), strict=True), *((n, n) for n in range(1840, 1960))]
    jobs = [(i, n, bytes(m)) for i, (n, m) in enumerate(lengths)]
    dispatcher = Bytes(jobs, comm, credit=credit)
    outcomes = run(dispatcher, comm)
    with everywhere(comm):
        if comm.rank == 0:
            assert outcomes[0].error is None
            assert sorted(dispatcher.results) == list(range(len(jobs)))
            for i, job in enumerate(jobs):
                assert dispatcher.results[i] == np.random.default_rng(i).bytes(job[1])


def test_buffers_travel_out_of_band(comm):
    class Typed(Sweep):
        def process_job(self, job):
            if self.machine.size > 1:
                assert job["own"].protocol == 5
                assert not job["plain"].flags.owndata  # a view of what was received
            job["plain"][0] = -1  # and an object's arrays are the hook's own
            return OwnType(job["plain"]), type(job["own"].array).__name__

        def process_result(self, index, job, result):
            self.results[index] = result[0].protocol, np.frombuffer(result[0].array, "i8").tolist()[:2]

    results, _ = value_of(Typed([{"own": OwnType(np.arange(5)), "plain": np.arange(1000)} for _ in range(6)], comm), comm)
    assert results == dict.fromkeys(range(6), (5 if comm.size > 1 else None, [-1, 1]))


def rows_of(job_length, result_length):
    class Rows(JobDispatcher):
        """Byte rows: the result depends on every byte of the job."""

        job_dtype = ("u1", job_length)
        result_dtype = ("u1", result_length)
        count = 6

        def reset(self):
            self.at, self.right = 0, []

        def make(self, index):
            return np.random.default_rng(index).integers(0, 256, job_length, "u1")

        def next_job(self):
            if self.at == self.count:
                return None
            self.at += 1
            return self.make(self.at - 1)

        def process_job(self, job):
            assert job.shape == (job_length,)
            assert not job.flags.writeable
            return np.random.default_rng(int(job @ np.arange(job_length))).integers(0, 256, result_length, "u1")

        def process_result(self, index, job, result):
            if same(job, self.make(index)) and same(result, self.process_job(freeze(job))):
                self.right.append(index)

        def postprocess(self):
            return sorted(self.right)

    return Rows


def freeze(array):
    array = np.array(array)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("grain", [1, 4])
def test_rows_of_every_size(comm, grain):
    for job_length, result_length in zip(SIZES, reversed(SIZES), strict=True):
        kind = rows_of(job_length, result_length)
        assert value_of(kind(comm, grain=grain), comm) == list(range(6))
    for length in SIZES:
        kind = rows_of(length, length)
        assert value_of(kind(comm, grain=grain, credit=3), comm) == list(range(6))


@pytest.mark.parametrize("megabytes", [4, 16])
def test_large_rows_and_objects_both_ways(comm, megabytes):
    class Objects(Sweep):
        def process_job(self, job):
            return job + 1

        def process_result(self, index, job, result):
            self.results[index] = bool((result == index + 1).all()) and result.nbytes

    class Rows(Objects):
        job_dtype = result_dtype = ("f8", megabytes << 17)

    expected = dict.fromkeys(range(2 * comm.size), megabytes << 20)
    jobs = [np.full(megabytes << 17, float(i)) for i in range(2 * comm.size)]
    for kind in (Objects, Rows):
        assert value_of(kind(jobs, comm), comm)[0] == expected


DTYPES = {
    "f8": [1.5, np.nan, -np.inf, 0.0],
    "f4": [np.float32(0.1), 2.0, 3, -0.0],
    "i4": [0, -1, 2**31 - 1, -(2**31)],
    "u1": [0, 255, 7, np.uint8(9)],
    "?": [True, False, np.bool_(True), True],
    "c16": [1 + 2j, 0, 1.5, complex(0, -1)],
    ">f8": [1.0, 2.5, -3.0, 1e300],
    "S5": [b"abcde", b"", b"x", b"yy"],
    "U3": ["äöü", "", "x", "yy"],
    "M8[s]": [np.datetime64(n, "s") for n in (0, 1, 10**9, -5)],
    "f8,i4": [(1.5, 2), (0.0, -1), (np.nan, 3), (2.0, 4)],
    "row of 3": [[1.0, 2.0, 3.0], (4, 5, 6), np.arange(3.0), np.arange(6.0)[::2]],
    "matrix": [np.arange(6.0).reshape(2, 3) * n for n in range(4)],
    "nested": [((n, [n, n + 1]), b"ab") for n in range(4)],
}
DECLARED = {
    "row of 3": ("f8", 3),
    "matrix": ("f8", (2, 3)),
    "nested": [("inner", [("n", "i4"), ("pair", "f4", 2)]), ("name", "S2")],
    "f8,i4": [("x", "f8"), ("n", "i4")],
}


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(comm, name):
    dtype = np.dtype(DECLARED.get(name, name))
    jobs = np.zeros(4, dtype)
    for i, value in enumerate(DTYPES[name]):
        jobs[i] = value

    class Echo(JobDispatcher):
        job_dtype = result_dtype = DECLARED.get(name, name)

        def reset(self):
            self.at, self.seen = 0, {}

        def next_job(self):
            self.at += 1
            return DTYPES[name][self.at - 1] if self.at <= 4 else None

        def process_job(self, job):
            if dtype.shape:
                assert job.shape == dtype.shape
                assert job.dtype == dtype.base
            return job

        def process_result(self, index, job, result):
            self.seen[index] = np.array(job, dtype.base).tobytes(), np.array(result, dtype.base).tobytes()

        def postprocess(self):
            return self.seen

    expected = {i: (jobs[i : i + 1].tobytes(),) * 2 for i in range(4)}
    assert Echo().run() == expected
    for options in ({}, {"grain": 3}, {"max_slaves": 0}):
        assert value_of(Echo(comm, **options), comm) == expected


def keeper(job_dtype, result_dtype, make, work):
    class Keeper(Sweep):
        """Keeps every job and result it is given, on both sides, and looks at them again at the end."""

        def on_startup(self):
            self.kept = []

        def process_job(self, job):
            if job_dtype is not None:
                check_read_only(job)
            result = work(job)
            self.kept.append((job, as_bytes(job), result, as_bytes(result)))
            return result

        def process_result(self, index, job, result):
            self.kept.append((job, as_bytes(job), result, as_bytes(result)))

        def on_shutdown(self):
            for job, job_bytes, result, result_bytes in self.kept:
                assert as_bytes(job) == job_bytes
                assert as_bytes(result) == result_bytes

        def postprocess(self):
            return len(self.kept)

    Keeper.job_dtype, Keeper.result_dtype = job_dtype, result_dtype
    return Keeper([make(i) for i in range(300)])


def as_bytes(value):
    return pickle.dumps(value) if not isinstance(value, np.ndarray | np.generic) else value.tobytes()


def check_read_only(job):
    if isinstance(job, np.ndarray):
        assert not job.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            job[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            job.flags.writeable = True
    elif isinstance(job, np.void):
        with pytest.raises(ValueError, match="read-only"):
            job[0] = 0


@pytest.mark.parametrize(
    ("job_dtype", "result_dtype", "make", "work"),
    [
        ("f8", "f8", float, lambda job: job + 1),
        (("f8", 3), ("f8", 2), lambda i: np.full(3, i), lambda job: job[:2] + 1),
        (("f8", 3), ("f8", 3), lambda i: np.full(3, i), lambda job: job),
        ("f8,i8", "i8,i8", lambda i: (i, i), lambda job: (int(job[1]), 2)),
        (("f8", 700), ("f8", 600), lambda i: np.full(700, i), lambda job: job[:600]),
        (None, None, lambda i: np.full(5, i), lambda job: job),
        (None, None, lambda i: np.full(5000, i), lambda job: [job, job + 1]),
        (None, ("f8", 300), lambda i: np.full(5, i), lambda job: np.full(300, job[0])),
        ("f8", None, float, lambda job: np.full(20, job)),
    ],
    ids=["scalars", "rows", "same rows", "records", "large rows", "objects", "large objects", "objects to rows", "rows to objects"],
)
def test_hooks_may_keep_what_they_are_given(comm, job_dtype, result_dtype, make, work):
    template = keeper(job_dtype, result_dtype, make, work)
    for options in ({}, {"grain": 4, "credit": 3}, {"max_slaves": 0}):
        dispatcher = type(template)(template.job_list, comm, **options)
        assert value_of(dispatcher, comm) == (300 if comm.size > 1 and "max_slaves" not in options else 600)


class KeepsBlocks(Sweep):
    job_dtype = "i8"
    result_dtype = "f8"
    fails_at: int | None = None

    def on_startup(self):
        self.kept = []

    def process_jobs(self, jobs, results):
        results[:] = jobs
        self.kept.append((jobs, results, jobs.tolist()))
        if self.fails_at is not None and int(jobs[0]) % 3 == self.fails_at:
            raise ValueError("a block that fails")

    def process_results(self, indices, jobs, results):
        self.kept.append((jobs, results, jobs.tolist()))

    def process_failure(self, index, job, error):
        pass

    def next_jobs(self, count):
        block = self.job_list[self.at : self.at + count]
        self.at += len(block)
        return block

    def postprocess(self):
        return None

    def on_shutdown(self):
        for jobs, results, expected in self.kept:
            assert jobs.tolist() == expected
            assert results.tolist() == expected


@pytest.mark.parametrize("fails_at", [None, 1])
def test_blocks_may_be_kept(comm, fails_at):
    for options in ({}, {"grain": 5}, {"grain": 300, "credit": 4}):
        dispatcher = KeepsBlocks(range(900), comm, **options)
        dispatcher.fails_at = fails_at
        value_of(dispatcher, comm)


def test_what_a_hook_does_later_changes_nothing(comm):
    class Late(Sweep):
        """Writes to the job it returned and the result it returned, once they are gone."""

        result_dtype = ("f8", 50)
        job_dtype = ("f8", 50)

        def next_job(self):
            if self.at:
                self.last[:] = -1
            if (job := super().next_job()) is not None:
                self.last = job
            return job

        def process_job(self, job):
            if hasattr(self, "result"):
                self.result[:] = -1
            self.result = job * 2
            return self.result

        def process_result(self, index, job, result):
            assert self.job_dtype is None or (job == index).all()  # an object is the hook's own, which it changed
            self.results[index] = bool((result == 2 * index).all())

    class LateObjects(Late):
        job_dtype = result_dtype = None

    for kind in (Late, LateObjects):
        jobs = [np.full(50, float(i)) for i in range(200)]
        if kind is LateObjects and comm.size == 1:
            continue  # locally an object is the object itself
        assert value_of(kind(jobs, comm, credit=4), comm)[0] == dict.fromkeys(range(200), True)


def test_blocks_that_change_later(comm):
    class Reused(Sweep):
        """next_jobs returns the same array again and again."""

        job_dtype = result_dtype = "i8"

        def reset(self):
            super().reset()
            self.block = np.zeros(10_000, "i8")

        def next_jobs(self, count):
            count = min(count, len(self.job_list) - self.at)
            self.block[:count] = self.job_list[self.at : self.at + count]
            self.at += count
            return self.block[:count]

    for grain in (1, 3, 500):
        assert value_of(Reused(range(2000), comm, grain=grain), comm)[0] == {i: i for i in range(2000)}


@pytest.mark.parametrize(("grain", "credit"), list(product([1, 2, 7, 100], [1, 2, 5, 16])))
def test_grain_and_credit(comm, grain, credit):
    class Rows(Sweep):
        job_dtype = ("f8", 2)
        result_dtype = "f8"

        def process_job(self, job):
            return np.hypot(*job) ** 0.3

    class Objects(Sweep):
        def process_job(self, job):
            return {"norm": np.hypot(*job) ** 0.3}

    class RowsInBlocks(Rows):
        def next_jobs(self, count):
            block = self.job_list[self.at : self.at + count]
            self.at += len(block)
            return block

        def process_jobs(self, jobs, results):
            for i, job in enumerate(jobs):
                results[i] = self.process_job(job)

    rng = np.random.default_rng(11)
    jobs = list(rng.normal(size=(237, 2)))
    for kind in (Rows, Objects, RowsInBlocks):
        expected = kind(jobs, None).run()[0]
        found, failures = value_of(kind(jobs, comm, grain=grain, credit=credit), comm)
        assert failures == {}
        assert found == expected


def test_many_jobs(comm):
    class Squares(JobDispatcher):
        """100,000 small jobs; every one is delivered once, with its own result."""

        job_dtype = result_dtype = "i8"
        count = 100_000

        def reset(self):
            self.at, self.seen = 0, np.zeros(self.count, "i8")

        def next_jobs(self, count):
            first, self.at = self.at, min(self.at + count, self.count)
            return np.arange(first, self.at)

        def process_jobs(self, jobs, results):
            results[:] = jobs * jobs

        def process_results(self, indices, jobs, results):
            assert (indices == jobs).all()
            assert (results == jobs * jobs).all()
            self.seen[indices] += 1

        def postprocess(self):
            return bool((self.seen == 1).all())

    for grain, credit in ((100, 4), (7, 2), (1, 16), (5000, 2)):
        assert value_of(Squares(comm, grain=grain, credit=credit), comm) is True


# ---- compiled kernels -------------------------------------------------------------------------------------------------


class KernelSweep(Sweep):
    job_dtype = result_dtype = "f8"

    def process_job(self, job):
        raise AssertionError("process_job was called although there is a kernel")


@pytest.mark.parametrize(("grain", "credit"), [(1, 1), (1, 4), (13, 2), (400, 2)])
def test_kernel(comm, kernels, grain, credit):
    jobs = np.linspace(-3, 3, 301).tolist()
    offset = ctypes.c_double(0.5)
    cases = [(kernels.square, 0.0), ((kernels.square, None), 0.0), ((kernels.square, ctypes.pointer(offset)), 0.5)]
    for kernel, added in cases:
        for vm, options in ((None, {}), (comm, {}), (comm, {"max_slaves": 0})):
            dispatcher = KernelSweep(jobs, vm, grain=grain, credit=credit, **options)
            dispatcher.kernel = kernel
            results, failures = value_of(dispatcher, comm) if vm else dispatcher.run()
            assert failures == {}
            assert results == {i: job * job + added for i, job in enumerate(jobs)}


class TolerantKernel(KernelSweep):
    job_dtype = result_dtype = "i8"

    def process_failure(self, index, job, error):
        assert index not in self.failures
        self.failures[index] = error


@pytest.mark.parametrize("grain", [1, 10, 300])
def test_kernel_that_fails(comm, kernels, grain):
    for vm, options in ((None, {}), (comm, {}), (comm, {"max_slaves": 0})):
        dispatcher = TolerantKernel(range(300), vm, grain=grain, **options)
        dispatcher.kernel = kernels.fails_on_odd
        results, failures = value_of(dispatcher, comm) if vm else dispatcher.run()
        assert results == {i: 7 * i for i in range(0, 300, 2)}
        assert sorted(failures) == list(range(1, 300, 2))
        for index, error in failures.items():
            assert error.type_name == "KernelError"
            assert error.message == f"the kernel returned {index}"
            assert error.index == index
            assert (error.slave > 0) == (vm is comm and comm.size > 1 and not options)


@pytest.mark.parametrize("length", [3, 300, 100_000])
def test_kernel_with_rows_of_every_size(comm, kernels, length):
    class Sums(KernelSweep):
        job_dtype = ("f8", length)
        kernel = (kernels.sum_row, ctypes.pointer(ctypes.c_int64(length)))

    class Spreads(KernelSweep):
        result_dtype = ("f8", length)
        kernel = (kernels.spread, ctypes.pointer(ctypes.c_int64(length)))

        def process_result(self, index, job, result):
            self.results[index] = same(result, job + np.arange(float(length)))

    for grain in (1, 3):
        jobs = [np.arange(length) + float(i) for i in range(7)]
        assert value_of(Sums(jobs, comm, grain=grain), comm)[0] == {i: job.sum() for i, job in enumerate(jobs)}
        assert value_of(Spreads([float(i) for i in range(7)], comm, grain=grain), comm)[0] == dict.fromkeys(range(7), True)


def test_kernel_and_nan(comm, kernels):
    dispatcher = TolerantKernel([1.0, 2.0, np.inf], comm, grain=2)
    dispatcher.job_dtype = dispatcher.result_dtype = "f8"
    dispatcher.kernel = (kernels.square, np.array([np.nan]).ctypes.data_as(ctypes.c_void_p))
    results, failures = value_of(dispatcher, comm)
    assert failures == {}
    assert all(np.isnan(result) for result in results.values())
    dispatcher.allow_nan = False
    results, failures = value_of(dispatcher, comm)
    assert results == {}
    assert sorted(failures) == [0, 1, 2]
    assert all(error.type_name == "PayloadError" and "NaN" in error.message for error in failures.values())


def test_no_kernel(comm, kernels):
    wrong = ctypes.CDLL(None).abs
    wrong.argtypes = [ctypes.c_int]
    for kernel in (42, "square", wrong, (kernels.square, "text"), (1, 2, 3), ctypes.CFUNCTYPE(None)(0)):
        dispatcher = KernelSweep([1.0], comm)
        dispatcher.kernel = kernel
        outcomes = run(dispatcher, comm)
        assert all(isinstance(outcome.error, KernelError) for outcome in outcomes)
    dispatcher = KernelSweep([1.0], comm)
    dispatcher.kernel, dispatcher.result_dtype = kernels.square, None
    outcomes = run(dispatcher, comm)
    assert all("declare both job_dtype and result_dtype" in str(outcome.error) for outcome in outcomes)

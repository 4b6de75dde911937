"""JobDispatcher with no vm: bad input is refused, and what hooks may keep.

Each refusal names its cause; a bad job ends the run, a bad result is that job's failure.
"""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest

from jd_hpc import JobDispatcher, LocalMachine, PayloadError

RECORD = np.dtype([("x", "f8"), ("n", "i4")])
JOBS = 10


class Squares(JobDispatcher):
    """Squares numbers."""

    def __init__(self, bad=(), **options):
        super().__init__(**options)
        self.bad = bad

    def reset(self):
        self.given, self.results, self.failures = 0, {}, {}

    def next_job(self):
        if self.given == JOBS:
            return None
        self.given += 1
        return float(self.given - 1)

    def process_job(self, job):
        if job in self.bad:
            raise ZeroDivisionError
        return job * job

    def process_result(self, index, job, result):
        self.results[index] = result

    def process_failure(self, index, job, error):
        self.failures[index] = error

    def postprocess(self):
        return len(self.results)


class Numeric(Squares):
    job_dtype = "f8"
    result_dtype = "f8"


# ---- bad input -----------------------------------------------------------------------------------------------------


class Rows(JobDispatcher):
    """Runs the jobs it is given, and returns what it is told to."""

    job_dtype = ("f8", 2)
    result_dtype = ("f8", 2)

    def __init__(self, jobs, result=None, **options):
        super().__init__(**options)
        self.jobs, self.result, self.ended, self.failures = iter(jobs), result, [], []

    def next_job(self):
        return next(self.jobs, None)

    def process_job(self, job):
        return job if self.result is None else self.result

    def process_result(self, index, job, result):
        self.ended.append(index)

    def process_failure(self, index, job, error):
        self.failures.append(error)


class BlockRows(Rows):
    next_job = JobDispatcher.next_job

    def next_jobs(self, count):
        return next(self.jobs, None)


GOOD = [1.0, 2.0]
BAD_ROWS = [
    (1.0, r"has shape \(\) where \(2,\)"),
    ([1.0], r"has shape \(1,\)"),
    ([1.0, 2.0, 3.0], r"has shape \(3,\)"),
    ("text", "has shape|dtype"),
    (["a", "b"], "where float64 was declared"),
    ([1j, 2j], "dtype complex128 where float64"),
    ([None, 1], "dtype object"),
    ([[1.0], [2.0, 3.0]], "cannot become an array|shape"),
    (object(), "dtype object|shape"),
]


@pytest.mark.parametrize(("bad", "said"), BAD_ROWS, ids=[str(number) for number in range(len(BAD_ROWS))])
class TestBadRows:
    def test_job(self, bad, said):
        dispatcher = Rows([GOOD, GOOD, bad])
        with pytest.raises(PayloadError, match=f"what next_job returned.*({said})") as caught:
            dispatcher.run()
        assert caught.value.__notes__ == ["This was job 2."]
        assert dispatcher.ended == [0, 1]

    def test_result(self, bad, said):
        dispatcher = Rows([GOOD], result=bad)
        dispatcher.run()
        assert dispatcher.ended == []
        assert dispatcher.failures[0].type_name == "PayloadError"
        assert "what process_job returned" in dispatcher.failures[0].message


@pytest.mark.parametrize(
    "bad", [[1.0, 2.0], [[1.0], [2.0]], np.zeros((2, 3)), [["a", "b"]], np.zeros((2, 2), complex)], ids=str
)
def test_bad_blocks_of_jobs(bad):
    with pytest.raises(PayloadError, match="what next_jobs returned"):
        BlockRows([bad], grain=8).run()


@pytest.mark.parametrize("bad", [5, 1.5, (i for i in range(3)), object()], ids=lambda bad: type(bad).__name__)
def test_a_block_of_jobs_that_is_no_sequence(bad):
    with pytest.raises(PayloadError, match="next_jobs"):
        BlockRows([bad], grain=8).run()


@pytest.mark.parametrize("base", [Squares, Numeric])
def test_too_many_jobs_in_a_block(base):
    class Pushy(base):
        def next_jobs(self, count):
            return [0.0] * (count + 1)

    with pytest.raises(PayloadError, match=r"next_jobs\(4\) returned 5 jobs; return at most as many as asked for"):
        Pushy(grain=4).run()


@pytest.mark.parametrize("end", [None, [], np.zeros((0, 2))], ids=str)
def test_a_block_of_no_jobs_is_the_end(end):
    dispatcher = BlockRows([np.ones((2, 2)), end], grain=2)
    dispatcher.run()
    assert dispatcher.ended == [0, 1]


@pytest.mark.parametrize("grain", [1, 2])
@pytest.mark.parametrize("form", [Rows, BlockRows])
def test_nan_in_a_job(form, grain):
    jobs = [[1.0, math.nan]]
    form = type("NoNaN", (form,), {"allow_nan": False})
    with pytest.raises(PayloadError, match="contains NaN, and allow_nan is False"):
        form([jobs] if form.__base__ is BlockRows else jobs, grain=grain).run()
    allowed = form.__base__
    dispatcher = allowed([jobs] if allowed is BlockRows else jobs, grain=grain)
    dispatcher.run()
    assert dispatcher.ended == [0]


def test_nan_in_a_result_is_that_jobs_failure():
    class NoNaN(Rows):
        allow_nan = False

        def process_job(self, job):
            return [job[0], math.nan if job[0] == 1 else 0]

    dispatcher = NoNaN([[float(i), 0] for i in range(3)], grain=3)
    dispatcher.run()
    assert dispatcher.ended == [0, 2]
    assert [(error.index, error.type_name) for error in dispatcher.failures] == [(1, "PayloadError")]
    assert "what process_job returned contains NaN" in dispatcher.failures[0].message


def test_nan_in_a_block_of_results_fails_its_jobs_only():
    class NoNaN(Rows):
        allow_nan = False

        def process_jobs(self, jobs, results):
            results[:] = jobs
            results[1] = math.nan

    dispatcher = NoNaN([[float(i), 0] for i in range(3)], grain=3)
    dispatcher.run()
    assert dispatcher.ended == [0, 2]
    assert [error.index for error in dispatcher.failures] == [1]


@pytest.mark.parametrize("name", ["job_dtype", "result_dtype"])
def test_a_dtype_that_cannot_travel(name):
    dispatcher = type("Wrong", (Squares,), {name: object})()
    with pytest.raises(PayloadError, match=f"{name}: .*use {name} = None"):
        dispatcher.run()
    assert not hasattr(dispatcher, "given"), "reset was called"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"grain": 0}, "grain = 0 is out of range"),
        ({"grain": -1}, "grain = -1"),
        ({"grain": 1 << 31}, "grain"),
        ({"credit": 0}, "credit = 0"),
        ({"credit": 5000}, "credit = 5000 is out of range: it can be 1 to 1024"),
        ({"max_slaves": -1}, "max_slaves = -1"),
        ({"min_slaves": -1}, "min_slaves = -1"),
        ({"debug": -1}, "debug = -1"),
        ({"debug": 3}, "debug = 3"),
        ({"min_slaves": 3, "max_slaves": 2}, "min_slaves = 3 is more than max_slaves = 2"),
        ({"max_attempts": 0}, "max_attempts = 0"),
        ({"max_attempts": 256}, "max_attempts = 256"),
        ({"job_timeout_s": 0}, "job_timeout_s = 0"),
        ({"job_timeout_s": -1.0}, "job_timeout_s = -1"),
        ({"job_timeout_s": float("nan")}, "job_timeout_s = nan"),
        ({"heartbeat_s": 0.001}, "heartbeat_s = 0.001"),
        ({"heartbeat_s": -1}, "heartbeat_s = -1"),
        ({"liveness_timeout_s": 0.5, "heartbeat_s": 0.5}, "at least twice heartbeat_s"),
        ({"liveness_timeout_s": float("inf")}, "liveness_timeout_s = inf"),
        ({"job_timeout_s": 1e10}, "job_timeout_s = 10000000000.0 is out of range: .*less than 1e9"),
        ({"memory_limit": 1 << 30}, "memory_limit needs isolate"),
        ({"memory_limit": 1000, "isolate": True}, "memory_limit = 1000"),
    ],
)
def test_options_out_of_range(options, named):
    with pytest.raises(ValueError, match=named):
        JobDispatcher(**options)


@pytest.mark.parametrize("option", ["grain", "credit", "max_slaves", "min_slaves", "debug", "max_attempts", "memory_limit"])
@pytest.mark.parametrize("value", [1.5, "2", [1]])
def test_options_of_another_type_are_named(option, value):
    with pytest.raises((TypeError, ValueError), match=option):
        JobDispatcher(**{option: value})


def test_options_that_are_fine():
    dispatcher = JobDispatcher(None, np.int64(4), True, grain=np.int32(7), credit=1)
    assert (dispatcher.max_slaves, dispatcher.min_slaves, dispatcher.grain, dispatcher.credit) == (4, 1, 7, 1)
    assert isinstance(dispatcher.machine, LocalMachine)
    assert Squares(max_slaves=0).run() == JOBS
    assert Squares(min_slaves=5).run() == JOBS


# ---- what hooks may keep -------------------------------------------------------------------------------------------

SHAPES = {"scalar": "f8", "row": ("f8", 3), "matrix": ("i4", (2, 2)), "record": RECORD}


def value_of(name, i):
    if name == "record":
        return (float(i), i)
    return np.full(np.dtype(SHAPES[name]).shape, i, np.dtype(SHAPES[name]).base)


def is_read_only(value):
    """Whether a row cannot be changed: a number cannot by nature."""
    if isinstance(value, np.generic) and value.dtype.names is None:
        return True
    try:
        value["x" if value.dtype.names else ...] = 0
    except ValueError:
        return True
    return False


class Keeps(JobDispatcher):
    """Keeps every row that a hook gets. Its jobs are all in one array of its own, which it uses again."""

    def __init__(self, name, grain):
        super().__init__(grain=grain)
        self.name, self.mine, self.given, self.kept = name, np.zeros((), SHAPES[name]), 0, []

    def next_job(self):
        if self.given == 9:
            return None
        self.mine[...] = value_of(self.name, self.given)
        self.given += 1
        return self.mine

    def process_job(self, job):
        self.kept.append((len(self.kept), job))
        return job

    def process_result(self, index, job, result):
        self.seen += [(index, job), (index, result)]

    def reset(self):
        self.seen = []


@pytest.mark.parametrize("grain", [1, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_rows_may_be_kept_and_cannot_be_changed(name, grain):
    kind = type("KeepsRows", (Keeps,), {"job_dtype": SHAPES[name], "result_dtype": SHAPES[name]})
    dispatcher = kind(name, grain)
    dispatcher.run()
    assert (len(dispatcher.kept), len(dispatcher.seen)) == (9, 18)
    for index, value in dispatcher.kept + dispatcher.seen:
        assert np.array_equal(value, np.array(value_of(name, index), np.dtype(SHAPES[name]).base))
        assert is_read_only(value)


@pytest.mark.parametrize("bad", [(), (1, 5)])
@pytest.mark.parametrize("grain", [1, 4])
def test_blocks_may_be_kept_and_cannot_be_changed(grain, bad):
    class Keeps(Numeric):
        def process_results(self, indices, jobs, results):
            self.kept.append((indices, jobs, results))

    dispatcher = Keeps(grain=grain, bad=bad)
    dispatcher.kept = []
    dispatcher.run()
    indices, jobs, results = (np.concatenate(column) for column in zip(*dispatcher.kept, strict=True))
    assert indices.tolist() == [i for i in range(JOBS) if i not in bad]
    assert indices.dtype == np.int64
    assert jobs.tolist() == indices.tolist()
    assert results.tolist() == (indices**2).tolist()
    for arrays in dispatcher.kept:
        assert [array.flags.writeable for array in arrays] == [False] * 3


def test_jobs_on_the_slave_are_read_only_in_blocks():
    class Writes(Numeric):
        def process_jobs(self, jobs, results):
            jobs[0] = 7

    dispatcher = Writes()
    dispatcher.run()
    assert "read-only" in dispatcher.failures[0].message


def test_the_users_block_of_jobs_may_be_used_again():
    class Reuses(Numeric):
        mine = np.zeros(4)

        def next_jobs(self, count):
            n = min(count, JOBS - self.given)
            self.mine[:n] = np.arange(self.given, self.given + n)
            self.given += n
            return self.mine[:n]

        def process_result(self, index, job, result):
            self.results[index] = job

    dispatcher = Reuses(grain=4)
    dispatcher.run()
    assert dispatcher.results == {i: i for i in range(JOBS)}
    Reuses.mine[:] = 5  # it is still the user's own


@pytest.mark.parametrize("option", ["job_timeout_s", "heartbeat_s", "liveness_timeout_s"])
@pytest.mark.parametrize("value", ["2", [1]])
def test_times_of_another_type_are_named(option, value):
    with pytest.raises(TypeError, match=option):
        JobDispatcher(**{option: value})


# ---- jobs that kill the process that runs them -----------------------------------------------------------------------


class Crashing(JobDispatcher):
    """Job 2 always crashes; job 4 does so twice."""

    def __init__(self, folder, **options):
        super().__init__(isolate=True, **options)
        self.folder = folder

    def reset(self):
        self.todo = iter(range(6))
        self.results = {}
        self.failures = {}

    def next_job(self):
        return next(self.todo, None)

    def process_job(self, job):
        times = self.folder / str(job)
        count = len(times.read_text()) if times.exists() else 0
        times.write_text("x" * (count + 1))
        if job == 2 or (job == 4 and count < 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return 10 * job

    def process_result(self, index, job, result):
        self.results[index] = result

    def process_failure(self, index, job, error):
        self.failures[index] = error


@pytest.mark.parametrize("grain", [1, 4])
def test_isolated_jobs_that_crash_have_several_tries(tmp_path, grain):
    sweep = Crashing(tmp_path, grain=grain)
    sweep.run()
    assert sweep.results == {0: 0, 1: 10, 3: 30, 4: 40, 5: 50}
    assert list(sweep.failures) == [2]
    assert sweep.failures[2].attempts == [(0, "killed by SIGKILL")] * 3
    assert "given up after 3 attempts" in str(sweep.failures[2])
    assert len((tmp_path / "4").read_text()) == 3

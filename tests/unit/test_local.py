"""JobDispatcher with no vm: all hooks in all forms, in this process."""

from __future__ import annotations

import logging
import math
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import jd_hpc
from jd_hpc import JobDispatcher, JobError, LocalMachine, PayloadError

RECORD = np.dtype([("x", "f8"), ("n", "i4")])
JOBS = 10


class Squares(JobDispatcher):
    """Squares numbers, and remembers every call of a hook."""

    def __init__(self, jobs=JOBS, bad=(), **options):
        super().__init__(**options)
        self.job_count, self.bad = jobs, bad
        self.calls = []

    def reset(self):
        self.calls.append("reset")
        self.given, self.results, self.failures = 0, {}, {}

    def next_job(self):
        self.calls.append("next")
        if self.given == self.job_count:
            return None
        self.given += 1
        return float(self.given - 1)

    def process_job(self, job):
        self.calls.append(f"run {int(job)}")
        if job in self.bad:
            raise ZeroDivisionError(f"job {int(job)} is bad")
        return job * job

    def process_result(self, index, job, result):
        self.calls.append(f"result {index}")
        assert index not in self.results
        self.results[index] = (float(job), float(result))

    def process_failure(self, index, job, error):
        self.calls.append(f"failure {index}")
        assert index not in self.failures
        self.failures[index] = (float(job), error)

    def postprocess(self):
        self.calls.append("post")
        return len(self.results)

    def on_startup(self):
        self.calls.append("startup")

    def on_shutdown(self):
        self.calls.append("shutdown")


class Numeric(Squares):
    job_dtype = "f8"
    result_dtype = "f8"


class NextBlocks:
    def next_jobs(self, count):
        block = [float(i) for i in range(self.given, min(self.given + count, self.job_count))]
        self.given += len(block)
        return (np.array(block) if self.job_dtype else block) if block else None


class RunBlocks:
    def process_jobs(self, jobs, results):
        assert len(jobs) == len(results)
        for i, job in enumerate(jobs):
            results[i] = self.process_job(job)


class ResultBlocks:
    def process_results(self, indices, jobs, results):
        assert len(indices) == len(jobs) == len(results) > 0
        for index, job, result in zip(indices, jobs, results, strict=True):
            self.process_result(int(index), job, result)


FORMS = [(a, b, c) for a in (0, NextBlocks) for b in (0, RunBlocks) for c in (0, ResultBlocks)]
FORM_NAMES = ["-".join(form.__name__ if form else "single" for form in forms) for forms in FORMS]


@pytest.mark.parametrize("grain", [1, 3, 5, 64])
@pytest.mark.parametrize("base", [Squares, Numeric])
@pytest.mark.parametrize("forms", FORMS, ids=FORM_NAMES)
class TestForms:
    def make(self, base, forms, **options):
        return type("Mixed", (*(form for form in forms if form), base), {})(**options)

    def test_every_job_ends_once(self, base, forms, grain):
        dispatcher = self.make(base, forms, grain=grain)
        assert dispatcher.run() == JOBS
        assert dispatcher.results == {i: (float(i), float(i * i)) for i in range(JOBS)}
        assert list(dispatcher.results) == list(range(JOBS))
        assert dispatcher.failures == {}

    def test_failures_go_to_process_failure(self, base, forms, grain):
        dispatcher = self.make(base, forms, grain=grain, bad=(2, 3, 9))
        dispatcher.run()
        bad = {2, 3, 9}
        if RunBlocks in forms:  # a block fails as a whole
            bad = {i for i in range(JOBS) if {i // grain * grain + k for k in range(grain)} & bad}
        assert set(dispatcher.failures) == bad
        assert set(dispatcher.results) == set(range(JOBS)) - bad
        for index, (job, error) in dispatcher.failures.items():
            assert (job, error.index, error.slave) == (index, index, 0)
            assert isinstance(error, JobError)
            assert error.type_name == "ZeroDivisionError"


# ---- order of the hooks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [Squares, Numeric])
def test_order_of_the_hooks(base):
    dispatcher = base(jobs=2)
    dispatcher.run()
    jobs = [f"next,run {i},result {i}".split(",") for i in range(2)]
    assert dispatcher.calls == ["startup", "reset", *jobs[0], *jobs[1], "next", "post", "shutdown"]


@pytest.mark.parametrize("base", [Squares, Numeric])
def test_order_of_the_hooks_in_batches(base):
    dispatcher = base(jobs=4, grain=3, bad=(1,))
    dispatcher.run()
    first = ["next"] * 3 + ["run 0", "run 1", "run 2", "result 0", "failure 1", "result 2"]
    assert dispatcher.calls == [
        "startup",
        "reset",
        *first,
        "next",
        "next",
        "run 3",
        "result 3",
        "next",
        "post",
        "shutdown",
    ]


def test_no_jobs_at_all():
    dispatcher = Squares(jobs=0)
    assert dispatcher.run() == 0
    assert dispatcher.calls == ["startup", "reset", "next", "post", "shutdown"]


@pytest.mark.parametrize("base", [Squares, Numeric])
def test_run_twice_starts_anew(base):
    dispatcher = base(bad=(4,))
    dispatcher.run()
    calls = list(dispatcher.calls)
    dispatcher.calls.clear()
    dispatcher.run()
    assert dispatcher.calls == calls
    assert sorted(dispatcher.results) == [0, 1, 2, 3, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "hook", ["on_startup", "reset", "next_job", "process_result", "process_failure", "postprocess"]
)
def test_an_exception_of_a_hook_comes_out_of_run_after_on_shutdown(hook):
    dispatcher = Squares(bad=(3,))

    def fails(*args):
        raise LookupError(hook)

    setattr(dispatcher, hook, fails)
    with pytest.raises(LookupError, match=hook):
        dispatcher.run()
    assert dispatcher.calls[-1] == "shutdown"
    assert dispatcher.calls.count("shutdown") == 1


def test_hooks_can_be_set_on_the_instance():
    dispatcher = Numeric()
    got = []
    dispatcher.process_results = lambda indices, jobs, results: got.extend(indices.tolist())
    dispatcher.process_jobs = lambda jobs, results: np.multiply(jobs, jobs, results)
    dispatcher.run()
    assert got == list(range(JOBS))
    assert "run 0" not in dispatcher.calls


# ---- results make new jobs -----------------------------------------------------------------------------------------


class Tree(JobDispatcher):
    """Each result makes two new jobs, down to a depth: next_job says None again and again in between."""

    def __init__(self, depth, **options):
        super().__init__(**options)
        self.depth, self.todo, self.seen, self.nones = depth, [1], [], 0

    def next_job(self):
        if self.todo:
            return self.todo.pop()
        self.nones += 1
        return None

    def process_job(self, job):
        return [2 * job, 2 * job + 1]

    def process_result(self, index, job, result):
        assert index == len(self.seen)
        self.seen.append(int(job))
        self.todo += [int(child) for child in result if child < 2**self.depth]


class NumericTree(Tree):
    job_dtype = "i8"
    result_dtype = ("i8", 2)


@pytest.mark.parametrize("grain", [1, 3, 1000])
@pytest.mark.parametrize("kind", [Tree, NumericTree])
def test_ask_and_tell(kind, grain):
    dispatcher = kind(6, grain=grain)
    dispatcher.run()
    assert sorted(dispatcher.seen) == list(range(1, 64))
    assert dispatcher.nones > (0 if grain == 1 else 2)


def test_a_failure_may_make_a_new_job_too():
    class Again(Squares):
        def process_failure(self, index, job, error):
            super().process_failure(index, job, error)
            self.job_count += 1

    dispatcher = Again(jobs=3, bad=(1, 3))
    dispatcher.run()
    assert sorted(dispatcher.results) == [0, 2, 4]
    assert sorted(dispatcher.failures) == [1, 3]


# ---- failures ------------------------------------------------------------------------------------------------------


class Strict(Squares):
    process_failure = JobDispatcher.process_failure


def test_by_default_a_failure_ends_the_run_and_is_raised():
    dispatcher = Strict(bad=(3,))
    with pytest.raises(JobError, match="job 3 failed on the master: ZeroDivisionError: job 3 is bad") as caught:
        dispatcher.run()
    error = caught.value
    assert (error.index, error.slave, error.type_name) == (3, 0, "ZeroDivisionError")
    assert "in process_job" in error.remote_traceback
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert sorted(dispatcher.results) == [0, 1, 2]
    assert "post" not in dispatcher.calls
    assert dispatcher.calls[-1] == "shutdown"


class OwnStop(BaseException):
    pass


@pytest.mark.parametrize("error", [SystemExit(3), OwnStop("own"), GeneratorExit(), StopIteration(1), MemoryError()])
@pytest.mark.parametrize("form", [(), (RunBlocks,)])
def test_any_exception_fails_only_its_job(error, form):
    class Raises(*form, Squares):
        def process_job(self, job):
            if job == 1:
                raise error
            return job

    dispatcher = Raises(jobs=3)
    dispatcher.run()
    assert list(dispatcher.failures) == [1]
    assert dispatcher.failures[1][1].type_name == type(error).__name__
    assert sorted(dispatcher.results) == [0, 2]


@pytest.mark.parametrize("form", [(), (RunBlocks,)])
def test_keyboard_interrupt_is_no_jobs_failure(form):
    class Interrupted(*form, Squares):
        def process_job(self, job):
            raise KeyboardInterrupt

    dispatcher = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        dispatcher.run()
    assert dispatcher.failures == {}
    assert dispatcher.calls[-1] == "shutdown"


def test_a_block_that_changes_the_number_of_results_fails():
    class Grows(Squares):
        def process_jobs(self, jobs, results):
            results.append(1)

    dispatcher = Grows(grain=4, jobs=4)
    dispatcher.run()
    assert sorted(dispatcher.failures) == [0, 1, 2, 3]
    assert "changed the length of results from 4 to 5" in dispatcher.failures[0][1].message


def test_a_dispatcher_without_hooks_says_what_to_define():
    with pytest.raises(NotImplementedError, match="Empty must define next_job"):
        type("Empty", (JobDispatcher,), {})().run()
    with pytest.raises(JobError, match=r"Empty must define process_job.*, process_jobs.* or a kernel"):
        type("Empty", (JobDispatcher,), {"next_job": lambda self: 1})().run()


def test_a_job_error_can_be_pickled():
    with pytest.raises(JobError) as caught:
        Strict(bad=(0,)).run()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


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
    assert "next" not in dispatcher.calls


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
    ],
)
def test_options_out_of_range(options, named):
    with pytest.raises(ValueError, match=named):
        JobDispatcher(**options)


@pytest.mark.parametrize("option", ["grain", "credit", "max_slaves", "min_slaves", "debug"])
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

    dispatcher = Writes(jobs=1)
    dispatcher.run()
    assert "read-only" in dispatcher.failures[0][1].message


def test_the_users_block_of_jobs_may_be_used_again():
    class Reuses(Numeric):
        mine = np.zeros(4)

        def next_jobs(self, count):
            n = min(count, self.job_count - self.given)
            self.mine[:n] = np.arange(self.given, self.given + n)
            self.given += n
            return self.mine[:n]

        def process_result(self, index, job, result):
            self.results[index] = job

    dispatcher = Reuses(grain=4)
    dispatcher.run()
    assert dispatcher.results == {i: i for i in range(JOBS)}
    Reuses.mine[:] = 5  # it is still the user's own


# ---- no MPI --------------------------------------------------------------------------------------------------------


def in_a_process(code):
    """Run a program that uses jd_hpc: (stdout, stderr)."""
    search = os.pathsep.join([str(Path(jd_hpc.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": search},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


ONE_RUN = """
    import sys
    from jd_hpc import JobDispatcher

    class Count(JobDispatcher):
        def reset(self):
            self.todo = [1, 2, 3]
        def next_job(self):
            return self.todo.pop() if self.todo else None
        def process_job(self, job):
            return job
        def postprocess(self):
            return "done"
"""


def test_without_a_vm_no_mpi_is_imported():
    out, err = in_a_process(
        ONE_RUN
        + """
    answer = Count().run()
    print(answer, [name for name in sys.modules if name.startswith("mpi4py") or name.startswith("jd_hpc._core")])
    """
    )
    assert out == "done []\n"
    assert err == ""


# ---- logging -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_logger():
    """The package's logger as it is found, whatever a test does to it."""
    logger = logging.getLogger("jd_hpc")
    before = logger.level, list(logger.handlers)
    yield logger
    logger.level, logger.handlers[:] = before


@pytest.mark.parametrize("debug", [0, 1, 2])
def test_what_is_logged(quiet_logger, caplog, debug):
    Squares(debug=debug).run()
    assert [record.getMessage() for record in caplog.records] == ["10 jobs were evaluated locally"][: min(debug, 1)]
    assert all(record.name == "jd_hpc" for record in caplog.records)


def test_a_silent_run_after_a_loud_one_is_silent(quiet_logger, caplog):
    Squares(debug=2).run()
    caplog.clear()
    Squares().run()
    assert caplog.records == []


def test_lines_go_to_stderr_if_no_logging_was_set_up():
    out, err = in_a_process(ONE_RUN + "    [Count(debug=1).run() for _ in range(2)]; Count().run()")
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2, "one line for each run that is not silent, and no line twice"
    assert all(line.endswith(" jd_hpc 3 jobs were evaluated locally") for line in lines)


def test_a_users_own_logging_is_left_alone():
    out, err = in_a_process(
        "    import logging; logging.basicConfig(stream=__import__('sys').stdout, format='own %(message)s')\n"
        + ONE_RUN
        + "    Count(debug=1).run()"
    )
    assert out == "own 3 jobs were evaluated locally\n"
    assert err == ""

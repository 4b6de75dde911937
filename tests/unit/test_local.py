"""JobDispatcher with no vm: all hooks in all forms, in this process."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import numpy as np
import pytest

import jd_hpc
from jd_hpc import JobDispatcher, JobError

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


@pytest.mark.parametrize("grain", [1, 5])
def test_jobs_and_results_are_not_collected(grain):
    """Memory is bounded by the grain, not by the number of jobs."""
    living = weakref.WeakSet()

    class Token:
        def __init__(self):
            living.add(self)

    class Tokens(Squares):
        most = 0

        def next_job(self):
            self.given += 1
            self.most = max(self.most, len(living))
            return Token() if self.given <= self.job_count else None

        def process_job(self, job):
            return Token()

        def process_result(self, index, job, result):
            self.most = max(self.most, len(living))

    dispatcher = Tokens(jobs=200, grain=grain)
    dispatcher.run()
    assert 2 * grain <= dispatcher.most <= 3 * grain
    assert len(living) == 0


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

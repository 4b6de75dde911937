"""Jobs in a process of their own: however it ends, the job that ran fails, and every other job has its result."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import pickle
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jd_hpc import child, isolate
from jd_hpc._batch import Buffer, Evaluator, Rows, SharedNumber
from jd_hpc.errors import Failure, IsolationError, PayloadError, ProcessDiedError
from jd_hpc.isolate import IsolatedEvaluator
from jd_hpc.kernel import resolve

PAIR = np.dtype(("f8", 2))  # a job: what to do, and a number
DOUBLE = np.dtype("f8")
FINE, FAIL, KILL, SEGFAULT, EXIT_0, EXIT_3, ABORT, HANG, EAT, UNPICKLABLE, NAN = range(11)
WATCHDOG_S = 20
LIMIT = 100_000_000


def children():
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def mappings():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "jd_hpc (deleted)" in line and "memfd" in line]


def is_open(fd):
    """Whether it still is, now that nobody lists the folder."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def open_files():
    return sorted(fd for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()] if is_open(fd))


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Ends a test that hangs, with its traceback; afterwards there are no children, files or memory that were not there before."""
    gc.collect()
    before = children(), open_files(), len(mappings())
    faulthandler.dump_traceback_later(WATCHDOG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    gc.collect()
    assert (children(), open_files(), len(mappings())) == before


@pytest.fixture
def isolated():
    """Makes evaluators, and closes them in the end."""
    made = []

    def make(inner, grain=10, **options):
        made.append(IsolatedEvaluator(inner, grain, **options))
        return made[-1]

    yield make
    for evaluator in made:
        evaluator.close()
    made.clear()


def act(what, number):
    """What a job does; returns twice its number."""
    what = int(what)
    if what == FAIL:
        raise ZeroDivisionError(f"number {number:g}")
    ends = {KILL: kill, SEGFAULT: lambda: ctypes.string_at(0), ABORT: os.abort, HANG: hang}
    if what in ends:
        faulthandler.disable()  # not to be told of what is meant to be
        ends[what]()
    if what in (EXIT_0, EXIT_3):
        os._exit(0 if what == EXIT_0 else 3)
    if what == EAT:
        np.ones(4 * LIMIT // 8)
    return float("nan") if what == NAN else 2.0 * number


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    """Sleep with the GIL held."""
    ctypes.PyDLL(None).sleep(1000)


def process_job(job):
    return act(*job)


def process_objects(job):
    number = process_job(job)
    return (lambda: 0) if job[0] == UNPICKLABLE else {"number": number}


def process_rows_to_rows(jobs, results):
    for at, job in enumerate(jobs):
        results[at] = process_job(job)


def process_any_to_objects(jobs, results):
    for at, job in enumerate(jobs):
        results[at] = process_objects(job)


KERNEL_SOURCE = """
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

int32_t kernel(const void *job, void *result, void *user_data)
{
    const double *x = job;
    int what = x[0];
    if (what == 1) return -7;
    if (what == 2) raise(SIGKILL);
    if (what == 3) { signal(SIGSEGV, SIG_DFL); raise(SIGSEGV); }
    if (what == 4 || what == 5) _exit(what == 4 ? 0 : 3);
    if (what == 6) { signal(SIGABRT, SIG_DFL); abort(); }
    if (what == 7) for (;;) sleep(1000);
    *(double *)result = what == 10 ? NAN : 2 * x[1];
    return 0;
}
"""


@pytest.fixture(scope="session")
def kernel(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "k.c").write_text(KERNEL_SOURCE)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "k.c", "-o", "k.so"], cwd=folder, check=True, timeout=60)
    return resolve(ctypes.CDLL(str(folder / "k.so")).kernel)


FORMS = [
    "single rows rows",
    "single rows objects",
    "single objects rows",
    "single objects objects",
    "block rows rows",
    "block rows objects",
    "block objects rows",
    "block objects objects",
    "kernel rows rows",
]


class Case:
    """An evaluator of one of the forms, and how it is called."""

    def __init__(self, form, request, allow_nan=True):
        self.form, given, returned = form.split()
        self.job_rows = Rows(PAIR) if given == "rows" else None
        self.result_rows = Rows(DOUBLE) if returned == "rows" else None
        single = process_job if self.result_rows else process_objects
        block = None
        if self.form == "block":
            block = process_rows_to_rows if self.result_rows else process_any_to_objects
        code = request.getfixturevalue("kernel") if self.form == "kernel" else None
        self.inner = Evaluator(single, block, self.job_rows, self.result_rows, allow_nan, code)

    def jobs(self, acts):
        listed = [(what, float(at)) for at, what in enumerate(acts)]
        return np.array(listed, "f8") if self.job_rows else listed

    def run(self, evaluator, acts):
        """Return results, None for those that failed, and failures by offset."""
        count = len(acts)
        out = Buffer(8 * 10, self.result_rows, 0, True) if self.result_rows else None
        results = None if self.result_rows else [None] * count
        failures = evaluator.evaluate(self.jobs(acts), count, out, results)
        assert len({at for at, _ in failures}) == len(failures)
        failures = dict(failures)
        if out is not None:
            results = [None if at in failures else float(out.rows[at]) for at in range(count)]
        else:
            results = [None if at in failures else result["number"] for at, result in enumerate(results)]
        return results, failures


@pytest.fixture(params=FORMS)
def case(request):
    return Case(request.param, request)


def good(count):
    return [2.0 * at for at in range(count)]


def test_results_are_those_of_the_plain_form(case, isolated):
    evaluator = isolated(case.inner)
    for count in (1, 10, 3, 10):
        assert case.run(evaluator, [FINE] * count) == case.run(case.inner, [FINE] * count) == (good(count), {})
    assert evaluator.kernel is None
    assert len(children()) == 1


def test_the_child_is_forked_at_the_first_batch_and_kept(isolated):
    state = {"calls": 0}

    def count(job):
        state["calls"] += 1
        return state["calls"], os.getpid()

    evaluator = isolated(Evaluator(count, None, None, None, True))
    assert children() == []
    state["calls"] = 100  # prepared before the first batch
    results = [None] * 3
    for first in (101, 104):
        assert evaluator.evaluate([0, 0, 0], 3, None, results) == []
        assert [calls for calls, _ in results] == [first, first + 1, first + 2]
        assert {pid for _, pid in results} == set(children())
    assert state["calls"] == 100


# ---- deaths --------------------------------------------------------------------------------------------------------

ENDS = {
    KILL: "killed by SIGKILL",
    SEGFAULT: "killed by SIGSEGV",
    EXIT_0: "left with exit code 0",
    EXIT_3: "left with exit code 3",
    ABORT: "killed by SIGABRT",
    HANG: "ran longer than job_timeout_s = 0.1",
    EAT: f"over memory_limit = {LIMIT} bytes",
}


@pytest.mark.parametrize("position", ["first", "middle", "last"])
@pytest.mark.parametrize("end", ENDS, ids=lambda end: ENDS[end].split(" =")[0])
def test_a_death_costs_the_job_that_ran(case, isolated, end, position):
    if case.form == "kernel" and end == EAT:
        pytest.skip("C has its own ways to run out of memory")
    options = {"job_timeout_s": 0.1} if end == HANG else {}
    if end == EAT:
        options["memory_limit"] = LIMIT
    evaluator = isolated(case.inner, **options)
    at = {"first": 0, "middle": 2, "last": 4}[position]
    acts = [FINE] * 5
    acts[at] = end
    results, failures = case.run(evaluator, acts)
    if case.form == "block":
        assert set(failures) == set(range(5))
        assert len({id(error) for error in failures.values()}) == 1
    else:
        assert list(failures) == [at]
        assert [result for result in results if result is not None] == [2.0 * i for i in range(5) if i != at]
    how = ENDS[end] + (" times 5 jobs" if end == HANG and case.form == "block" else "")
    error = failures[at]
    assert type(error) is ProcessDiedError
    assert error.how == how
    assert str(error) == f"the process that ran the job died: {how}"
    assert case.run(evaluator, [FINE] * 10) == (good(10), {})
    assert len(children()) == 1


@pytest.mark.parametrize("form", ["single rows rows", "single objects objects", "kernel rows rows"])
def test_failures_before_a_death_are_kept_and_every_death_is_told(form, request, isolated):
    case = Case(form, request)
    evaluator = isolated(case.inner)
    results, failures = case.run(evaluator, [KILL, FAIL, FINE, EXIT_3, FAIL, FAIL, FINE, KILL, FINE])
    assert results == [None, None, 4.0, None, None, None, 12.0, None, 16.0]
    told = {at: Failure.of(error) for at, error in failures.items()}
    assert {told[at].type_name for at in (1, 4, 5)} == {"KernelError" if case.form == "kernel" else "ZeroDivisionError"}
    assert [failures[at].how for at in (0, 3, 7)] == ["killed by SIGKILL", "left with exit code 3", "killed by SIGKILL"]


def test_a_nan_before_a_death_is_found(request, isolated):
    case = Case("kernel rows rows", request, allow_nan=False)
    results, failures = case.run(isolated(case.inner), [FINE, NAN, FINE, KILL, NAN])
    assert results == [0.0, None, 4.0, None, None]
    assert [Failure.of(failures[at]).type_name for at in (1, 3, 4)] == ["PayloadError", "ProcessDiedError", "PayloadError"]


@pytest.mark.parametrize("form", ["single rows rows", "kernel rows rows", "block rows rows"])
def test_the_child_is_replaced_at_once(form, request, isolated):
    case = Case(form, request)
    evaluator = isolated(case.inner)
    case.run(evaluator, [FINE])
    start_s = time.monotonic()
    case.run(evaluator, [KILL])
    assert case.run(evaluator, [FINE]) == ([0.0], {})
    assert time.monotonic() - start_s < 5


def test_a_child_that_dies_between_batches_costs_nothing(case, isolated):
    evaluator = isolated(case.inner)
    for _ in range(4):
        assert case.run(evaluator, [FINE] * 3) == (good(3), {})
        os.kill(children()[0], signal.SIGKILL)


def test_many_short_jobs_are_not_over_the_timeout(isolated):
    evaluator = isolated(Evaluator(time.sleep, None, None, None, True), job_timeout_s=1)
    assert evaluator.evaluate([0.3] * 4, 4, None, [None] * 4) == []


def test_what_a_job_left_hanging_costs_the_next_one_no_attempt(isolated):
    """A thread that takes the GIL and keeps it, while no job runs."""

    def start(job):
        if job == 0:
            threading.Timer(0.1, hang).start()
        return job

    evaluator = isolated(Evaluator(start, None, None, None, True), job_timeout_s=1)
    results = [None]
    assert evaluator.evaluate([0], 1, None, results) == []
    time.sleep(0.5)
    assert evaluator.evaluate([1], 1, None, results) == []
    assert results == [1]


def test_what_a_job_started_ends_with_it(isolated, tmp_path):
    def start(job):
        process = subprocess.Popen(["sleep", "1000"])
        (tmp_path / "pid").write_text(str(process.pid))
        process.wait()

    evaluator = isolated(Evaluator(start, None, None, None, True), job_timeout_s=1)
    [(_, error)] = evaluator.evaluate([0], 1, None, [None])
    assert error.how == "ran longer than job_timeout_s = 1"
    stat = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":  # whoever is process 1 may be slow to take it
        time.sleep(0.01)


# ---- exceptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS[:-1])
def test_an_exception_comes_as_without_isolation(form, request, isolated):
    case = Case(form, request)
    acts = [FINE, FAIL, FINE]
    plain_results, plain = case.run(case.inner, acts)
    results, failures = case.run(isolated(case.inner), acts)
    assert results == plain_results
    assert set(failures) == set(plain)
    for at, failure in failures.items():
        expected = Failure.of(plain[at])
        assert failure[:2] == expected[:2] == ("ZeroDivisionError", "number 1")
        assert failure.traceback == expected.traceback
        assert type(failure.exception()) is ZeroDivisionError
    assert Failure.of_all(failures.items()) == failures
    assert len({id(failure) for failure in failures.values()}) == 1


def test_a_kernels_failure_comes_as_without_isolation(request, isolated):
    case = Case("kernel rows rows", request)
    results, failures = case.run(isolated(case.inner), [FINE, FAIL, FINE])
    assert results == [0.0, None, 4.0]
    assert Failure.of(failures[1]).message == "the kernel returned -7"


def raising(error):
    def hook(job):
        raise error

    return hook


@pytest.mark.parametrize("error", [SystemExit(3), MemoryError(), GeneratorExit()], ids=repr)
def test_unusual_exceptions_are_ordinary_failures(isolated, error):
    evaluator = isolated(Evaluator(raising(error), None, None, None, True))
    [(at, failure)] = evaluator.evaluate([0], 1, None, [None])
    before = children()
    assert (at, type(failure.exception())) == (0, type(error))
    evaluator.evaluate([0], 1, None, [None])
    assert children() == before


def test_a_result_that_cannot_be_pickled_is_that_jobs_failure(request, isolated):
    for form in ("single rows objects", "block objects objects"):
        results, failures = Case(form, request).run(isolated(Case(form, request).inner), [FINE, UNPICKLABLE, FINE])
        assert results == [0.0, None, 4.0]
        assert failures[1].type_name == "PayloadError"
        assert failures[1].message.startswith("what process_job returned cannot be pickled: ")


class Leaves:
    """Leaves when it is pickled."""

    def __reduce__(self):
        raise SystemExit(3)


def test_pickling_cannot_end_the_child(isolated):
    [(at, failure)] = isolated(Evaluator(lambda job: Leaves(), None, None, None, True)).evaluate([0], 1, None, [None])
    assert (at, failure.message[:63]) == (0, "what process_job returned cannot be pickled: SystemExit: 3. Kee")


class Broken:
    """Can be pickled, but not rebuilt."""

    def __reduce__(self):
        return int, ("no number",)


def test_what_cannot_be_rebuilt_is_that_jobs_failure(isolated):
    evaluator = isolated(Evaluator(lambda job: Broken() if job else 0, None, None, None, True))
    results = [None] * 3
    [(at, error)] = evaluator.evaluate([0, 1, 0], 3, None, results)
    assert (at, type(error), results) == (1, ValueError, [0, None, 0])
    failures = evaluator.evaluate([0, Broken(), 0], 3, None, results)
    assert [(at, failure.type_name) for at, failure in failures] == [(0, "ValueError"), (1, "ValueError"), (2, "ValueError")]
    failures = evaluator.evaluate([0, lambda: 0], 2, None, results)
    assert [at for at, error in failures if "a job cannot be pickled" in str(error)] == [0, 1]


@pytest.mark.parametrize("form", ["single rows rows", "block rows rows", "kernel rows rows"])
def test_nan_is_refused_where_it_is_illegal(form, request, isolated):
    case = Case(form, request, allow_nan=False)
    results, failures = case.run(isolated(case.inner), [FINE, NAN, FINE])
    assert results == [0.0, None, 4.0]
    assert "contains NaN" in Failure.of(failures[1]).message


def test_a_wrong_shape_is_refused(isolated):
    evaluator = isolated(Evaluator(lambda job: [1, 2], None, None, Rows(DOUBLE), True))
    [(_, failure)] = evaluator.evaluate([0], 1, Buffer(80, Rows(DOUBLE), 0, True), None)
    assert isinstance(failure.exception(), PayloadError)


# ---- payload -------------------------------------------------------------------------------------------------------


def test_records_and_arrays_as_rows(isolated):
    record = np.dtype([("x", "f4"), ("n", "i8", 3), ("s", "S5")])
    inner = Evaluator(lambda job: job, None, Rows(record), Rows(record), True)
    jobs = np.zeros(4, record)
    jobs["n"], jobs["s"], jobs["x"] = np.arange(12).reshape(4, 3), b"text", 0.5
    out = Buffer(4 * record.itemsize, Rows(record), 0, True)
    assert isolated(inner).evaluate(jobs, 4, out, None) == []
    assert out.rows.tobytes() == jobs.tobytes()


@pytest.mark.parametrize("form", ["single", "block"])
def test_hooks_may_keep_what_they_are_given(isolated, form):
    kept = []

    def block(jobs, results):
        results[:] = sum(float(old.sum()) for old in kept)
        kept.extend([jobs, results])

    def single(job):
        kept.append(job)
        return sum(float(old.sum()) for old in kept)

    rows = Rows(PAIR)
    evaluator = isolated(Evaluator(single, block if form == "block" else None, rows, Rows(DOUBLE), True))
    out = Buffer(80, Rows(DOUBLE), 0, True)
    got = []
    for number in (1.0, 10.0, 100.0):
        assert evaluator.evaluate(np.full((1, 2), number), 1, out, None) == []
        got.append(out.rows[0])
    assert got == ([0, 2, 24] if form == "block" else [2, 22, 222])


def test_hooks_cannot_write_to_their_jobs(isolated):
    def write(job):
        job[0] = 1

    [(_, failure)] = isolated(Evaluator(write, None, Rows(PAIR), None, True)).evaluate(np.zeros((1, 2)), 1, None, [None])
    assert "read-only" in failure.message


def test_objects_of_any_size(isolated):
    """Job and result outgrow the memory they share, and arrays inside are the receiver's own."""
    evaluator = isolated(Evaluator(lambda job: [job, job * 2], None, None, None, True))
    kept = []
    for count in (1, 1000, 1_000_000, 2_000_000, 10):
        jobs, results = [np.arange(float(count)), "text"], [None, None]
        assert evaluator.evaluate(jobs, 2, None, results) == []
        kept.append(results)
    for count, ((one, two), text) in zip((1, 1000, 1_000_000, 2_000_000, 10), kept, strict=True):
        assert np.array_equal(one, np.arange(float(count)))
        assert np.array_equal(two, 2 * one)
        assert text == ["text", "texttext"]


@pytest.mark.parametrize("form", ["single", "block"])
def test_rows_of_8_megabytes(isolated, form):
    rows = Rows(np.dtype(("f8", 1_000_000)))

    def block(jobs, results):
        results[:] = jobs + 1

    evaluator = isolated(Evaluator(lambda job: job + 1, block if form == "block" else None, rows, rows, True), 2)
    out = Buffer(2 * rows.row_bytes, rows, 0, True)
    jobs = np.arange(2_000_000.0).reshape(2, -1)
    for _ in range(3):
        assert evaluator.evaluate(jobs, 2, out, None) == []
        assert np.array_equal(out.rows, jobs + 1)
    assert not out.kept()


def test_without_memfd_there_is_another_way(isolated, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    evaluator = isolated(Evaluator(lambda job: job, None, None, None, True))
    results = [None]
    assert evaluator.evaluate(["x" * 100_000], 1, None, results) == []
    assert results == ["x" * 100_000]


@pytest.mark.parametrize("end", [KILL, HANG])
def test_without_pidfd_there_is_another_way(request, isolated, monkeypatch, end):
    monkeypatch.delattr(os, "pidfd_open")
    case = Case("single rows rows", request)
    results, failures = case.run(isolated(case.inner, job_timeout_s=0.1), [FINE, end, FINE])
    assert results == [0.0, None, 4.0]
    assert failures[1].how == ENDS[end]


# ---- what jobs may do ----------------------------------------------------------------------------------------------


def test_what_jobs_print_comes_out_once(capfd, isolated):
    def shout(job):
        print(f"job {job}")
        print(f"err {job}", file=sys.stderr)
        ctypes.CDLL(None).printf(b"C %d\n", ctypes.c_int(job))

    print("before")
    evaluator = isolated(Evaluator(shout, None, None, None, True))
    assert evaluator.evaluate([1, 2], 2, None, [None] * 2) == []
    evaluator.close()
    out, err = capfd.readouterr()
    assert sorted(out.split("\n")) == ["", "C 1", "C 2", "before", "job 1", "job 2"]
    assert err == "err 1\nerr 2\n"


def test_jobs_may_fork_ignore_signals_and_use_threads(isolated):
    def busy(job):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        pid = os.fork()
        if pid == 0:
            os._exit(7)
        matrix = np.ones((300, 300))
        ran = subprocess.run(["sh", "-c", "echo hello"], capture_output=True, text=True, check=True).stdout
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), ran, float((matrix @ matrix).sum())

    np.ones((300, 300)) @ np.ones((300, 300))  # BLAS has its threads now
    evaluator, results = isolated(Evaluator(busy, None, None, None, True)), [None] * 3
    assert evaluator.evaluate([0] * 3, 3, None, results) == []
    assert results == [(7, "hello\n", 300.0**3)] * 3


def test_a_job_that_forks_and_returns_twice_answers_once(isolated):
    evaluator, results = isolated(Evaluator(lambda job: os.fork() and job, None, None, None, True), 1), [None]
    for number in range(1, 20):
        assert evaluator.evaluate([number], 1, None, results) == []


def test_signals_for_the_whole_job_do_not_cost_one(isolated):
    def interrupted(job):
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        return job

    results = [None]
    assert isolated(Evaluator(interrupted, None, None, None, True)).evaluate([5], 1, None, results) == []
    assert results == [5]


def test_memory_that_is_given_back_is_not_counted(isolated):
    def use(job):
        return float(np.ones(LIMIT // 2 // 8).sum())

    evaluator = isolated(Evaluator(use, None, None, None, True), memory_limit=LIMIT)
    for _ in range(5):
        assert evaluator.evaluate([0] * 10, 10, None, [None] * 10) == []


def test_a_job_that_is_too_large_for_the_limit_fails(isolated):
    evaluator = isolated(Evaluator(len, None, None, None, True), memory_limit=20_000_000)
    results = [None] * 2
    [(at, error)] = evaluator.evaluate([b"x" * 50_000_000, b"x" * 5], 2, None, results)
    assert (at, error.how, results) == (0, "over memory_limit = 20000000 bytes", [None, 5])


# ---- the end -------------------------------------------------------------------------------------------------------


class Alarm(Exception):
    pass


@contextlib.contextmanager
def signal_after(seconds, number, handler):
    before = signal.signal(number, handler)
    pid = subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -{int(number)} {os.getpid()}"])
    try:
        yield
    finally:
        pid.wait()
        signal.signal(number, before)


@pytest.mark.parametrize("waiting", ["asleep", "with the GIL"])
def test_an_interrupt_ends_the_child_and_passes_through(isolated, waiting):
    hook = hang if waiting == "with the GIL" else lambda: time.sleep(1000)
    evaluator = isolated(Evaluator(lambda job: hook(), None, None, None, True))
    with signal_after(0.3, signal.SIGINT, signal.default_int_handler):
        with pytest.raises(KeyboardInterrupt):
            evaluator.evaluate([0], 1, None, [None])
        assert evaluator._pid is None
    assert children() == []


def test_signal_handlers_run_while_a_job_does(isolated):
    got = []
    evaluator = isolated(Evaluator(time.sleep, None, None, None, True))
    with signal_after(0.1, signal.SIGUSR1, lambda number, frame: got.append(number)):
        assert evaluator.evaluate([0.4], 1, None, [None]) == []
    assert got == [signal.SIGUSR1]


def test_an_interrupt_raised_by_a_job_passes_through(case, isolated):
    if case.form == "kernel":
        pytest.skip("C raises nothing")
    inner = Evaluator(raising(KeyboardInterrupt()), None, case.job_rows, case.result_rows, True)
    with pytest.raises(KeyboardInterrupt):
        case.run(isolated(inner), [FINE])
    assert children() == []


def test_somebody_may_look_after_other_things_meanwhile(isolated):
    calls = []
    evaluator = isolated(Evaluator(time.sleep, None, None, None, True), on_wait=lambda: calls.append(0), wait_s=0.02)
    assert evaluator.evaluate([0.3], 1, None, [None]) == []
    assert 0 < len(calls) < 20

    def stop():
        raise Alarm

    with pytest.raises(Alarm):
        isolated(Evaluator(time.sleep, None, None, None, True), on_wait=stop).evaluate([1000], 1, None, [None])
    assert len(children()) == 1  # the first one's


RANK = """
import os, sys, time
from jd_hpc._batch import Evaluator
from jd_hpc.isolate import IsolatedEvaluator

def job(job):
    print(os.getpid(), flush=True)
    if job:
        time.sleep(1000)

evaluator = IsolatedEvaluator(Evaluator(job, None, None, None, True), 1)
evaluator.evaluate([{hang}], 1, None, [None])
print("between batches", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("hanging", [True, False])
def test_the_child_dies_with_the_rank(hanging):
    command = [sys.executable, "-c", RANK.format(hang=hanging)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
        pidfd = os.pidfd_open(int(rank.stdout.readline()))
        if not hanging:
            rank.stdout.readline()
        rank.kill()
        assert select.select([pidfd], [], [], 10)[0]
        os.close(pidfd)


def test_files_to_close_are_closed_in_the_child(isolated):
    read_end, write_end = os.pipe()
    evaluator = isolated(Evaluator(time.sleep, None, None, None, True), close_fds=(write_end, 99999))
    evaluator.evaluate([0], 1, None, [None])
    os.close(write_end)
    assert os.read(read_end, 1) == b""  # nobody holds the other end
    os.close(read_end)


def test_close_can_be_called_again_and_so_can_evaluate(case, isolated):
    evaluator = isolated(case.inner)
    evaluator.close()
    for _ in range(2):
        assert case.run(evaluator, [FINE] * 3) == (good(3), {})
        evaluator.close()
        evaluator.close()
        assert children() == []


def test_what_nobody_refers_to_any_more_closes_itself(request):
    case = Case("single rows rows", request)
    evaluator = IsolatedEvaluator(case.inner, 10)
    case.run(evaluator, [FINE])
    del evaluator
    assert children() == []


def test_a_copy_in_a_forked_process_ends_nothing(request, isolated):
    case = Case("single rows rows", request)
    evaluator = isolated(case.inner)
    case.run(evaluator, [FINE])
    pid = os.fork()
    if pid == 0:
        evaluator.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    before = children()
    assert case.run(evaluator, [FINE]) == ([0.0], {})
    assert children() == before


def test_a_thousand_batches_leak_nothing(request, isolated):
    cases = [Case(form, request) for form in ("single rows rows", "single objects objects", "kernel rows rows")]
    evaluators = [isolated(case.inner) for case in cases]

    def work():
        for case, evaluator in zip(cases, evaluators, strict=True):
            assert case.run(evaluator, [FINE] * 3) == (good(3), {})
            pages.add(child_pages())

    def child_pages():
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in children())

    pages = set()
    for _ in range(100):
        work()
    files, most_kib = open_files(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    first = max(pages)
    for _ in range(1000):
        work()
    assert open_files() == files
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most_kib < 4000
    assert (max(pages) - first) * resource.getpagesize() < 4_000_000


def test_many_deaths_leak_nothing(request, isolated):
    case = Case("single objects objects", request)
    evaluator = isolated(case.inner)
    case.run(evaluator, [FINE])
    files, maps = open_files(), len(mappings())
    for _ in range(10):
        case.run(evaluator, [KILL, FINE, EXIT_3])
    case.run(evaluator, [FINE])
    assert (open_files(), len(mappings()), len(children())) == (files, maps, 1)


# ---- no child ------------------------------------------------------------------------------------------------------


def test_no_process_can_be_started(request, isolated, monkeypatch):
    def fail():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fail)
    case = Case("single rows rows", request)
    with pytest.raises(IsolationError, match=r"no process can be started to run the jobs: .*temporarily unavailable"):
        case.run(isolated(case.inner), [FINE])


def test_children_that_die_at_once_are_not_started_for_ever(request, isolated, monkeypatch, capfd):
    def broken(self, *args):
        raise RuntimeError("cannot settle here")

    monkeypatch.setattr(child.Child, "_settle", broken)
    case = Case("single rows rows", request)
    with pytest.raises(IsolationError, match="died before they ran a job, the last one: left with exit code 70; see what"):
        case.run(isolated(case.inner), [FINE])
    assert capfd.readouterr().err.count("RuntimeError: cannot settle here") == isolate.MOST_STARTS


def test_a_child_that_never_begins_is_not_waited_for_for_ever(request, isolated, monkeypatch):
    monkeypatch.setattr(child.Child, "_settle", lambda self, *args: hang())
    monkeypatch.setattr(isolate, "START_WAIT_S", 0.1)
    with pytest.raises(IsolationError, match="the last one: did not begin"):
        case = Case("single rows rows", request)
        case.run(isolated(case.inner), [FINE])


def test_the_time_a_child_needs_to_begin_is_no_jobs_time(request, isolated, monkeypatch):
    settle = child.Child._settle

    def slow(self, *args):
        time.sleep(0.3)
        settle(self, *args)

    monkeypatch.setattr(child.Child, "_settle", slow)
    case = Case("single rows rows", request)
    assert case.run(isolated(case.inner, job_timeout_s=0.1), [FINE]) == ([0.0], {})


def test_it_needs_linux(request, monkeypatch):
    monkeypatch.delattr(os, "eventfd")
    with pytest.raises(IsolationError, match="need Linux; set isolate = False"):
        IsolatedEvaluator(Case("single rows rows", request).inner, 10)


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ProcessDiedError("killed by SIGSEGV")))
    assert (error.how, str(error)) == ("killed by SIGSEGV", "the process that ran the job died: killed by SIGSEGV")
    assert type(Failure.of(error).exception()) is ProcessDiedError


# ---- the pieces ----------------------------------------------------------------------------------------------------


def test_a_shared_number():
    memory = np.zeros(3, "i8")
    number = SharedNumber(memory, 1)
    number.set(-5)
    assert (memory.tolist(), number.get()) == ([0, -5, 0], -5)
    assert number.becomes(-5, 0)
    start_s = time.monotonic()
    assert not number.becomes(7, 20_000_000)
    assert time.monotonic() - start_s >= 0.02
    for at in (-1, 3):
        with pytest.raises(IndexError):
            SharedNumber(memory, at)


def test_a_buffer_of_given_memory():
    memory = np.zeros(16, "u1")
    Buffer(16, Rows(DOUBLE), 0, True, memory).rows[1] = 5
    assert memory.view("f8").tolist() == [0, 5]
    for size, wrong in ((16, memory[:8]), (8, memory[::2]), (16, memory.view("i8"))):
        with pytest.raises(ValueError, match="in one piece"):
            Buffer(size, Rows(DOUBLE), 0, True, wrong)


def test_a_description_stays_what_it_is():
    failure = Failure("X", "message", "traceback", None)
    assert Failure.of(failure) is failure
    assert Failure.of_all([(3, failure), (4, failure)]) == {3: failure, 4: failure}

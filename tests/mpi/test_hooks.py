"""The hooks and the options: who is called, where, how often and in which order."""

from __future__ import annotations

import logging
import time
from itertools import product
from resource import RUSAGE_SELF, getrusage

import numpy as np
import pytest
from mpi_helpers import Sweep, error_alone, error_of, everywhere, run, same, value_of

from jd_hpc import JobDispatcher, LocalMachine, MPIMachine, PayloadError

pytestmark = pytest.mark.mpi


class Logged(Sweep):
    """Notes every call of a hook."""

    def __init__(self, jobs, vm=None, **options):
        super().__init__(jobs, vm, **options)
        self.log = []

    def on_startup(self):
        self.log.append(("on_startup",))

    def reset(self):
        self.log.append(("reset",))
        super().reset()

    def next_job(self):
        job = super().next_job()
        self.log.append(("next_job", job))
        return job

    def process_job(self, job):
        self.log.append(("process_job", job))
        return job * job

    def process_result(self, index, job, result):
        super().process_result(index, job, result)
        self.log.append(("process_result", index, job, result))

    def on_shutdown(self):
        self.log.append(("on_shutdown",))

    def postprocess(self):
        self.log.append(("postprocess",))
        return sum(self.results.values())


def test_hooks_in_order(comm):
    local = Logged(range(3))
    assert local.run() == 5
    assert local.log == [
        ("on_startup",), ("reset",),
        ("next_job", 0), ("process_job", 0), ("process_result", 0, 0, 0),
        ("next_job", 1), ("process_job", 1), ("process_result", 1, 1, 1),
        ("next_job", 2), ("process_job", 2), ("process_result", 2, 2, 4),
        ("next_job", None), ("postprocess",), ("on_shutdown",),
    ]  # fmt: skip
    dispatcher = Logged(range(3), comm)
    assert value_of(dispatcher, comm) == 5
    logs = comm.allgather(dispatcher.log)
    if comm.size == 1:
        assert logs[0] == local.log
        return
    names = [call[0] for call in logs[0]]
    assert names[:2] == ["on_startup", "reset"]
    assert names[-2:] == ["postprocess", "on_shutdown"]
    assert [call for call in logs[0] if call[0] == "next_job"][:4] == [("next_job", i) for i in (0, 1, 2, None)]
    assert "process_job" not in names
    for i in range(3):
        assert logs[0].index(("next_job", i)) < logs[0].index(("process_result", i, i, i * i))
    for log in logs[1:]:
        assert log[0] == ("on_startup",)
        assert log[-1] == ("on_shutdown",)
        assert {call[0] for call in log[1:-1]} <= {"process_job"}
    assert sorted(call[1] for log in logs[1:] for call in log if call[0] == "process_job") == [0, 1, 2]


def test_master_alone_calls_the_same_hooks(comm):
    dispatcher = Logged(range(3), comm, max_slaves=0)
    local = Logged(range(3))
    local.run()
    assert value_of(dispatcher, comm) == 5
    logs = comm.allgather(dispatcher.log)
    assert logs[0] == local.log
    assert all(log == [("on_startup",), ("on_shutdown",)] for log in logs[1:])


@pytest.mark.parametrize("value", [None, 0, "text", {"a": [1, 2]}])
def test_run_returns_what_postprocess_returns(comm, value):
    class Returning(Sweep):
        def postprocess(self):
            return value

    outcomes = run(Returning([1, 2], comm), comm)
    assert [outcome.value for outcome in outcomes] == [value] + [None] * (comm.size - 1)


def test_no_jobs(comm):
    assert value_of(Sweep([], comm), comm) == ({}, {})
    assert value_of(Sweep([], comm, max_slaves=0), comm) == ({}, {})


def test_run_again(comm):
    dispatcher = Logged(range(10), comm)
    for _ in range(4):
        assert value_of(dispatcher, comm) == 285
    if comm.rank == 0:
        assert dispatcher.log.count(("reset",)) == 4
    dispatcher.job_list = [100]
    assert value_of(dispatcher, comm) == 10000


def test_missing_hooks_are_named(comm):
    class NoJobs(JobDispatcher):
        pass

    class NoWork(JobDispatcher):
        def next_job(self):
            return 1

    assert "NoJobs must define next_job" in str(error_of(NoJobs(comm), comm))
    assert "NoWork must define process_job" in str(error_of(NoWork(comm), comm))


class WhoRan(Sweep):
    """Has jobs until every slave that should have one has given a result."""

    def __init__(self, vm, expected, **options):
        super().__init__([], vm, **options)
        self.expected = set(expected)

    def reset(self):
        self.ran, self.sent = set(), 0

    def next_job(self):
        if self.sent >= 5 and (self.expected <= self.ran or self.sent > 3000):
            return None
        self.sent += 1
        return self.sent

    def process_job(self, job):
        time.sleep(0.001)
        return self.machine.rank

    def process_result(self, index, job, result):
        self.ran.add(result)

    def postprocess(self):
        return self.ran


def test_max_slaves(comm):
    for most in range(comm.size + 2):
        usable = range(1, min(most, comm.size - 1) + 1)
        expected = set(usable) or {0}
        assert value_of(WhoRan(comm, expected, max_slaves=most), comm) == expected
    everyone = set(range(1, comm.size)) or {0}
    assert value_of(WhoRan(comm, everyone), comm) == everyone


def test_min_slaves(comm):
    for least in range(comm.size + 2):
        enough = 1 <= max(1, least) <= comm.size - 1
        expected = set(range(1, comm.size)) if enough else {0}
        assert value_of(WhoRan(comm, expected, min_slaves=least), comm) == expected
    assert value_of(WhoRan(comm, {0}, min_slaves=comm.size + 1, max_slaves=comm.size + 1), comm) == {0}


@pytest.mark.parametrize(
    "options",
    [
        {"max_slaves": -1}, {"min_slaves": -1}, {"min_slaves": 3, "max_slaves": 2}, {"debug": -1}, {"debug": 3},
        {"grain": 0}, {"grain": -5}, {"credit": 0}, {"credit": -1},
    ],
    ids=str,
)  # fmt: skip
def test_bad_numbers(comm, options):
    for vm in (None, comm):
        with pytest.raises(ValueError, match=next(iter(options))):
            Sweep([], vm, **options)


@pytest.mark.parametrize("debug", [0, 1, 2])
def test_debug(comm, debug):
    records = []

    class Catch(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    logger, handler = logging.getLogger("jd_hpc"), Catch()
    level = logger.level
    logger.addHandler(handler)
    try:
        value_of(Sweep(range(7), comm, debug=debug), comm)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    lines = comm.allgather(records)
    if debug == 0:
        assert not any(lines)
        return
    assert lines[0]
    assert all(bool(of_a_slave) == (debug == 2) for of_a_slave in lines[1:])
    if comm.size > 1:
        for i in range(7):
            assert sum(line.endswith(f"gets job {i}") for line in lines[0]) == (debug == 2)
            assert sum(line.endswith(f"answers job {i}") for line in lines[0]) == (debug == 2)
        assert any(" has started" in line for line in lines[0])  # a slave that comes late may find the run over


class Watched(Sweep):
    """Checks the optional hooks against each other while the run is on."""

    def reset(self):
        super().reset()
        self.started, self.idle, self.sent, self.came = [], [], {}, {}

    def process_job(self, job):
        if isinstance(job, np.ndarray):
            return np.full(job.shape, self.machine.rank, "f8")
        return self.machine.rank

    def on_slave_started(self, slave):
        assert slave not in self.started
        self.started.append(slave)

    def on_job_sent(self, slave, index):
        assert slave in self.started
        assert index not in self.sent
        assert 0 <= self.machine.free_slots <= self.machine.slots
        self.sent[index] = slave

    def on_result(self, slave, index):
        assert self.sent[index] == slave
        assert index not in self.came
        assert index not in self.results
        self.came[index] = slave

    def on_slave_idle(self, slave):
        assert [i for i, s in self.sent.items() if s == slave and i not in self.came] == []
        self.idle.append(slave)

    def process_result(self, index, job, result):
        super().process_result(index, job, result)
        if self.machine.size > 1:
            assert self.came[index] == np.ravel(result)[0]

    def postprocess(self):
        return self.started, self.idle, self.sent, self.came


class WatchedRows(Watched):
    job_dtype = result_dtype = "f8"


class WatchedLargeRows(Watched):
    job_dtype = result_dtype = ("f8", 1000)


class WatchedLargeObjects(Watched):
    pass


@pytest.mark.parametrize("grain", [1, 3])
@pytest.mark.parametrize("kind", [Watched, WatchedRows, WatchedLargeRows, WatchedLargeObjects])
def test_optional_hooks(comm, kind, grain):
    jobs = [np.full(1000, float(i)) for i in range(20)] if "Large" in kind.__name__ else [float(i) for i in range(20)]
    started, idle, sent, came = value_of(kind(jobs, comm, grain=grain), comm)
    if comm.size == 1:
        assert (started, idle, sent, came) == ([], [], {}, {})
        return
    assert set(started) <= set(range(1, comm.size))
    assert sorted(sent) == list(range(20))
    assert sent == came
    assert set(came.values()) <= set(idle)


def test_startup_and_shutdown_on_every_rank_at_every_run(comm):
    class Counting(Sweep):
        calls = ""

        def on_startup(self):
            assert self.machine.is_master == (self.machine.rank == 0)
            self.calls += "u"

        def on_shutdown(self):
            self.calls += "d"

    dispatcher = Counting([1, 2, 3], comm)
    for runs in (1, 2, 3):
        value_of(dispatcher, comm)
        assert comm.allgather(dispatcher.calls) == ["ud" * runs] * comm.size


class AnyBlocks(Sweep):
    """Base of the classes below, which override the block forms of the hooks."""

    largest = 0

    def answer(self, job):
        return job * 2 + 1


def make_blocks(numeric, next_block, process_block, result_block):
    def forbidden(self, *args):
        raise AssertionError("the single form was called although the block form is overridden")

    def next_jobs(self, count):
        assert count >= 1
        block = self.job_list[self.at : self.at + count]
        self.at += len(block)
        return np.array(block, "f8") if numeric else block

    def process_job(self, job):
        return self.answer(job)

    def process_jobs(self, jobs, results):
        assert 1 <= len(jobs) == len(results) <= self.grain
        if numeric:
            assert isinstance(jobs, np.ndarray)
            assert not jobs.flags.writeable
            results[:] = self.answer(jobs)
        else:
            assert isinstance(jobs, list)
            for i, job in enumerate(jobs):
                results[i] = self.answer(job)

    def process_results(self, indices, jobs, results):
        assert isinstance(indices, np.ndarray)
        assert indices.dtype == np.int64
        assert 1 <= len(indices) == len(jobs) == len(results)
        if numeric:
            assert not jobs.flags.writeable
            assert not results.flags.writeable
        for i, job, result in zip(indices.tolist(), jobs, results, strict=True):
            assert i not in self.results
            assert self.job_list[i] == job
            self.results[i] = result

    body = {"process_job": process_job}
    if numeric:
        body.update(job_dtype="f8", result_dtype="f8")
    if next_block:
        body.update(next_jobs=next_jobs, next_job=forbidden)
    if process_block:
        body.update(process_jobs=process_jobs, process_job=forbidden)
    if result_block:
        body.update(process_results=process_results, process_result=forbidden)
    return type("Blocks", (AnyBlocks,), body)


@pytest.mark.parametrize("blocks", list(product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("numeric", [False, True])
def test_blocks_on_either_side_independently(comm, numeric, blocks):
    kind = make_blocks(numeric, *blocks)
    jobs = [float(i) for i in range(61)]
    expected = {i: 2.0 * i + 1 for i in range(61)}
    for grain in (1, 5, 64):
        assert kind(jobs, None, grain=grain).run() == (expected, {})
        assert value_of(kind(jobs, comm, grain=grain), comm) == (expected, {})
        assert value_of(kind(jobs, comm, grain=grain, max_slaves=0), comm) == (expected, {})


@pytest.mark.parametrize("end", [None, (), []], ids=repr)
def test_next_jobs_ends_with_nothing(comm, end):
    class Ends(Sweep):
        def next_jobs(self, count):
            block = self.job_list[self.at : self.at + count]
            self.at += len(block)
            return block or end

    assert value_of(Ends(range(9), comm, grain=2), comm) == ({i: i for i in range(9)}, {})


@pytest.mark.parametrize("numeric", [False, True])
def test_next_jobs_gave_more_than_asked_for(comm, numeric):
    class TooMany(Sweep):
        job_dtype = result_dtype = "f8" if numeric else None

        def next_jobs(self, count):
            return [1.0] * (count + 1)

    for vm in (None, comm):
        error = error_of(TooMany([], vm), comm) if vm else error_alone(TooMany([]), PayloadError)
        assert isinstance(error, PayloadError)
        assert "return at most as many as asked for" in str(error)


class Tree(JobDispatcher):
    """Ask and tell: every result may create new jobs. Depth-limited trees of 1, 2 or 3 children."""

    depth = 6

    def reset(self):
        self.open = [(0, 1)]
        self.seen = []

    def next_job(self):
        return self.open.pop() if self.open else None

    def process_job(self, job):
        depth, name = job
        return [] if depth == self.depth else [(depth + 1, 4 * name + i) for i in range(1 + name % 3)]

    def process_result(self, index, job, result):
        self.seen.append(job)
        self.open.extend(result)

    def postprocess(self):
        return sorted(self.seen)


class TreeOfRows(Tree):
    job_dtype = ("i8", 2)
    result_dtype = ("i8", 3)

    def process_job(self, job):
        row = np.full(3, -1)
        children = super().process_job(job.tolist())
        row[: len(children)] = [name for _, name in children]
        return row

    def process_result(self, index, job, result):
        super().process_result(index, tuple(job.tolist()), [(int(job[0]) + 1, int(name)) for name in result if name >= 0])


class TreeInBlocks(Tree):
    def next_jobs(self, count):
        block, self.open = self.open[:count], self.open[count:]
        return block


@pytest.mark.parametrize("kind", [Tree, TreeOfRows, TreeInBlocks])
def test_results_create_jobs(comm, kind):
    expected = Tree().run()
    assert len(expected) > 100
    assert kind().run() == expected
    for options in ({}, {"grain": 4}, {"credit": 1}, {"grain": 3, "credit": 8}, {"max_slaves": 0}):
        assert value_of(kind(comm, **options), comm) == expected


def test_failures_create_jobs_too(comm):
    class Again(Sweep):
        """Tries a failed job again, with a smaller number."""

        def process_job(self, job):
            if job > 3:
                raise ValueError(job)
            return job

        def process_result(self, index, job, result):
            self.results[index] = result

        def process_failure(self, index, job, error):
            self.job_list.append(job - 3)

    results, _ = value_of(Again([10, 2, 5], comm), comm)
    assert sorted(results.values()) == [1, 2, 2]


def test_next_job_is_asked_again_after_none(comm):
    class Hesitant(Sweep):
        """Says None while results are due."""

        def next_job(self):
            if self.at > len(self.results):
                return None
            return super().next_job()

    assert value_of(Hesitant(range(12), comm), comm) == ({i: i for i in range(12)}, {})


def test_machine_tells_slots(comm):
    machine = MPIMachine(comm)
    with everywhere(comm):
        assert (machine.rank, machine.size) == (comm.rank, comm.size)
        assert machine.is_master == (comm.rank == 0)
        assert machine.slots == machine.free_slots == max(1, comm.size - 1)
    seen = []

    class Looking(Sweep):
        def process_job(self, job):
            time.sleep(0.002)

        def process_result(self, index, job, result):
            seen.append(self.machine.free_slots)

    value_of(Looking(range(20), machine), comm)
    value_of(Looking(range(20), machine, max_slaves=1), comm)
    with everywhere(comm):
        assert all(0 <= free <= machine.slots for free in seen)
        assert machine.free_slots == machine.slots
        if comm.size > 1 and comm.rank == 0:
            assert min(seen[:20]) < machine.slots
            assert min(seen[20:]) >= machine.slots - 1
    hosts = comm.allgather(machine.hosts)
    assert all(host == hosts[0] for host in hosts)
    assert sorted(rank for ranks in hosts[0].values() for rank in ranks) == list(range(comm.size))


@pytest.mark.parametrize("options", [{}, {"max_slaves": 0}, {"max_slaves": 1}], ids=str)
def test_a_rank_that_waits_is_idle(comm, options):
    """Slaves without jobs and a master without results do not burn their cores, nor wake up all the time."""

    class Waits(Sweep):
        def on_startup(self):
            self.used_s, self.sleeps = time.process_time(), getrusage(RUSAGE_SELF).ru_nvcsw

        def next_job(self):
            if self.at == 1:
                time.sleep(0.5)  # the slaves wait
            return super().next_job()

        def process_job(self, job):
            time.sleep(0.5 * (job == 2))  # the master waits

        def process_result(self, index, job, result):
            pass

        def on_shutdown(self):
            self.used_s, self.sleeps = time.process_time() - self.used_s, getrusage(RUSAGE_SELF).ru_nvcsw - self.sleeps

    dispatcher = Waits(range(3), comm, credit=1, **options)
    value_of(dispatcher, comm)
    with everywhere(comm):
        assert dispatcher.used_s < 0.35  # of 1.0 s
        assert dispatcher.sleeps < 6000  # pauses grow to 0.5 ms


def test_local_machine(comm):
    machine = LocalMachine()
    assert (machine.is_master, machine.rank, machine.size, machine.slots, machine.free_slots) == (True, 0, 1, 1, 1)
    assert list(machine.hosts.values()) == [[0]]
    assert Sweep(range(4), machine).run() == ({i: i for i in range(4)}, {})


def test_same_values_as_a_local_run(comm):
    class Numbers(Sweep):
        job_dtype = ("f8", 4)
        result_dtype = np.dtype([("norm", "f8"), ("order", "i4", 4)])

        def process_job(self, job):
            return np.linalg.norm(job), np.argsort(job).astype("i4")

    rng = np.random.default_rng(7)
    jobs = list(rng.normal(size=(200, 4)))
    expected = Numbers(jobs).run()[0]
    for options in ({}, {"grain": 7}, {"grain": 16, "credit": 4}):
        found = value_of(Numbers(jobs, comm, **options), comm)[0]
        assert sorted(found) == list(range(200))
        assert all(same(found[i], expected[i]) for i in expected)

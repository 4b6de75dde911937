"""Messages of the user's own: order, back-pressure, replies, between slaves, and what is refused. Run it on 1, 2 and 4 ranks."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

import numpy as np
import pytest
from mpi_helpers import Sweep, check_healthy, error_of, everywhere, run, value_of

from jd_hpc import JobError, MessageError, PayloadError, SlaveError

pytestmark = pytest.mark.mpi
SIZES = [0, 2000, 100_000, 5_000_000]
"""Of what messages carry, in bytes: with the header, with a body, eager and not."""


class Note(NamedTuple):
    """What the tests send."""

    text: str
    number: int = 0
    data: object = None


class Talk(Sweep):
    """A sweep whose ranks note what they hear: `heard` has (source, message)."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.heard = []
        self.add_handler(Note, self.hear)

    def hear(self, source, note):
        self.heard.append((source, note))

    @property
    def rank(self):
        return self.machine.rank


class InOrder(Talk):
    """Every job tells its number before it is done; the master notes when messages and results come."""

    size = 0
    result_size = 0

    def reset(self):
        super().reset()
        self.events = {}

    def process_job(self, job):
        self.tell(Note("before", job, np.full(self.size, job % 256, "u1")))
        return self.rank, bytes(self.result_size)

    def hear(self, source, note):
        assert (note.data == note.number % 256).all()
        assert len(note.data) == self.size
        self.events.setdefault(source, []).append(("told", note.number))

    def process_result(self, index, job, result):
        self.events.setdefault(result[0], []).append(("result", index))

    def postprocess(self):
        return self.events


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("result_size", [0, 50_000])
def test_what_a_slave_tells_comes_before_its_result(comm, size, result_size):
    sweep = InOrder(range(30), comm)
    sweep.size, sweep.result_size = size, result_size
    events = value_of(sweep, comm)
    assert sorted(number for told in events.values() for what, number in told if what == "told") == list(range(30))
    for told in events.values():
        numbers = [number for what, number in told if what == "result"]
        assert told == [event for number in numbers for event in (("told", number), ("result", number))]
    check_healthy(comm)


class RowsInOrder(InOrder):
    """The same with rows, which are collected without Python."""

    job_dtype = "i8"
    result_dtype = "i8"

    def process_job(self, job):
        super().process_job(int(job))
        return self.rank

    def process_result(self, index, job, result):
        super().process_result(int(index), int(job), (int(result), b""))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("credit", [1, 8])
def test_rows_keep_their_place_too(comm, size, credit):
    sweep = RowsInOrder(range(100 if size < 1000 else 30), comm, credit=credit)
    sweep.size = size
    for told in value_of(sweep, comm).values():
        numbers = [number for what, number in told if what == "result"]
        assert told == [event for number in numbers for event in (("told", number), ("result", number))]


class Newest(Talk):
    """The master broadcasts before every job; the job must know."""

    size = 0

    def next_job(self):
        job = super().next_job()
        if job is not None:
            self.sent_to = self.broadcast(Note("newest", job, bytes(self.size)))
            assert self.sent_to <= self.machine.size - 1
        return job

    def process_job(self, job):
        assert [note.number for _, note in self.heard] == sorted(note.number for _, note in self.heard)
        assert all(source == 0 and len(note.data) == self.size for source, note in self.heard)
        return self.heard[-1][1].number if self.heard else None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("credit", [1, 30])
def test_a_broadcast_is_handled_before_the_jobs_behind_it(comm, size, credit):
    sweep = Newest(range(100 if size < 1000 else 20), comm, credit=credit)
    sweep.size = size
    results, failures = value_of(sweep, comm)
    assert not failures
    for job, newest in results.items():
        assert newest is None if comm.size == 1 else newest >= job


class Chatter(Talk):
    """One job says a lot."""

    count = 1000

    def process_job(self, job):
        for number in range(self.count):
            self.tell(Note("chatter", number))

    def postprocess(self):
        return self.heard


def test_all_is_heard_in_order_however_much_it_is(comm):
    sweep = Chatter([0], comm)
    heard = value_of(sweep, comm)
    assert [note.number for _, note in heard] == list(range(1000))
    if comm.rank == 0 and comm.size > 1:
        assert sweep.stats["own messages handled"] == 1000


class Asks(Talk):
    """A job asks the master, and polls until it has the answer."""

    def process_job(self, job):
        before = len(self.heard)
        self.tell(Note("question", job))
        end = time.monotonic() + 30
        while not any(note.number == job + 1000 for _, note in self.heard):
            handled = self.poll()
            assert self.machine.is_master or handled == len(self.heard) - before
            before = len(self.heard)
            assert time.monotonic() < end
        return job

    def hear(self, source, note):
        super().hear(source, note)
        return [(source, Note("answer", note.number + 1000))] if note.text == "question" else None


def test_a_job_hears_what_it_polls_for(comm):
    results, failures = value_of(Asks(range(50), comm, credit=1), comm)
    assert not failures
    assert results == {job: job for job in range(50)}


class ToAll(Talk):
    """Every job tells all other slaves where it runs, and waits until it has heard of all."""

    size = 0

    def process_job(self, job):
        others = set(range(1, self.machine.size)) - {self.rank}
        end = time.monotonic() + 30
        while {source for source, _ in self.heard} != others:
            for other in others:  # again and again: what is told to a slave that has not started is lost
                self.tell(Note("hello", self.rank, bytes(self.size)), other)
            self.poll()
            time.sleep(0.001)
            assert time.monotonic() < end
        return [(source, note.number, len(note.data)) for source, note in self.heard]


@pytest.mark.parametrize("size", SIZES[:3])
def test_slaves_tell_each_other(comm, size):
    sweep = ToAll(range(max(1, comm.size - 1)), comm, credit=1)
    sweep.size = size
    results, failures = value_of(sweep, comm)
    assert not failures
    heard = [one for result in results.values() for one in result]
    assert all(source == number and length == size for source, number, length in heard)
    assert {source for source, _, _ in heard} == (set(range(1, comm.size)) if comm.size > 2 else set())


class NewJobs(Talk):
    """What jobs tell makes new jobs."""

    def process_job(self, job):
        if job > 0:
            self.tell(Note("another", job - 1))
        return job

    def hear(self, source, note):
        self.job_list.append(note.number)


def test_handlers_may_make_jobs(comm):
    results, failures = value_of(NewJobs([20], comm), comm)
    assert not failures
    assert sorted(results.values()) == list(range(21))


class Hooks(Talk):
    """Hooks tell too: all get through, before the jobs behind them."""

    def on_startup(self):
        self.tell(Note("startup", self.rank))

    def on_slave_started(self, slave):
        self.tell(Note("welcome", slave), slave)

    def process_job(self, job):
        return self.rank, [note for _, note in self.heard if note.text == "welcome"]

    def postprocess(self):
        return sorted(note.number for _, note in self.heard), list(self.results.values())


def test_hooks_may_tell(comm):
    for _ in range(3):
        started, results = value_of(Hooks(range(20), comm), comm)
        # a slave that starts when all is done is not waited for
        assert 0 in started
        assert set(started) <= set(range(comm.size))
        for rank, welcome in results:
            assert welcome == ([Note("welcome", rank)] if rank else [])


def test_hooks_may_tell_a_slave_that_is_early(comm):
    sweep = Hooks(range(3), comm)
    values = [sweep.run() for _ in range(30)]  # nobody waits for the others in between
    with everywhere(comm):
        assert all((value is None) == (comm.rank > 0) for value in values)


def test_a_master_that_does_the_work_hears_itself(comm):
    results, failures = value_of(Asks(range(5), comm, max_slaves=0), comm)
    assert not failures
    assert len(results) == 5


def test_runs_follow_each_other(comm):
    sweep = InOrder(range(3), comm)
    for _ in range(50):
        assert sum(map(len, value_of(sweep, comm).values())) == 6


# ---- what is refused -------------------------------------------------------------------------------------------------


class Wrong(Talk):
    """One job, or hook, that does `deed`."""

    deed = None

    def process_job(self, job):
        return type(self).deed(self)


def wrong(comm, deed, **options):
    sweep = Wrong([0], comm, **options)
    type(sweep).deed = deed
    return sweep


def failure_of(sweep, comm):
    _, failures = value_of(sweep, comm)
    assert list(failures) == [0]
    return failures[0]


class Failing(Wrong):
    def process_failure(self, index, job, error):
        self.failures[index] = error


def tells(message, destination=0):
    return lambda sweep: sweep.tell(message, destination)


@pytest.mark.parametrize(
    ("deed", "kind", "says"),
    [
        (tells(Note("x", 0, lambda: None)), PayloadError, "cannot be pickled"),
        (tells(Note("x"), 99), MessageError, "99"),
        (tells(Note("x"), -1), MessageError, "-1"),
        (tells(Note("x", 0, bytes(3000))), PayloadError, "over payload_limit = 2000"),
    ],
)
def test_what_cannot_be_sent_is_the_jobs_failure(comm, deed, kind, says):
    if comm.size == 1 and kind is PayloadError:
        return  # nothing is pickled there
    sweep = Failing([0], comm)
    sweep.payload_limit = 2000
    Wrong.deed = deed
    error = failure_of(sweep, comm)
    assert error.type_name == kind.__name__
    assert says in error.message


def test_a_slave_does_not_broadcast(comm):
    Wrong.deed = lambda sweep: sweep.broadcast(Note("x"))
    if comm.size > 1:
        assert "is the master's" in failure_of(Failing([0], comm), comm).message


@pytest.mark.parametrize("deed", [lambda sweep: sweep.tell(Note("x")), lambda sweep: sweep.poll()])
def test_a_job_in_a_process_of_its_own_is_refused(comm, deed):
    Wrong.deed = deed
    sweep = Failing([0], comm, isolate=True)
    error = failure_of(sweep, comm)
    assert error.type_name == "MessageError"
    assert "isolate=True" in error.message


def test_another_thread_is_refused(comm):
    def deed(sweep):
        caught = []

        def run():
            for call in (lambda: sweep.tell(Note("x")), sweep.poll):
                try:
                    call()
                except MessageError as error:
                    caught.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return caught

    Wrong.deed = deed
    results, _ = value_of(Failing([0], comm), comm)
    if comm.size > 1:
        assert len(results[0]) == 2
        assert all("another thread" in text for text in results[0])


def test_nobody_handles_it(comm):
    Wrong.deed = tells(3.5)
    error = error_of(Wrong([0], comm), comm)
    assert isinstance(error, MessageError if comm.size > 1 else (MessageError, JobError))
    assert "no handler here for a message of type builtins.float" in str(error)
    check_healthy(comm)


class Raises(Talk):
    """The handler raises, on the rank and in the way that is asked for."""

    polls = False

    def next_job(self):
        job = super().next_job()
        self.broadcast(Note("raise"))
        return job

    def process_job(self, job):
        end = time.monotonic() + 20
        while self.polls and time.monotonic() < end:
            self.poll()

    def hear(self, source, note):
        raise OSError("disk full")


def test_a_handler_that_raises_in_poll_fails_the_job(comm):
    class Late(Raises):
        polls = True

        def next_job(self):
            return Sweep.next_job(self)

        def on_job_sent(self, slave, index):
            self.broadcast(Note("raise"))

    if comm.size > 1:
        error = error_of(Late([0], comm, credit=1), comm)
        assert isinstance(error, JobError)
        assert "disk full" in str(error)
        check_healthy(comm)


def test_a_handler_that_raises_between_jobs_ends_the_slave(comm):
    if comm.size > 1:
        outcomes = run(Raises([0], comm), comm)
        assert isinstance(outcomes[0].error, SlaveError)
        assert "disk full" in str(outcomes[0].error)
        assert any(isinstance(outcome.error, OSError) for outcome in outcomes[1:])
        check_healthy(comm)


def test_a_handler_that_raises_on_the_master_ends_the_run(comm):
    class OnMaster(Raises):
        def next_job(self):
            return Sweep.next_job(self)

        def process_job(self, job):
            self.tell(Note("raise"))

    error = error_of(OnMaster(range(10), comm), comm)
    assert "disk full" in str(error)
    assert isinstance(error, OSError if comm.size > 1 else JobError)
    check_healthy(comm)


def test_a_slave_that_does_not_poll_cannot_be_told_for_ever(comm):
    class Deaf(Talk):
        def process_job(self, job):
            time.sleep(0.5)

        def on_job_sent(self, slave, index):
            for number in range(2000):
                self.tell(Note("more", number), slave)

    if comm.size > 1:
        error = error_of(Deaf([0], comm), comm)
        assert isinstance(error, MessageError)
        assert "1024 wait for it already" in str(error)
        assert "self.poll()" in str(error)
        check_healthy(comm)


def test_the_end_of_a_run_ends_a_job_that_polls(comm):
    class Stuck(Talk):
        def process_job(self, job):
            if job == 0:
                raise OSError("the first job fails")
            end = time.monotonic() + 30
            while time.monotonic() < end:
                self.poll()

    if comm.size > 2:
        begin = time.monotonic()
        error = error_of(Stuck(range(3), comm, credit=1), comm)
        assert "the first job fails" in str(error)
        assert time.monotonic() - begin < 20


def test_the_end_of_a_run_ends_an_on_startup_that_polls(comm):
    class Slow(Talk):
        def on_startup(self):
            end = time.monotonic() + (30 if self.rank > 1 else 0)  # the master waits until one slave is there
            while time.monotonic() < end:
                self.poll()

    begin = time.monotonic()
    assert value_of(Slow([], comm), comm) == ({}, {})
    assert time.monotonic() - begin < 20
    check_healthy(comm)


def test_only_in_a_run(comm):
    sweep = Talk([], comm)
    for call in (lambda: sweep.tell(Note("x")), lambda: sweep.broadcast(Note("x")), sweep.poll):
        with pytest.raises(MessageError, match="there is none now"):
            call()


def test_a_poll_that_finds_nothing_is_cheap(comm):
    """It costs a few times what any method costs."""

    def least_s(call):
        times = []
        for _ in range(500):
            begin = time.perf_counter()
            for _ in range(100):
                call()
            times.append(time.perf_counter() - begin)
        return min(times)

    class Polls(Talk):
        def nothing(self):
            return None

        def process_job(self, job):
            return least_s(self.poll) / least_s(self.nothing)

    results, failures = value_of(Polls([0], comm), comm)
    assert not failures
    assert results[0] < 15

"""Which batch is to blame for a slave that failed, and what becomes of it; compiled and uncompiled."""

from __future__ import annotations

import pytest

FAILS = pytest.mark.parametrize("fails", ["on_lost", "on_suspect"])


# ---- strikes -----------------------------------------------------------------------------------------------------


def test_running_is_what_the_slave_got_first(drive):
    d = drive(slaves=2, credit=3)
    assert [d.s.running(slave) for slave in (1, 2)] == [-1, -1]
    sent = [d.send()[0] for _ in range(6)]
    ones, twos = sent[::2], sent[1::2]
    for one, two in zip(ones, twos, strict=True):
        assert (d.s.running(1), d.s.running(2)) == (one, two)
        d.answer(1, d.dispatch(one))
        d.answer(2, d.dispatch(two))
    assert [d.s.running(slave) for slave in (1, 2)] == [-1, -1]


def test_running_goes_by_the_dispatch_not_by_the_slot(drive):
    d = drive(slaves=1, credit=2, batches=2)
    low, high = d.send()[0], d.send()[0]
    assert (low, high) == (0, 1)
    d.answer(1, d.dispatch(low))
    d.s.release(low)
    assert d.send()[0] == low  # what it holds now is newer
    assert d.s.running(1) == high


@pytest.mark.parametrize("slave", [-1, 0, 4])
def test_nobody_else_runs_anything(drive, slave):
    """0 stands for nobody and for the master."""
    d = drive(slaves=3)
    d.submit()
    d.s.assign_local()
    assert d.s.running(slave) == -1


@FAILS
def test_only_the_batch_that_ran_is_struck(drive, fails):
    d = drive(slaves=1, credit=3)
    sent = [d.send()[0] for _ in range(3)]
    assert getattr(d.s, fails)(1) == 3
    assert [d.s.strikes(slot) for slot in sent] == [1, 0, 0]
    assert [d.s.attempt(slot) for slot in sent] == [1, 1, 1]
    d.s.on_ready(1)
    assert d.answer(1, (sent[0], 0, 1, 0)) == "deliver"
    assert [d.assign()[0], d.assign()[0]] == sent[1:]
    assert getattr(d.s, fails)(1) == 2
    assert [d.s.strikes(slot) for slot in sent[1:]] == [1, 0]


@FAILS
def test_nothing_is_struck_if_what_ran_has_ended(drive, fails):
    """Another slave's answer came first: what this one runs does not matter any more, and what it holds besides it did not run."""
    d = drive(slaves=2, credit=2, batches=4)
    slot, _ = d.send()
    old = d.dispatch(slot)
    d.s.on_suspect(1)
    assert d.assign() == (slot, 2)
    second, slave = d.send()
    assert slave == 2
    assert d.answer(1, old) == "deliver"
    d.s.release(slot)
    assert d.s.running(2) == slot
    assert getattr(d.s, fails)(2) == 1
    assert (d.s.strikes(second), d.s.attempt(second), d.batch(second)) == (0, 1, "waiting")


@FAILS
@pytest.mark.parametrize("max_attempts", [2, 3, 5])
def test_a_batch_is_taken_apart_with_one_strike_left(drive, fails, max_attempts):
    d = drive(slaves=1, batches=3, max_attempts=max_attempts)
    slot = d.submit(jobs=3)
    for _ in range(max_attempts - 1):
        assert d.s.next_given_up() == -1
        assert d.assign() == (slot, 1)
        assert getattr(d.s, fails)(1) == 1
        d.s.on_ready(1)
    assert (d.s.next_given_up(), d.s.next_given_up()) == (slot, -1)
    assert (d.batch(slot), d.s.ended, d.s.resent, d.s.strikes(slot)) == ("ended", 1, max_attempts - 2, max_attempts - 1)
    assert d.s.assign() == -1
    assert d.s.release(slot) == 0
    for job in range(3):
        assert d.s.submit(d.s.open(), job, 1, max_attempts - 1) == 0
    blamed, _ = d.assign()
    assert d.s.first(blamed) == 0
    assert getattr(d.s, fails)(1) == 1
    assert (d.s.next_given_up(), d.s.next_given_up()) == (blamed, -1)
    assert d.s.strikes(blamed) == max_attempts
    d.s.release(blamed)
    d.s.on_ready(1)
    for job in (1, 2):  # the others are innocent
        slot, _ = d.assign()
        assert d.s.first(slot) == job
        assert d.answer(1, d.dispatch(slot)) == "deliver"
        d.s.release(slot)
    assert (d.s.open_count, d.s.ended) == (0, 4)


@FAILS
def test_what_did_not_run_is_not_taken_apart(drive, fails):
    d = drive(slaves=1, credit=2, max_attempts=2)
    first, second = d.send(jobs=3)[0], d.send(jobs=3)[0]
    getattr(d.s, fails)(1)
    assert (d.s.next_given_up(), d.s.next_given_up()) == (first, -1)
    assert (d.batch(second), d.s.strikes(second)) == ("waiting", 0)


@FAILS
def test_with_one_attempt_a_batch_fails_as_a_whole(drive, fails):
    """No strike was left from the beginning. What the slave held besides is sent again."""
    d = drive(slaves=1, credit=2, max_attempts=1)
    first, second = d.send(jobs=3)[0], d.send(jobs=3)[0]
    assert getattr(d.s, fails)(1) == 2
    assert (d.s.next_given_up(), d.s.next_given_up()) == (first, -1)
    assert (d.s.strikes(first), d.s.strikes(second), d.batch(second)) == (1, 0, "waiting")


def test_an_answer_to_a_batch_that_was_taken_apart_does_not_match_its_jobs(drive):
    d = drive(slaves=1, batches=1, max_attempts=2)
    slot, _ = d.send(jobs=3)
    old = d.dispatch(slot)
    d.s.on_suspect(1)
    assert d.s.next_given_up() == slot
    assert d.answer(1, old) == "late"
    d.s.release(slot)
    assert d.answer(1, old) == "late"
    assert d.s.open() == slot
    assert d.s.submit(slot, old[1], 1, 1) == 0
    assert d.answer(1, old) == "refused"
    d.s.on_ready(1)
    assert d.assign() == (slot, 1)
    assert d.answer(1, old) == "refused"
    assert d.answer(1, d.dispatch(slot)) == "deliver"


@FAILS
@pytest.mark.parametrize("jobs", [1, 3])
def test_a_batch_is_given_up_after_256_dispatches(drive, fails, jobs):
    d = drive(slaves=1, max_attempts=1000)
    slot = d.submit(jobs)
    for attempt in range(256):
        assert d.s.next_given_up() == -1
        assert d.assign() == (slot, 1)
        assert d.s.attempt(slot) == attempt
        assert getattr(d.s, fails)(1) == 1
        d.s.on_ready(1)
    assert (d.s.next_given_up(), d.s.next_given_up()) == (slot, -1)
    assert (d.batch(slot), d.s.attempt(slot), d.s.strikes(slot), d.s.resent) == ("ended", 256, 256, 255)
    assert d.s.release(slot) == 0
    assert d.s.open_count == 0


def test_a_batch_is_given_up_after_256_dispatches_without_a_strike(drive):
    """A new one stands ahead of it each time."""
    d = drive(slaves=1, credit=2)
    ahead, slot = d.submit(), d.submit(jobs=3)
    for attempt in range(256):
        assert d.s.next_given_up() == -1
        assert (d.assign()[0], d.assign()[0]) == (ahead, slot)
        assert d.s.attempt(slot) == attempt
        old, after = d.dispatch(ahead), d.submit()
        assert d.s.on_suspect(1) == 2
        assert d.answer(1, old) == "deliver"
        d.s.release(ahead)
        d.s.on_ready(1)
        ahead = after
    assert (d.s.next_given_up(), d.s.next_given_up()) == (slot, -1)
    assert (d.batch(slot), d.s.attempt(slot), d.s.strikes(slot)) == ("ended", 256, 0)


# ---- the master works itself, but never what was struck ----------------------------------------------------------


@FAILS
def test_the_master_does_not_run_what_was_struck(drive, fails):
    d = drive(slaves=2, credit=2, max_attempts=5)
    sent = [d.send()[0] for _ in range(4)]
    for slave in (1, 2):
        getattr(d.s, fails)(slave)
    struck, clean = [slot for slot in sent if d.s.strikes(slot)], [slot for slot in sent if not d.s.strikes(slot)]
    assert (len(struck), len(clean)) == (2, 2)
    assert [d.s.assign_local() for _ in range(3)] == [*clean, -1]
    assert [d.s.next_given_up() for _ in range(3)] == [*struck, -1]
    assert [d.batch(slot) for slot in struck] == ["ended"] * 2
    assert [d.batch(slot) for slot in clean] == ["sent"] * 2
    assert [d.s.attempt(slot) for slot in sent] == [1] * 4
    assert (d.s.ended, d.s.sent, d.s.waiting_count) == (2, 6, 0)
    for slot in struck:
        assert d.s.release(slot) == 0
    for slot in clean:
        assert d.answer(0, d.dispatch(slot)) == "deliver"
        assert d.s.release(slot) == 0
    assert d.s.open_count == 0


def test_what_was_struck_may_wait_for_a_slave(drive):
    d = drive(slaves=2)
    sent = [d.send()[0] for _ in range(2)]
    d.s.on_suspect(1)
    clean = d.submit()
    assert d.s.assign_local(False, True) == clean
    assert [d.s.assign_local(False, True) for _ in range(2)] == [-1, -1]
    assert (d.s.waiting_count, d.s.next_given_up()) == (1, -1)
    d.s.on_ready(1)
    assert d.s.assign() == sent[0]
    assert d.s.holder(sent[0]) == 1


def test_the_master_gives_up_what_was_submitted_with_strikes(drive):
    d = drive(slaves=0)
    slot = d.submit(strikes=2)
    assert d.s.assign_local() == -1
    assert (d.s.sent, d.s.ended, d.s.waiting_count) == (0, 1, 0)
    assert (d.s.next_given_up(), d.s.next_given_up()) == (slot, -1)
    assert d.s.release(slot) == 0


def test_a_struck_batch_that_waits_is_answered_before_the_master_gives_it_up(drive):
    d = drive(slaves=1)
    slot, _ = d.send()
    old = d.dispatch(slot)
    d.s.on_lost(1)
    assert d.answer(1, old) == "deliver"
    assert (d.s.assign_local(), d.s.next_given_up()) == (-1, -1)
    assert d.s.release(slot) == 0


# ---- what deadlines go by ----------------------------------------------------------------------------------------


def test_order_tells_dispatches_apart_and_answers_are_counted(drive):
    d = drive(slaves=2, credit=2)
    (first, slave), (second, other) = d.send(), d.send()
    assert (slave, other) == (1, 2)
    assert d.s.order(first) < d.s.order(second)
    assert [d.s.answers(slave) for slave in (0, 1, 2)] == [0, 0, 0]
    dispatch = d.dispatch(first)
    assert d.answer(1, dispatch) == "deliver"
    assert d.answer(1, dispatch) == "late"  # it is an answer all the same
    assert [d.s.answers(slave) for slave in (0, 1, 2)] == [0, 2, 0]


def test_a_struck_batch_runs_on_a_master_that_isolates_jobs(drive):
    d = drive(slaves=1)
    slot, slave = d.send()
    d.s.on_lost(slave)
    assert d.s.assign_local(True) == slot
    assert d.s.strikes(slot) == 1
    assert d.answer(0, d.dispatch(slot)) == "deliver"

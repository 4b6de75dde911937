"""The scheduler when slaves fall silent, die and return: every transition; compiled and uncompiled."""

from __future__ import annotations

import pytest

FAILS = pytest.mark.parametrize("fails", ["on_lost", "on_suspect"])


# ---- losses ------------------------------------------------------------------------------------------------------


def test_what_a_lost_slave_held_goes_to_others(drive):
    d = drive(slaves=3, credit=2)
    sent = [d.send() for _ in range(6)]
    assert d.s.on_lost(2) == 2
    again = [slot for slot, slave in sent if slave == 2]
    assert [d.batch(slot) for slot in again] == ["waiting"] * 2
    assert [d.s.holder(slot) for slot in again] == [0, 0]
    assert [d.s.attempt(slot) for slot in again] == [1, 1]
    assert (d.s.held(2), d.s.resent, d.s.waiting_count, d.s.lost, d.s.free_credit) == (0, 2, 2, 1, 0)
    assert d.s.assign() == -1
    slot, slave = sent[0]
    d.answer(slave, d.dispatch(slot))
    assert d.assign() == (again[0], 1)
    assert d.s.sent == 7


def test_a_lost_slave_gives_back_only_the_credit_it_had_left(drive):
    d = drive(slaves=2, credit=3)
    assert [d.send()[1] for _ in range(3)] == [1, 2, 1]
    assert d.s.free_credit == 3
    assert d.s.on_lost(1) == 2
    assert d.s.free_credit == 2
    assert d.s.on_ready(1) == 0
    assert d.s.free_credit == 5


@pytest.mark.parametrize("event", ["on_lost", "on_suspect"])
@pytest.mark.parametrize("max_attempts", [1, 2, 5])
def test_a_batch_is_given_up_after_so_many_strikes(drive, max_attempts, event):
    d = drive(slaves=1, max_attempts=max_attempts)
    slot = d.submit()
    for attempt in range(max_attempts):
        assert d.s.next_given_up() == -1
        assert d.s.attempt(slot) == d.s.strikes(slot) == attempt
        assert d.assign() == (slot, 1)
        assert getattr(d.s, event)(1) == 1
        d.s.on_ready(1)
    assert (d.batch(slot), d.s.ended, d.s.resent) == ("ended", 1, max_attempts - 1)
    assert d.s.assign() == -1
    assert d.s.next_given_up() == slot
    assert d.s.next_given_up() == -1
    assert (d.s.first(slot), d.s.jobs(slot), d.s.strikes(slot)) == (0, 1, max_attempts)
    assert d.s.release(slot) == 0
    assert d.s.open_count == 0


def test_many_given_up_at_once_are_all_named(drive):
    d = drive(slaves=3, batches=4, max_attempts=1)
    for round_ in range(5):  # around the ring several times
        sent = [d.send()[0] for _ in range(3)]
        assert [d.s.on_lost(slave) for slave in (1, 2, 3)] == [1, 1, 1]
        named = [d.s.next_given_up() for _ in range(4)]
        assert sorted(named) == [-1, *sorted(sent)]
        for slot in sent:
            d.s.release(slot)
        for slave in (1, 2, 3):
            d.s.on_ready(slave)
        assert d.s.ended == 3 * (round_ + 1)
    assert d.s.open_count == 0


def test_an_answer_after_giving_up_is_late(drive):
    d = drive(max_attempts=1)
    slot, slave = d.send()
    dispatch = d.dispatch(slot)
    d.s.on_lost(slave)
    assert d.answer(slave, dispatch) == "late"  # before it was named
    assert d.s.next_given_up() == slot
    assert d.answer(slave, dispatch) == "late"
    d.s.release(slot)
    assert d.answer(slave, dispatch) == "late"
    assert (d.s.ended, d.s.late) == (1, 3)


# ---- slaves that return ------------------------------------------------------------------------------------------


def test_a_revenants_answer_wins_while_the_batch_waits(drive):
    d = drive(slaves=3)
    sent = [d.send() for _ in range(3)]
    late = d.submit()
    slot, slave = sent[0]
    dispatch = d.dispatch(slot)
    d.s.on_lost(slave)
    later = d.submit()
    assert d.answer(slave, dispatch) == "deliver"  # from between two that wait
    assert (d.batch(slot), d.s.waiting_count, d.s.ended) == ("ended", 2, 1)
    assert d.s.release(slot) == 0
    assert d.batch(slot) == "free"
    for slot, slave in sent[1:]:
        d.answer(slave, d.dispatch(slot))
    assert [d.assign()[0], d.assign()[0]] == [late, later]
    assert d.s.assign() == -1


def test_a_revenants_answer_wins_while_another_slave_works_on_the_batch(drive):
    d = drive(slaves=2)
    slot, slave = d.send()
    old = d.dispatch(slot)
    d.s.on_lost(slave)
    assert d.assign() == (slot, 2)
    new = d.dispatch(slot)
    assert d.answer(slave, old) == "deliver"
    assert (d.batch(slot), d.s.holder(slot), d.s.held(2)) == ("ended", 2, 1)
    assert d.s.release(slot) == 0
    assert (d.batch(slot), d.s.open_count) == ("retired", 1)  # slave 2 still works on what the slot holds
    assert d.answer(2, new) == "late"
    assert (d.batch(slot), d.s.open_count, d.s.held(2), d.s.free_credit) == ("free", 0, 0, 1)
    assert (d.s.ended, d.s.late) == (1, 1)


def test_the_second_answer_comes_before_the_release(drive):
    d = drive(slaves=2)
    slot, slave = d.send()
    old = d.dispatch(slot)
    d.s.on_lost(slave)
    d.assign()
    assert d.answer(slave, old) == "deliver"
    assert d.answer(2, d.dispatch(slot)) == "late"
    assert (d.batch(slot), d.s.holder(slot), d.s.held(2)) == ("ended", 0, 0)
    assert d.s.release(slot) == 0
    assert d.batch(slot) == "free"


@pytest.mark.parametrize("released", [False, True])
def test_the_second_slave_is_lost_after_the_first_ones_answer(drive, released):
    d = drive(slaves=2)
    slot, slave = d.send()
    old = d.dispatch(slot)
    d.s.on_lost(slave)
    d.assign()
    assert d.answer(slave, old) == "deliver"
    if released:
        d.s.release(slot)
    assert d.s.on_lost(2) == 0  # nothing has to be done again
    if not released:
        assert d.batch(slot) == "ended"
        d.s.release(slot)
    assert (d.batch(slot), d.s.open_count, d.s.resent) == ("free", 0, 1)


def test_a_returned_slave_answers_its_old_attempt_while_it_works_on_the_new_one(drive):
    d = drive(slaves=1)
    slot, _ = d.send()
    old = d.dispatch(slot)
    d.s.on_lost(1)
    d.s.on_ready(1)
    assert d.assign() == (slot, 1)
    new = d.dispatch(slot)
    assert d.answer(1, old) == "deliver"
    assert (d.s.held(1), d.s.free_credit) == (1, 0)  # the new attempt is still with it
    d.s.release(slot)
    assert d.batch(slot) == "retired"
    assert d.answer(1, old) == "late"
    assert (d.batch(slot), d.s.held(1)) == ("retired", 1)
    assert d.answer(1, new) == "late"
    assert (d.batch(slot), d.s.held(1), d.s.free_credit) == ("free", 0, 1)


def test_an_old_answer_does_not_match_a_slot_that_was_used_again(drive):
    d = drive(slaves=2, batches=1)
    slot, slave = d.send(jobs=2)
    old = d.dispatch(slot)
    d.s.on_lost(slave)
    d.assign()
    assert d.answer(2, d.dispatch(slot)) == "deliver"
    d.s.release(slot)
    assert d.send(jobs=2) == (slot, 2)
    assert d.answer(slave, old) == "late"
    assert (d.batch(slot), d.s.holder(slot)) == ("sent", 2)


# ---- the master works itself -------------------------------------------------------------------------------------


def test_local_work_needs_no_credit(drive):
    d = drive(slaves=1)
    d.send()
    slot = d.submit()
    assert d.s.assign_local() == slot
    assert (d.batch(slot), d.s.holder(slot), d.s.held(1), d.s.free_credit, d.s.sent) == ("sent", 0, 1, 0, 2)
    assert d.s.assign_local() == -1
    assert d.answer(0, d.dispatch(slot)) == "deliver"
    assert d.s.free_credit == 0
    d.s.release(slot)
    assert d.batch(slot) == "free"


def test_local_work_and_a_revenant(drive):
    d = drive(slaves=1, credit=2)
    ran, slot = d.send()[0], d.send()[0]
    old, slave = d.dispatch(slot), 1
    d.s.on_lost(slave)
    assert d.s.assign_local() == slot  # the other one was struck
    new = d.dispatch(slot)
    assert d.answer(slave, old) == "deliver"
    assert d.answer(0, new) == "late"
    d.s.release(slot)
    assert (d.batch(slot), d.s.ended, d.s.late) == ("free", 2, 1)
    assert d.s.next_given_up() == ran


def test_a_loss_does_not_touch_local_work(drive):
    d = drive(slaves=1)
    slot = d.submit()
    d.s.assign_local()
    assert d.s.on_lost(1) == 0
    assert (d.batch(slot), d.s.attempt(slot)) == ("sent", 0)


# ---- suspicion ---------------------------------------------------------------------------------------------------


def test_a_suspect_comes_back(drive):
    d = drive(slaves=2, credit=3)
    assert d.s.on_suspect(1) == 0
    assert (d.slave(1), d.s.up_count, d.s.suspect_count, d.s.absent_count) == ("suspect", 1, 1, 0)
    assert (d.s.free_credit, d.s.ready_count, d.s.suspected, d.s.lost, d.s.reinstated) == (3, 1, 1, 0, 0)
    assert d.s.on_ready(1) == 0
    assert (d.slave(1), d.s.up_count, d.s.suspect_count, d.s.absent_count) == ("up", 2, 0, 0)
    assert (d.s.free_credit, d.s.ready_count, d.s.suspected, d.s.lost, d.s.reinstated) == (6, 2, 1, 0, 1)


def test_a_suspect_is_lost(drive):
    d = drive(slaves=2)
    d.send()
    assert d.s.on_suspect(1) == 1
    assert d.s.on_lost(1) == 0  # it holds nothing any more
    assert (d.slave(1), d.s.up_count, d.s.suspect_count, d.s.suspected, d.s.lost) == ("lost", 1, 0, 1, 1)
    assert (d.s.free_credit, d.s.ready_count) == (1, 1)
    assert d.s.on_ready(1) == 0
    assert (d.slave(1), d.s.up_count, d.s.suspect_count, d.s.reinstated) == ("up", 2, 0, 1)


@pytest.mark.parametrize("state", ["absent", "suspect", "lost"])
def test_only_a_slave_that_is_up_is_suspected(drive, state):
    d = drive(up=state != "absent")
    if state == "suspect":
        d.s.on_suspect(2)
    elif state == "lost":
        d.s.on_lost(2)
    assert d.slave(2) == state
    before = d.facts()
    assert d.s.on_suspect(2) == -1
    assert d.facts() == before


def test_what_a_suspect_held_goes_to_others(drive):
    d = drive(slaves=2, credit=2)
    sent = [d.send() for _ in range(4)]
    assert d.s.on_suspect(1) == 2
    again = [slot for slot, slave in sent if slave == 1]
    assert [d.batch(slot) for slot in again] == ["waiting"] * 2
    assert [(d.s.holder(slot), d.s.attempt(slot)) for slot in again] == [(0, 1)] * 2
    assert (d.s.held(1), d.s.resent, d.s.waiting_count, d.s.free_credit) == (0, 2, 2, 0)
    assert d.s.assign() == -1  # the other one is busy
    for slot, slave in sent:
        if slave == 2:
            assert d.answer(2, d.dispatch(slot)) == "deliver"
    assert [d.assign(), d.assign()] == [(slot, 2) for slot in again]


def test_a_suspect_gets_nothing_until_it_is_back(drive):
    d = drive(slaves=2)
    d.s.on_suspect(1)
    assert d.send()[1] == 2  # passes over slave 1's entry in the queue
    d.submit()
    assert d.s.assign() == -1
    d.s.on_ready(1)
    assert d.assign()[1] == 1
    assert d.s.assign() == -1


def test_a_suspect_that_returns_at_once_stands_in_the_queue_once(drive):
    d = drive(slaves=2)
    for _ in range(5):
        assert d.s.on_suspect(1) == 0
        assert d.s.on_ready(1) == 0
    assert (d.s.ready_count, d.s.free_credit, d.s.suspected, d.s.reinstated) == (2, 2, 5, 5)
    assert [d.send()[1], d.send()[1]] == [1, 2]
    d.submit()
    assert d.s.assign() == -1


@pytest.mark.parametrize("back", [False, True])
def test_a_suspects_answer_wins_while_the_batch_waits(drive, back):
    d = drive(slaves=1)
    slot, _ = d.send()
    dispatch = d.dispatch(slot)
    d.s.on_suspect(1)
    if back:
        d.s.on_ready(1)
    assert d.answer(1, dispatch) == "deliver"
    assert (d.s.waiting_count, d.s.free_credit, d.s.held(1)) == (0, int(back), 0)
    assert d.s.release(slot) == 0
    assert (d.batch(slot), d.s.open_count) == ("free", 0)


@FAILS
def test_the_slot_of_an_old_answer_is_free_once_the_other_slave_fails_too(drive, fails):
    d = drive(slaves=2)
    slot, _ = d.send()
    old = d.dispatch(slot)
    d.s.on_suspect(1)
    assert d.assign() == (slot, 2)
    assert d.answer(1, old) == "deliver"
    d.s.release(slot)
    assert d.batch(slot) == "retired"
    assert getattr(d.s, fails)(2) == 0
    assert (d.batch(slot), d.s.open_count, d.s.resent) == ("free", 0, 1)

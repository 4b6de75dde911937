"""The scheduler while all goes well, and every call that it refuses; compiled and uncompiled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scheduler_driver import COUNTERS, TOTALS

import jd_hpc

# ---- constants and constructor -----------------------------------------------------------------------------------


def test_constants_are_the_places_of_the_names(uncompiled, compiled):
    for prefix, names in (("SLAVE", "SLAVE_STATES"), ("BATCH", "BATCH_STATES"), ("VERDICT", "VERDICTS")):
        assert getattr(uncompiled, names) == getattr(compiled, names)
        for number, name in enumerate(getattr(uncompiled, names)):
            assert getattr(uncompiled, f"{prefix}_{name.upper()}") == number


def test_constants_are_those_of_the_pxd(uncompiled):
    text = (Path(jd_hpc.__file__).parent / "scheduler.pxd").read_text()
    in_c = dict(re.findall(r"^ {4}([A-Z]+_[A-Z]+) = (\d+)", text, re.MULTILINE))
    in_python = {name: getattr(uncompiled, name) for name in vars(uncompiled) if re.fullmatch("[A-Z]+_[A-Z]+", name)}
    in_python = {name: str(value) for name, value in in_python.items() if isinstance(value, int)}
    assert in_c == in_python
    assert len(in_c) == 14
    assert in_c["DISPATCHES_MOST"] == "256"


@pytest.mark.parametrize("wrong", [(-1, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0), (1, -5, 1, 1)])
def test_constructor_refuses_numbers_out_of_range(scheduler_module, wrong):
    with pytest.raises(ValueError, match=f"at least 1; got {', '.join(map(str, wrong))}"):
        scheduler_module.Scheduler(*wrong)


def test_a_new_scheduler(scheduler_module):
    s = scheduler_module.Scheduler(4, 2, 5)
    assert (s.slave_count, s.credit, s.batch_count, s.max_attempts) == (4, 2, 5, 3)
    assert {name: getattr(s, name) for name in COUNTERS + TOTALS} == dict.fromkeys(COUNTERS + TOTALS, 0) | {"absent_count": 4}
    assert s.assign() == s.assign_local() == s.next_given_up() == -1
    assert [s.state_of_slave(i) for i in range(1, 5)] == [0] * 4
    assert [s.state_of_batch(i) for i in range(5)] == [0] * 5


def test_no_slaves_at_all(drive):
    d = drive(slaves=0, batches=1)
    assert d.s.on_ready(1) == d.s.on_ready(0) == d.s.on_lost(1) == -1
    slot = d.submit()
    assert d.s.assign() == -1
    assert d.s.assign_local() == slot
    assert d.answer(0, d.dispatch(slot)) == "deliver"
    assert d.s.release(slot) == 0
    assert d.s.open_count == 0


# ---- slots -------------------------------------------------------------------------------------------------------


def test_slots_run_out_and_come_back(drive):
    d = drive(batches=3)
    slots = [d.s.open() for _ in range(3)]
    assert sorted(slots) == [0, 1, 2]
    assert d.s.open() == -1
    assert d.s.open_count == 3
    assert d.s.cancel(slots[1]) == 0
    assert d.batch(slots[1]) == "free"
    assert d.s.open() == slots[1]
    assert d.s.open() == -1


def test_submit(drive):
    d = drive()
    slot = d.s.open()
    assert d.batch(slot) == "open"
    assert d.s.submit(slot, 1 << 60, 7) == 0
    assert d.batch(slot) == "waiting"
    assert (d.s.first(slot), d.s.jobs(slot), d.s.attempt(slot), d.s.holder(slot)) == (1 << 60, 7, 0, 0)
    assert (d.s.waiting_count, d.s.open_count) == (1, 1)
    assert d.s.strikes(slot) == 0
    assert d.s.describe(slot) == f"slot {slot} of 6: waiting, jobs {1 << 60} + 7, attempt 0, strikes 0, slave 0"


def test_submit_with_strikes(drive):
    d = drive()
    slot = d.s.open()
    assert d.s.submit(slot, 4, 1, 2) == 0
    assert (d.s.strikes(slot), d.s.attempt(slot), d.batch(slot)) == (2, 0, "waiting")
    assert d.s.describe(slot) == f"slot {slot} of 6: waiting, jobs 4 + 1, attempt 0, strikes 2, slave 0"
    assert d.assign() == (slot, 1)


@pytest.mark.parametrize(("first", "jobs", "strikes"), [(-1, 1, 0), (0, 0, 0), (0, -3, 0), (0, 1, -1), (0, 1, 3), (0, 1, 4)])
def test_submit_refuses_numbers_out_of_range(drive, first, jobs, strikes):
    d = drive()
    slot = d.s.open()
    before = d.facts()
    assert d.s.submit(slot, first, jobs, strikes) == -1
    assert d.facts() == before
    assert d.s.submit(slot, 0, 1, 2) == 0


def test_a_slot_forgets_the_strikes_and_attempts_of_its_last_batch(drive):
    d = drive(slaves=1)
    slot, _ = d.send()
    d.s.on_lost(1)
    d.s.on_ready(1)
    d.assign()
    d.answer(1, d.dispatch(slot))
    assert (d.s.attempt(slot), d.s.strikes(slot)) == (1, 1)
    d.s.release(slot)
    assert d.send()[0] == slot
    assert (d.s.attempt(slot), d.s.strikes(slot)) == (0, 0)


def slot_in(d, state):
    """Bring a slot into a state."""
    if state == "free":
        return d.s.batch_count - 1
    if state == "open":
        return d.s.open()
    if state == "waiting":
        return d.submit()
    slot, slave = d.send()
    if state == "retired":
        old = d.dispatch(slot)
        d.s.on_lost(slave)
        assert d.assign()[0] == slot
        assert d.answer(slave, old) == "deliver"
        d.s.release(slot)
    elif state == "ended":
        assert d.answer(slave, d.dispatch(slot)) == "deliver"
    return slot


CALLS = {"submit": "open", "cancel": "open", "release": "ended"}


@pytest.mark.parametrize("state", ["free", "open", "waiting", "sent", "ended", "retired"])
@pytest.mark.parametrize("call", CALLS)
def test_calls_on_a_slot_in_each_state(drive, call, state):
    d = drive()
    slot = slot_in(d, state)
    assert d.batch(slot) == state
    arguments = (slot, 100, 1) if call == "submit" else (slot,)
    before = d.facts()
    result = getattr(d.s, call)(*arguments)
    if CALLS[call] == state:
        assert result == 0
        assert d.facts() != before
    else:
        assert result == -1
        assert d.facts() == before


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("slot", [-1, 6, 7])
def test_calls_on_a_slot_that_does_not_exist_are_refused(drive, call, slot):
    """-1 above all: it is what open() and assign() return when there is nothing."""
    d = drive()
    last = [d.s.open() for _ in range(6)]  # all are open: a slot taken modulo their number would be accepted
    d.s.submit(last[0], 0, 1)
    d.answer(1, d.dispatch(d.assign()[0]))
    before = d.facts()
    assert getattr(d.s, call)(*((slot, 100, 1) if call == "submit" else (slot,))) == -1
    assert d.facts() == before


@pytest.mark.parametrize("state", ["free", "open", "waiting", "sent", "ended", "retired"])
def test_describe_names_the_state(drive, state):
    d = drive()
    slot = slot_in(d, state)
    assert d.s.describe(slot).startswith(f"slot {slot} of 6: {state}, jobs ")


# ---- slaves ------------------------------------------------------------------------------------------------------


def test_a_slave_comes_goes_and_returns(drive):
    d = drive(slaves=2, credit=3, up=False)
    assert (d.slave(1), d.s.up_count, d.s.absent_count, d.s.free_credit) == ("absent", 0, 2, 0)
    assert d.s.on_ready(1) == 0
    assert (d.slave(1), d.s.up_count, d.s.absent_count, d.s.free_credit, d.s.ready_count) == ("up", 1, 1, 3, 1)
    assert d.s.on_lost(1) == 0
    assert (d.slave(1), d.s.up_count, d.s.absent_count, d.s.free_credit, d.s.ready_count) == ("lost", 0, 1, 0, 0)
    assert d.s.lost == 1
    assert d.s.reinstated == 0
    assert d.s.on_ready(1) == 0
    assert (d.slave(1), d.s.up_count, d.s.absent_count, d.s.free_credit, d.s.ready_count) == ("up", 1, 1, 3, 1)
    assert (d.s.lost, d.s.suspected, d.s.reinstated) == (1, 0, 1)


def test_a_slave_is_lost_before_it_reported(drive):
    d = drive(slaves=2, up=False)
    assert d.s.on_lost(2) == 0
    assert (d.slave(2), d.s.absent_count, d.s.up_count, d.s.lost, d.s.free_credit) == ("lost", 1, 0, 1, 0)
    assert d.s.on_ready(2) == 0
    assert (d.slave(2), d.s.absent_count, d.s.up_count, d.s.free_credit) == ("up", 1, 1, 1)
    assert d.send() == (0, 2)


@pytest.mark.parametrize("slave", [-1, 0, 4, 1000])
@pytest.mark.parametrize("event", ["on_ready", "on_lost", "on_suspect"])
def test_events_of_slaves_that_do_not_exist_are_refused(drive, event, slave):
    d = drive(slaves=3)
    before = d.facts()
    assert getattr(d.s, event)(slave) == -1
    assert d.facts() == before


def test_reporting_twice_and_being_lost_twice_are_refused(drive):
    d = drive()
    before = d.facts()
    assert d.s.on_ready(2) == -1
    assert d.facts() == before
    d.s.on_lost(2)
    before = d.facts()
    assert d.s.on_lost(2) == -1
    assert d.facts() == before


# ---- whose turn it is --------------------------------------------------------------------------------------------


def test_nothing_goes_out_without_a_batch_or_a_slave(drive):
    d = drive(up=False)
    d.submit()
    assert d.s.assign() == -1
    d.s.on_ready(3)
    assert d.assign() == (0, 3)
    assert d.s.assign() == -1
    assert (d.s.sent, d.s.ready_count, d.s.free_credit, d.s.held(3)) == (1, 0, 0, 1)
    assert (d.batch(0), d.s.holder(0)) == ("sent", 3)


def test_slaves_take_turns(drive):
    d = drive(slaves=5)
    order = []
    for _ in range(23):
        slot, slave = d.send()
        order.append(slave)
        assert d.answer(slave, d.dispatch(slot)) == "deliver"
        assert d.s.release(slot) == 0
    assert order == [1 + i % 5 for i in range(23)]


def test_turns_go_by_who_waits_longest_not_by_rank(drive):
    d = drive(slaves=4)
    sent = [d.send() for _ in range(4)]
    for slot, slave in reversed(sent):
        d.answer(slave, d.dispatch(slot))
        d.s.release(slot)
    assert [d.send()[1] for _ in range(4)] == [4, 3, 2, 1]


def test_everybody_gets_one_batch_before_anybody_gets_a_second(drive):
    d = drive(slaves=3, credit=3, batches=9)
    assert [d.send()[1] for _ in range(9)] == [1, 2, 3] * 3
    d.s.cancel(d.s.open())
    assert (d.s.free_credit, d.s.ready_count) == (0, 0)
    assert [d.s.held(slave) for slave in (1, 2, 3)] == [3, 3, 3]


def test_credit_is_a_limit_and_an_answer_gives_it_back(drive):
    d = drive(slaves=1, credit=2)
    for _ in range(4):
        d.submit()
    first, _ = d.assign()
    assert d.assign()[1] == 1
    assert d.s.assign() == -1
    assert d.answer(1, d.dispatch(first)) == "deliver"
    assert (d.s.held(1), d.s.free_credit, d.s.ready_count) == (1, 1, 1)
    assert d.assign()[1] == 1
    assert d.s.assign() == -1


def test_batches_go_out_in_the_order_they_came_in(drive):
    d = drive(slaves=2, credit=2, batches=3)
    order = []
    for _ in range(3):
        d.submit(jobs=2)
    for _ in range(20):  # around the ring several times
        slot, slave = d.assign()
        order.append(d.s.first(slot))
        d.answer(slave, d.dispatch(slot))
        d.s.release(slot)
        d.submit(jobs=2)
    assert order == list(range(0, 40, 2))


def test_a_lost_slave_gets_nothing_and_a_returned_one_does(drive):
    d = drive(slaves=3)
    d.s.on_lost(1)
    d.s.on_lost(3)
    assert d.s.ready_count == 1
    assert d.send()[1] == 2  # passes over slave 1's entry in the queue
    d.submit()
    assert d.s.assign() == -1
    d.s.on_ready(1)
    assert d.assign()[1] == 1
    d.s.on_ready(3)  # its entry in the queue was still there: it must not stand in it twice
    assert d.s.ready_count == 1
    assert d.send()[1] == 3
    d.submit()
    assert d.s.assign() == -1


# ---- answers -----------------------------------------------------------------------------------------------------


def test_the_way_of_a_batch(drive):
    d = drive()
    slot, slave = d.send(jobs=4)
    assert d.answer(slave, d.dispatch(slot)) == "deliver"
    assert (d.batch(slot), d.s.holder(slot), d.s.held(slave), d.s.ended) == ("ended", 0, 0, 1)
    assert d.s.open_count == 1
    assert d.s.release(slot) == 0
    assert (d.batch(slot), d.s.open_count) == ("free", 0)
    assert (d.s.sent, d.s.resent, d.s.late, d.s.refused, d.s.lost) == (1, 0, 0, 0, 0)


def test_the_same_answer_twice_is_late(drive):
    d = drive()
    slot, slave = d.send()
    dispatch = d.dispatch(slot)
    assert d.answer(slave, dispatch) == "deliver"
    before = d.s.free_credit, d.s.held(slave), d.s.ready_count
    assert d.answer(slave, dispatch) == "late"  # ended
    d.s.release(slot)
    assert d.answer(slave, dispatch) == "late"  # free
    assert d.s.open() == slot
    assert d.answer(slave, dispatch) == "late"  # open
    d.s.submit(slot, 500, 1)
    assert d.answer(slave, dispatch) == "late"  # waiting, with other jobs
    d.assign()
    assert d.answer(slave, dispatch) == "late"  # sent, with other jobs
    assert d.batch(slot) == "sent"
    assert d.s.late == 5
    assert (d.s.ended, d.s.refused) == (1, 0)
    assert before == (3, 0, 3)


@pytest.mark.parametrize(
    ("slave", "change"),
    [
        (-1, {}),
        (4, {}),
        (1, {"slot": -1}),
        (1, {"slot": 6}),
        (1, {"jobs": 1}),
        (1, {"jobs": 3}),
        (1, {"attempt": 1}),
        (1, {"attempt": -1}),
    ],
)
def test_answers_that_cannot_be_are_refused_and_change_nothing(drive, slave, change):
    d = drive()
    slot, _ = d.send(jobs=2)
    dispatch = dict(zip(("slot", "first", "jobs", "attempt"), d.dispatch(slot), strict=True)) | change
    counts, slaves, slots = d.facts()
    assert d.answer(slave, dispatch.values()) == "refused"
    assert d.facts() == (counts | {"refused": 1}, slaves, slots)
    assert d.answer(1, d.dispatch(slot)) == "deliver"


def test_an_answer_to_a_batch_that_was_never_sent_is_refused(drive):
    d = drive()
    slot = d.submit()
    assert d.answer(1, d.dispatch(slot)) == "refused"
    assert d.batch(slot) == "waiting"
    assert d.assign() == (slot, 1)


def test_an_answer_of_an_attempt_not_made_yet_is_refused_while_it_waits(drive):
    d = drive()
    slot, slave = d.send()
    d.s.on_lost(slave)
    assert d.s.attempt(slot) == 1
    assert d.answer(2, d.dispatch(slot)) == "refused"
    assert (d.batch(slot), d.s.waiting_count) == ("waiting", 1)


# ---- less credit ---------------------------------------------------------------------------------------------------


def test_the_credit_goes_down_and_up_again(drive):
    d = drive(slaves=2, credit=2, batches=8)
    first, one = d.send()
    d.send()
    assert (d.s.held_count, d.s.free_credit) == (2, 2)
    assert d.s.limit_credit(-1) == -1
    assert d.s.limit_credit(1) == 0
    waits = d.submit()
    assert (d.s.assign(), d.s.free_credit, d.s.ready_count) == (-1, 0, 0)
    assert d.answer(one, d.dispatch(first)) == "deliver"
    assert d.assign() == (waits, one)
    d.submit()
    assert d.s.limit_credit(0) == 0
    assert d.answer(one, d.dispatch(waits)) == "deliver"
    assert (d.s.assign(), d.s.free_credit, d.s.held_count, d.s.waiting_count) == (-1, 0, 1, 1)
    assert d.s.on_suspect(one) == 0
    assert d.s.on_ready(one) == 0
    assert d.s.assign() == -1
    assert d.s.limit_credit(2) == 0
    assert (d.s.free_credit, d.s.ready_count) == (3, 2)
    assert d.assign()[1] == one


def test_a_limit_keeps_the_turns_of_those_that_are_there(drive):
    d = drive(slaves=3, credit=2)
    d.s.on_lost(2)  # it still stands in the queue
    assert d.s.limit_credit(1) == 0
    assert (d.s.ready_count, d.s.free_credit) == (2, 2)
    assert [d.send()[1] for _ in range(2)] == [1, 3]
    assert d.s.assign() == -1

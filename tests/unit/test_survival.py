"""What the master makes of signs of life: verdicts, from a listener that says what it is told to say and a real scheduler."""

from __future__ import annotations

import pytest

from jd_hpc.scheduler import Scheduler
from jd_hpc.survival import AWAY_S, CATCH_UP_S, FAREWELL_S, Watch

TIMEOUT_S = 2.0


class Signs:
    """A listener without sockets."""

    def __init__(self):
        self.events = []
        self.heard = {}
        self.left = set()

    def poll(self, now):
        events, self.events = self.events, []
        return events

    def silent(self, now, timeout_s):
        return [rank for rank, at in self.heard.items() if at < now - timeout_s]

    def last_heard(self, rank):
        return self.heard.get(rank)


class World:
    def __init__(self, job_timeout_s=None, up=(1, 2, 3)):
        self.scheduler = Scheduler(3, 2, 8)
        for slave in up:
            self.scheduler.on_ready(slave)
        self.signs = Signs()
        self.watch = Watch(self.scheduler, self.signs, TIMEOUT_S, job_timeout_s)
        self.now = 100.0
        self.pass_time(1.0, beating=up)

    def pass_time(self, seconds, beating=(1, 2, 3)):
        """Let time pass in ticks; return the verdicts as (slave, what)."""
        verdicts = []
        end = self.now + seconds
        while self.now < end:
            self.now += 0.01
            for rank in beating:
                self.signs.heard[rank] = self.now
            verdicts += self.obey(self.watch.tick(self.now))
        return verdicts

    def obey(self, verdicts):
        """Do what the master does."""
        for slave, what, _ in verdicts:
            event = {"gone": "on_lost", "lost": "on_lost", "suspect": "on_suspect", "back": "on_ready"}[what]
            getattr(self.scheduler, event)(slave)
        return [(slave, what) for slave, what, _ in verdicts]

    def give(self, jobs=1, first=0):
        """Submit a batch and assign it: the slot."""
        slot = self.scheduler.open()
        self.scheduler.submit(slot, first, jobs)
        return self.scheduler.assign()

    def answer(self, slot):
        s = self.scheduler
        s.on_result(s.holder(slot), slot, s.first(slot), s.jobs(slot), s.attempt(slot))


def test_all_is_well():
    assert World().pass_time(30) == []


@pytest.mark.parametrize("kind", ["closed", "flood", "garbage"])
def test_a_connection_that_ends_is_a_loss(kind):
    world = World()
    world.signs.events = [(2, kind)]
    assert world.pass_time(0.02) == [(2, "gone")]


@pytest.mark.parametrize("kind", ["connected", "left"])
def test_comings_and_goings_in_order_are_no_loss(kind):
    world = World()
    world.signs.events = [(2, kind)]
    assert world.pass_time(0.02) == []


def test_a_rank_that_left_the_program_is_not_waited_for():
    """The run hears of it once, after what it may have said before that has come in."""
    world = World()
    world.signs.left.add(2)
    assert world.pass_time(FAREWELL_S - 0.1) == []
    assert world.pass_time(5.0) == [(2, "lost")]


def test_a_rank_that_is_not_used_may_be_lost_too():
    world = World()
    world.signs.events = [(7, "closed")]
    assert [(slave, what) for slave, what, _ in world.watch.tick(world.now)] == [(7, "gone")]


def test_silence_is_a_suspicion_once_and_ends_with_a_beat():
    world = World()
    assert world.pass_time(TIMEOUT_S + 0.5, beating=(1, 2)) == [(3, "suspect")]
    assert world.pass_time(5, beating=(1, 2)) == []
    assert world.pass_time(0.1) == [(3, "back")]
    assert world.pass_time(TIMEOUT_S + 0.5, beating=(1, 2)) == [(3, "suspect")]


def test_silence_before_it_reported_is_a_loss():
    world = World(up=(1, 2))
    world.signs.heard[3] = world.now
    assert world.pass_time(TIMEOUT_S + 0.5, beating=(1, 2)) == [(3, "lost")]


def test_a_master_that_was_away_judges_nobody_at_once():
    world = World(job_timeout_s=1.0)
    slot = world.give()
    assert world.pass_time(0.5) == []
    world.now += 60  # in a hook; the answer lies unread
    world.signs.heard = dict.fromkeys((1, 2, 3), world.now)
    assert world.obey(world.watch.tick(world.now)) == []
    assert world.pass_time(CATCH_UP_S / 2) == []
    world.answer(slot)
    assert world.pass_time(5) == []
    assert AWAY_S < 1.0


@pytest.mark.parametrize("jobs", [1, 3])
def test_over_its_deadline(jobs):
    world = World(job_timeout_s=1.0)
    slot = world.give(jobs)
    slave = world.scheduler.holder(slot)
    assert world.pass_time(jobs - 0.1) == []
    assert world.pass_time(0.4) == [(slave, "suspect")]
    assert world.pass_time(3) == []  # it beats all the time, but does not answer


def test_an_answer_ends_the_suspicion():
    world = World(job_timeout_s=1.0)
    slot = world.give()
    slave, facts = world.scheduler.holder(slot), (slot, 0, 1, 0)
    assert world.pass_time(1.3) == [(slave, "suspect")]
    world.scheduler.on_result(slave, *facts)
    assert world.pass_time(0.2) == [(slave, "back")]


def test_the_clock_of_a_batch_starts_when_the_one_before_is_answered():
    world = World(job_timeout_s=1.0, up=(1,))
    first, second = world.give(), world.give(first=1)
    assert world.pass_time(0.8, beating=(1,)) == []
    world.answer(first)
    world.scheduler.release(first)
    assert world.pass_time(0.8, beating=(1,)) == []
    assert world.scheduler.running(1) == second
    assert world.pass_time(0.4, beating=(1,)) == [(1, "suspect")]


def test_silent_and_overdue_at_once():
    world = World(job_timeout_s=1.0, up=(1,))
    slot = world.give()
    assert world.pass_time(TIMEOUT_S + 1, beating=()) == [(1, "suspect")]
    assert world.pass_time(1, beating=(1,)) == []  # heard again, but it still has not answered
    world.scheduler.on_result(1, slot, 0, 1, 0)
    assert world.pass_time(0.2, beating=(1,)) == [(1, "back")]


def test_without_a_side_channel_there_are_deadlines_only():
    world = World()
    watch = Watch(world.scheduler, None, TIMEOUT_S, 1.0, margin_s=0.5)
    slave = world.scheduler.holder(world.give())
    verdicts = [watch.tick(200 + at / 100) for at in range(200)]
    assert [(v.slave, v.what) for tick in verdicts for v in tick][:1] == [(slave, "suspect")]
    first = next(at for at, tick in enumerate(verdicts) if tick)
    assert 1.5 < first / 100 < 1.7

"""The scheduler in virtual time: slaves of random speed, a network with random delays, and faults; all from one seed.

The rules it keeps:

- The master sees what a real one would: messages, silence, and notices that a slave is lost. What it believes may be wrong.
- Messages between the master and one slave keep their order, each way; nothing else keeps any order.
- A slave runs its batches in the order in which they came, also those that the master took back while it was silent.
- Faults: see `Scenario`. A slave that dies is started again sooner or later; only if the master may work alone, some never are.
- `Books` checks each step (safety). After the faults, all must end (liveness).
- A poisonous job makes at most `max_attempts` slaves fail for which the master can know that it was this job, since each of them
  strikes its batch. It cannot know it if the slave still owed an older answer that was on its way, or ran what had been taken back
  from it before. If nothing but poisonous jobs goes wrong, there are no others, and no other job is given up: unless no slave is
  left, or it was dispatched 256 times because it stood behind poisonous ones so often, or `max_attempts` is 1.

`run(module, scenario)` raises `SimulationError`, which names the scenario.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import log
from types import ModuleType
from typing import Any

from books import Books, Dispatch, SimulationError
from driver import Driver
from scenario import Scenario

__all__ = ["Outcome", "Scenario", "SimulationError", "run"]

EVENTS_MOST = 2_000_000  # no run of ours needs so many: it would never end
COUNTERS = ("sent", "ended", "resent", "late", "refused", "lost", "suspected", "reinstated")


@dataclass(slots=True, eq=False)
class Slave:
    """A slave's process, which nobody sees from outside."""

    number: int
    life: int = 0  # raised when it dies: what was meant for the life before is gone
    heard_life: int = -1  # the one whose report the master has heard: that is whom it sends to
    muted: int = -1  # answers of lives up to this one are lost
    started: bool = False
    stopped: bool = False
    for_good: bool = False
    busy: bool = False
    due: bool = False  # it finished its batch, had it not been stopped
    silence: int = 0  # raised when it falls silent or is heard again
    inbox: deque[Dispatch] = field(default_factory=deque)
    down_free: float = 0.0  # when the last message to it arrives
    up_free: float = 0.0  # and from it


@dataclass
class Outcome:
    """What came of a run."""

    delivered: int = 0  # jobs
    failed: int = 0
    slots_most: int = 0  # open at once
    events: int = 0
    time: float = 0.0
    waited_most: int = 0  # dispatches that went to others while a ready slave waited
    counters: dict[str, int] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    gave_up: list[int] = field(default_factory=list)
    hurt: Counter[int] = field(default_factory=Counter)  # slaves that failed, by poisonous job


class Simulation:
    """One run."""

    def __init__(self, module: ModuleType, scenario: Scenario, books: type[Books] = Books) -> None:
        self.scenario, self.random = scenario, random.Random(scenario.seed)
        self.uniform = self.random.random
        self.books = books(module, scenario, max(1, scenario.slaves * scenario.credit) + scenario.read_ahead)
        self.books.where = lambda: f"(at {self.now:.3f} s, event {self.out.events})"
        self.driver = Driver(self.books, self.sends, lambda action, *args: self.at(self.now + self.some(0.5), action, *args))
        self.slaves = [Slave(number) for number in range(scenario.slaves + 1)]
        self.poison = frozenset(self.random.sample(range(scenario.jobs), min(scenario.poison, scenario.jobs)))
        self.now, self.serial = 0.0, 0
        self.queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.out = Outcome()

    # ---- time and network ----------------------------------------------------------------------------------------

    def at(self, time: float, action: Callable[..., None], *args: Any) -> None:
        self.serial += 1
        heapq.heappush(self.queue, (time, self.serial, action, args))

    def some(self, mean: float) -> float:
        """A random time."""
        return -log(1.0 - self.uniform()) * mean

    def chance(self, rate: float, fault: str) -> bool:
        if rate == 0.0 or self.now >= self.scenario.faults_until or self.uniform() >= rate:
            return False
        self.out.faults[fault] += 1
        return True

    def sends(self, number: int, dispatch: Dispatch) -> None:
        """The master sends a batch, or runs it itself."""
        if number == 0:
            self.at(self.now + self.some(dispatch.jobs), self.driver.hears_own_answer, dispatch)
            return
        slave = self.slaves[number]
        slave.down_free = max(self.now + self.some(self.scenario.delay), slave.down_free)
        self.at(slave.down_free, self.receives, slave, slave.heard_life, dispatch)

    def says(self, slave: Slave, action: Callable[..., None], *args: Any) -> None:
        """A message to the master; it never overtakes an older one."""
        slave.up_free = max(self.now + self.some(self.scenario.delay), slave.up_free)
        self.at(slave.up_free, action, slave, slave.life, *args)

    # ---- slaves --------------------------------------------------------------------------------------------------

    def starts(self, slave: Slave, life: int) -> None:
        if slave.life == life:
            slave.started = True
            slave.silence += 1
            self.says(slave, self.reported)

    def receives(self, slave: Slave, life: int, dispatch: Dispatch) -> None:
        if slave.life == life:
            slave.inbox.append(dispatch)
            self.works(slave)

    def works(self, slave: Slave) -> None:
        if slave.busy or slave.stopped or not slave.inbox:
            return
        slave.busy = True
        dispatch = slave.inbox[0]
        takes = self.some(dispatch.jobs)
        if self.chance(self.scenario.death_rate, "killed at work"):
            self.at(self.now + takes * self.uniform(), self.dies, slave, slave.life)
        if self.chance(self.scenario.stop_rate, "stopped at work"):
            self.at(self.now + takes * self.uniform(), self.stops, slave, slave.life)
        self.at(self.now + takes, self.finishes, slave, slave.life)

    def finishes(self, slave: Slave, life: int) -> None:
        if slave.life != life:
            return
        if slave.stopped:
            slave.due = True
            return
        dispatch, scenario = slave.inbox.popleft(), self.scenario
        slave.busy = slave.due = False
        if not self.poison.isdisjoint(dispatch.content):
            self.is_poisoned(slave, dispatch)
            return
        if self.chance(scenario.bogus_rate, "bogus"):
            self.says(slave, self.told_nonsense, dispatch)
        self.says(slave, self.answered, dispatch)
        if self.chance(scenario.twice_rate, "twice"):
            self.says(slave, self.answered, dispatch)
        if self.chance(scenario.doubt_rate, "doubt"):
            self.at(self.now + self.some(1), self.doubts, slave)
        self.works(slave)

    # ---- faults --------------------------------------------------------------------------------------------------

    def is_poisoned(self, slave: Slave, dispatch: Dispatch) -> None:
        """It came to a poisonous job: it dies, or never says a word again."""
        job = next(job for job in dispatch.content if job in self.poison)
        self.out.hurt[job] += 1
        self.out.faults["poisoned"] += 1
        if self.uniform() < self.scenario.hang_rate:
            self.stops(slave, slave.life, for_good=True)
        else:
            self.dies(slave, slave.life)

    def is_killed(self, slave: Slave) -> None:
        """At any time, whatever it does."""
        self.out.faults[f"killed {self.doing(slave)}"] += 1
        self.dies(slave, slave.life)

    def is_stopped(self, slave: Slave) -> None:
        self.out.faults[f"stopped {self.doing(slave)}"] += 1
        self.stops(slave, slave.life)

    def doing(self, slave: Slave) -> str:
        if not slave.started:
            return "before its start"
        if slave.stopped:
            return "while stopped"
        if slave.busy:
            return "at work"
        return "at the end" if all(self.books.how) else "while idle"

    def dies(self, slave: Slave, life: int) -> None:
        if slave.life != life:
            return
        if self.chance(self.scenario.mute_rate, "answers lost"):
            slave.muted = life
        slave.life += 1
        slave.silence += 1
        slave.started = slave.stopped = slave.busy = slave.due = False
        slave.inbox.clear()
        gone = self.scenario.work_alone and self.uniform() < self.scenario.gone_rate
        if not gone:
            self.at(self.now + self.some(3), self.starts, slave, slave.life)
        if gone or self.uniform() < 0.7:  # else it is found out by its return, at the latest
            self.falls_silent(slave, told=self.uniform() < 0.5)

    def stops(self, slave: Slave, life: int, for_good: bool = False) -> None:
        if slave.life != life or slave.stopped or not slave.started:
            return
        slave.stopped = True
        self.falls_silent(slave)
        slave.for_good = for_good or self.uniform() < self.scenario.for_good
        if not slave.for_good:
            self.at(self.now + self.some(3), self.continues, slave, slave.silence)

    def continues(self, slave: Slave, silence: int) -> None:
        if slave.silence != silence:
            return
        slave.stopped = False
        slave.silence += 1
        beat_first = self.uniform() < 0.5
        if beat_first:
            self.says(slave, self.is_there)
        if slave.due:
            self.finishes(slave, slave.life)
        else:
            self.works(slave)
        if not beat_first:
            self.says(slave, self.is_there)

    def falls_silent(self, slave: Slave, told: bool = False) -> None:
        """The master will be told of it, or will notice: some time after the last that it hears."""
        slave.silence += 1
        heard = max(self.now, slave.up_free)
        if told:
            self.at(heard + self.some(1), self.loses, slave, slave.silence)
            return
        self.at(heard + self.scenario.suspect_after, self.suspects, slave, slave.silence)
        self.at(heard + self.scenario.lost_after, self.loses, slave, slave.silence)

    def floods(self, slave: Slave, left: int) -> None:
        """The master's patience is at its end and begins again, many times in a moment."""
        state = self.books.slaves[slave.number].state
        self.out.faults["flood"] += 1
        if state == "up" and left > 0:
            self.driver.hears_silence(slave.number)
        elif state == "suspect":
            self.driver.hears_ready(slave.number)
        if left > 0:
            self.at(self.now + 0.001, self.floods, slave, left - 1)

    # ---- what the master hears -----------------------------------------------------------------------------------

    def reported(self, slave: Slave, life: int) -> None:
        """A new process reports for work."""
        if slave.life != life:
            return
        if self.books.slaves[slave.number].state == "up":  # the one before died before anybody noticed
            self.driver.hears_loss(slave.number)
        slave.heard_life = life
        self.driver.hears_ready(slave.number)

    def is_there(self, slave: Slave, life: int) -> None:
        """A beat, or a word of one that was given up."""
        if slave.heard_life == life == slave.life and self.books.slaves[slave.number].state in ("suspect", "lost"):
            self.driver.hears_ready(slave.number)

    def answered(self, slave: Slave, life: int, dispatch: Dispatch) -> None:
        if life > slave.muted:
            facts = dispatch.slot, dispatch.first, dispatch.jobs, dispatch.attempt
            self.driver.hears_answer(slave.number, facts, dispatch.content)

    def told_nonsense(self, slave: Slave, life: int, dispatch: Dispatch) -> None:
        """Numbers near the right ones that never were a dispatch."""
        slot, first, jobs, attempt = dispatch.slot, dispatch.first, dispatch.jobs, dispatch.attempt
        wrong = [
            (slot, first, jobs + 1, attempt),
            (slot, first, jobs - 1, attempt),
            (slot, first + (1 << 40), jobs, attempt),
            (slot, first, jobs, attempt + 1),
            (slot, first, jobs, 255),
            (self.books.slot_count, first, jobs, attempt),
            ((slot + 1) % self.books.slot_count, first, jobs, attempt),
            (-1, -1, -1, -1),
        ][int(self.uniform() * 8)]
        if self.books.expected(wrong) != "deliver":  # it may be what another attempt's answer is
            self.driver.hears_answer(slave.number, wrong, ())

    def suspects(self, slave: Slave, silence: int) -> None:
        if slave.silence == silence and self.books.slaves[slave.number].state == "up":
            self.out.faults["silence"] += 1
            self.driver.hears_silence(slave.number)

    def loses(self, slave: Slave, silence: int) -> None:
        if slave.silence != silence:
            return
        if self.books.slaves[slave.number].state != "lost":
            self.driver.hears_loss(slave.number)
        if slave.stopped and (slave.for_good or self.uniform() < 0.5):  # the supervisor kills it; else it will be back
            self.dies(slave, slave.life)

    def doubts(self, slave: Slave) -> None:
        """A live slave is given up, and says that it is there."""
        if self.books.slaves[slave.number].state == "up":
            self.driver.hears_loss(slave.number)
            if not slave.stopped:
                self.says(slave, self.is_there)

    def is_limited(self, credit: int) -> None:
        self.out.faults["credit limited" if credit else "drained"] += 1
        self.driver.limits(credit)

    def job_arrives(self) -> None:
        """The user has one more, and another one later."""
        self.driver.available += 1
        self.driver.turn()
        if self.driver.available < self.scenario.jobs:
            self.at(self.now + self.some(2 / max(1, self.scenario.slaves)), self.job_arrives)

    # ---- the run -------------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """The start, and the faults that come at any time."""
        scenario = self.scenario
        for slave in self.slaves[1:]:
            self.at(self.some(1), self.starts, slave, 0)
        span = min(scenario.faults_until, 2 + 1.3 * scenario.jobs / max(1, scenario.slaves))
        faults = [(self.is_killed,)] * scenario.kills + [(self.is_stopped,)] * scenario.stops
        faults += [(self.floods, scenario.flaps)] * scenario.floods
        for action, *args in faults if scenario.slaves else ():
            self.at(self.uniform() * span, action, self.random.choice(self.slaves[1:]), *args)
        for _ in range(scenario.limits):
            self.at(self.uniform() * span, self.is_limited, self.random.randint(0, scenario.credit))
        if scenario.limits or scenario.drains:
            self.at(span, self.is_limited, 0 if scenario.drains else scenario.credit)
        if scenario.drains:
            self.at(self.uniform() * span, self.is_limited, 0)
        if scenario.scarce:
            self.job_arrives()
        self.driver.turn()

    def run(self) -> Outcome:
        self.plan()
        queue, pop = self.queue, heapq.heappop
        while queue:
            self.now, _, action, args = pop(queue)
            self.out.events += 1
            self.books.check(self.out.events < EVENTS_MOST, "it never ends")
            action(*args)
        self.out.time = self.now
        self.check_the_end()
        return self.out

    def check_the_end(self) -> None:
        books, out = self.books, self.out
        books.check_the_end()
        out.delivered, out.failed = books.how.count("delivered"), books.how.count("failed")
        out.slots_most, out.waited_most = books.slots_most, books.waited_most
        out.gave_up = sorted(books.gave_up)
        out.faults.update(books.events)
        out.counters = {name: getattr(books.s, name) for name in COUNTERS}
        if self.scenario.only_poison:
            limit = self.scenario.max_attempts
            books.check(max(out.hurt.values(), default=0) <= limit, f"slaves that poisonous jobs cost: {out.hurt}")
            innocent = {job for job, because in books.gave_up.items() if because == "strikes"} - self.poison
            apart = limit > 1 or self.scenario.grain == 1  # else a batch fails as a whole
            books.check(not (apart and innocent), f"innocent jobs were given up: {innocent}")


def run(module: ModuleType, scenario: Scenario) -> Outcome:
    """Simulate a run with the scheduler of `module`.

    Raises
    ------
    SimulationError
        If a promise was broken; the message holds the whole scenario.
    """
    return Simulation(module, scenario).run()

"""The scheduler in virtual time: slaves of random speed, a network with random delays, and faults; all from one seed.

The rules it keeps:

- The master sees what a real one would: messages, and its own belief that a slave is lost. That belief may be wrong.
- Messages between the master and one slave keep their order, each way; nothing else keeps any order.
- Faults: a slave dies and is started again sooner or later; a live slave is believed lost for a while; an answer comes
  twice, or is none.
- What the scheduler does is checked at each step against the simulator's own books. After the faults, all must end.

`run(module, scenario)` raises `SimulationError`, which names the scenario.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Scenario:
    """What is simulated. Times are in virtual seconds, one second being a job's mean duration."""

    seed: int
    slaves: int = 20
    jobs: int = 500
    grain: int = 3
    credit: int = 2
    max_attempts: int = 3
    read_ahead: int = 4
    death_rate: float = 0.02  # chance that a slave dies while it runs a batch
    doubt_rate: float = 0.02  # chance that the master gives up a live slave after an answer
    twice_rate: float = 0.02  # chance that an answer comes twice
    bogus_rate: float = 0.02  # chance that an answer follows one that is none
    faults_until: float = 100.0  # then no more faults happen
    work_alone: bool = False  # the master works itself while no slave is up
    scarce: bool = False  # jobs come more slowly than the slaves could run them

    @classmethod
    def random(cls, seed: int, **fixed: Any) -> Scenario:
        """A scenario of random size and faults."""
        draw = random.Random(seed)
        drawn = cls(
            seed=seed,
            slaves=draw.choice([1, 2, 3, 5, 10, 40]),
            jobs=draw.randint(1, 400),
            grain=draw.choice([1, 1, 2, 7]),
            credit=draw.choice([1, 2, 2, 5]),
            max_attempts=draw.choice([1, 2, 3, 10]),
            read_ahead=draw.choice([0, 1, 8]),
            death_rate=draw.choice([0.0, 0.02, 0.2]),
            doubt_rate=draw.choice([0.0, 0.02, 0.2]),
            twice_rate=draw.choice([0.0, 0.05, 0.3]),
            faults_until=draw.choice([20.0, 200.0]),
            work_alone=draw.random() < 0.3,
            scarce=draw.random() < 0.3,
        )
        return replace(drawn, **fixed)


class SimulationError(AssertionError):
    """The scheduler broke a promise."""


@dataclass(frozen=True)
class Jobs:
    """A message to a slave: a batch."""

    slot: int
    first: int
    jobs: int
    attempt: int
    content: tuple[int, ...]  # the slot's buffer when it was sent


@dataclass
class Slave:
    """A slave's process, and what the master may know of it."""

    number: int
    life: int = 0  # raised when it dies: what was meant for the life before is gone
    alive: bool = True
    inbox: deque[Jobs] = field(default_factory=deque)
    running: bool = False
    outstanding: dict[tuple[int, int], int] = field(
        default_factory=dict
    )  # (slot, attempt) → first, while it is believed up
    ready_since: int | None = None  # number of the dispatch before which it became ready


@dataclass
class Outcome:
    """What came of a run."""

    delivered: int = 0  # batches
    failed: int = 0
    slots_most: int = 0  # open at once
    events: int = 0
    time: float = 0.0
    waited_most: int = 0  # dispatches that went to others while a ready slave waited
    counters: dict[str, int] = field(default_factory=dict)


def content_of(first: int, jobs: int) -> tuple[int, ...]:
    """What stands in a batch's buffer, and in its results."""
    return tuple(range(first, first + jobs))


class Simulation:
    """One run."""

    def __init__(self, module: ModuleType, scenario: Scenario) -> None:
        self.module, self.scenario = module, scenario
        self.random = random.Random(scenario.seed)
        self.slots = max(1, scenario.slaves * scenario.credit) + scenario.read_ahead
        self.s = module.Scheduler(scenario.slaves, scenario.credit, self.slots, scenario.max_attempts)
        self.slaves = {number: Slave(number) for number in range(1, scenario.slaves + 1)}
        self.up: set[int] = set()  # as the master believes
        self.now = 0.0
        self.queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.serial = count()
        self.link_free: dict[tuple[int, str], float] = defaultdict(float)  # when the last message on it arrives
        self.buffers: dict[int, tuple[int, ...]] = {}  # of slots that are not free
        self.next_job = 0
        self.available = 0 if scenario.scarce else scenario.jobs  # jobs that the user has
        self.open_batches: set[int] = set()  # first jobs of batches that have not ended
        self.ended: set[int] = set()
        self.made: set[tuple[int, int, int]] = set()  # (slot, first, attempt) that were sent
        self.out = Outcome()
        self.dispatched = 0

    # ---- time and network ----------------------------------------------------------------------------------------

    def at(self, time: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.queue, (time, next(self.serial), action, args))

    def send(self, number: int, way: str, action: Callable[..., None], *args: Any) -> None:
        """A message between the master and a slave; it never overtakes an older one on the same way."""
        arrival = max(self.now + self.random.expovariate(10), self.link_free[number, way])
        self.link_free[number, way] = arrival
        self.at(arrival, action, *args)

    def chance(self, rate: float) -> bool:
        return self.now < self.scenario.faults_until and self.random.random() < rate

    # ---- slaves --------------------------------------------------------------------------------------------------

    def slave_starts(self, slave: Slave) -> None:
        slave.alive = True
        self.send(slave.number, "up", self.master_hears_ready, slave)

    def slave_receives(self, slave: Slave, life: int, jobs: Jobs) -> None:
        if slave.alive and slave.life == life:
            slave.inbox.append(jobs)
            self.slave_works(slave)

    def slave_works(self, slave: Slave) -> None:
        if slave.running or not slave.inbox:
            return
        slave.running = True
        takes = sum(self.random.expovariate(1) for _ in slave.inbox[0].content)
        if self.chance(self.scenario.death_rate):
            self.at(self.now + takes * self.random.random(), self.slave_dies, slave, slave.life)
        else:
            self.at(self.now + takes, self.slave_answers, slave, slave.life)

    def slave_answers(self, slave: Slave, life: int) -> None:
        if slave.life != life:
            return
        jobs = slave.inbox.popleft()
        slave.running = False
        if self.chance(self.scenario.bogus_rate):
            self.send(slave.number, "up", self.master_hears_nonsense, slave, jobs)
        for _ in range(2 if self.chance(self.scenario.twice_rate) else 1):
            self.send(slave.number, "up", self.master_hears_answer, slave, jobs)
        if self.chance(self.scenario.doubt_rate):
            self.at(self.now + self.random.expovariate(1), self.master_gives_up, slave, None)
        self.slave_works(slave)

    def slave_dies(self, slave: Slave, life: int) -> None:
        if slave.life != life:
            return
        slave.life += 1
        slave.alive = slave.running = False
        slave.inbox.clear()
        if self.random.random() < 0.7:  # else it is found out only by its return
            self.at(self.now + self.random.expovariate(0.2), self.master_gives_up, slave, slave.life)
        self.at(self.now + self.random.expovariate(0.1), self.slave_starts, slave)

    # ---- what the master hears -----------------------------------------------------------------------------------

    def master_hears_ready(self, slave: Slave) -> None:
        if slave.number in self.up:  # it died and returned before anybody noticed
            self.lose(slave)
        self.check(self.s.on_ready(slave.number) == 0, f"slave {slave.number} reports for work and is refused")
        self.up.add(slave.number)
        self.becomes_ready(slave)

    def master_gives_up(self, slave: Slave, life: int | None) -> None:
        """A slave that died, or is only silent: that one reports for work again when it hears that it was given up."""
        if slave.number not in self.up or (life is not None and slave.life != life):
            return
        self.lose(slave)
        if slave.alive:
            self.send(slave.number, "down", self.slave_hears_it_was_given_up, slave, slave.life)

    def slave_hears_it_was_given_up(self, slave: Slave, life: int) -> None:
        if slave.life == life:
            self.send(slave.number, "up", self.master_hears_ready, slave)

    def lose(self, slave: Slave) -> None:
        again = {first for first in slave.outstanding.values() if first in self.open_batches}
        held = self.s.on_lost(slave.number)
        self.check(held == len(again), f"slave {slave.number} was lost with {len(again)} batches, on_lost says {held}")
        self.up.discard(slave.number)
        slave.outstanding.clear()
        slave.ready_since = None

    def master_hears_nonsense(self, slave: Slave, jobs: Jobs) -> None:
        """Numbers near the right ones that never were a dispatch."""
        wrong = random.Random(jobs.first).choice(
            [
                (jobs.slot, jobs.first, len(jobs.content) + 1, jobs.attempt),
                (jobs.slot, jobs.first + (1 << 40), len(jobs.content), jobs.attempt),
                (jobs.slot, jobs.first, len(jobs.content), self.scenario.max_attempts),
                (self.slots, jobs.first, len(jobs.content), jobs.attempt),
                ((jobs.slot + 1) % self.slots, jobs.first, len(jobs.content), jobs.attempt),
                (-1, -1, -1, -1),
            ]
        )
        if (wrong[0], wrong[1], wrong[3]) in self.made and wrong[2] == len(jobs.content):
            return
        self.check(self.verdict(slave, wrong) != "deliver", f"the bogus answer {wrong} was accepted")

    def master_hears_answer(self, slave: Slave, jobs: Jobs) -> None:
        facts = (jobs.slot, jobs.first, jobs.jobs, jobs.attempt)
        self.answered(slave.number, facts, jobs.content)

    def answered(self, number: int, facts: tuple[int, int, int, int], results: tuple[int, ...]) -> None:
        slot, first, _, attempt = facts
        was_open = first in self.open_batches
        verdict = self.verdict(self.slaves.get(number), facts)
        slave = self.slaves.get(number)
        if slave is not None and slave.outstanding.get((slot, attempt)) == first:
            del slave.outstanding[slot, attempt]
            self.becomes_ready(slave)
        self.check(
            verdict == ("deliver" if was_open else "late"),
            f"the answer {facts} of slave {number} got verdict {verdict}",
        )
        if verdict == "deliver":
            self.check(
                self.buffers[slot] == results, f"slot {slot} holds {self.buffers[slot]}, its results are {results}"
            )
            self.out.delivered += 1
            self.end(slot, first)

    def verdict(self, slave: Slave | None, facts: tuple[int, int, int, int]) -> str:
        return self.module.VERDICTS[self.s.on_result(0 if slave is None else slave.number, *facts)]

    def job_arrives(self) -> None:
        """The user has one more, and another one later."""
        self.available += 1
        if self.available < self.scenario.jobs:
            self.at(self.now + self.random.expovariate(0.5 * self.scenario.slaves), self.job_arrives)

    # ---- what the master does ------------------------------------------------------------------------------------

    def end(self, slot: int, first: int) -> None:
        self.check(first not in self.ended, f"the batch from job {first} on ended twice")
        self.check(first in self.open_batches, f"the batch from job {first} on ended and never began")
        self.open_batches.remove(first)
        self.ended.add(first)
        self.check(self.s.release(slot) == 0, f"cannot release {self.s.describe(slot)}")

    def becomes_ready(self, slave: Slave) -> None:
        if slave.ready_since is None and len(slave.outstanding) < self.scenario.credit:
            slave.ready_since = self.dispatched

    def master_turns(self) -> None:
        """What a master does after each event."""
        while (slot := self.s.next_given_up()) >= 0:
            self.out.failed += 1
            self.check(
                self.s.attempt(slot) == self.scenario.max_attempts, f"given up too early: {self.s.describe(slot)}"
            )
            self.end(slot, self.s.first(slot))
        alone = self.scenario.work_alone and not self.up
        room = self.s.free_credit + self.scenario.read_ahead - self.s.waiting_count if self.up else int(alone)
        while self.next_job < self.available and room > 0 and (slot := self.s.open()) >= 0:
            room -= 1
            self.fill(slot)
        while (slot := self.s.assign()) >= 0:
            self.dispatch(slot)
        if alone and (slot := self.s.assign_local()) >= 0:
            facts = (slot, self.s.first(slot), self.s.jobs(slot), self.s.attempt(slot))
            self.made.add((slot, facts[1], facts[3]))
            self.answered(0, facts, self.buffers[slot])
        self.check_counts()

    def fill(self, slot: int) -> None:
        users = [slave.number for slave in self.slaves.values() for used, _ in slave.outstanding if used == slot]
        self.check(not users, f"slot {slot} is reused while slaves {users} work on it")
        jobs = min(self.scenario.grain, self.available - self.next_job)
        self.buffers[slot] = content_of(self.next_job, jobs)
        self.open_batches.add(self.next_job)
        self.check(self.s.submit(slot, self.next_job, jobs) == 0, f"cannot submit {self.s.describe(slot)}")
        self.next_job += jobs

    def dispatch(self, slot: int) -> None:
        number, first, attempt = self.s.holder(slot), self.s.first(slot), self.s.attempt(slot)
        self.check(number in self.up, f"slave {number} is not up and gets {self.s.describe(slot)}")
        self.check(first in self.open_batches, f"a batch goes out that has ended: {self.s.describe(slot)}")
        slave = self.slaves[number]
        self.check_turns(slave)
        slave.ready_since = None
        slave.outstanding[slot, attempt] = first
        self.check(len(slave.outstanding) <= self.scenario.credit, f"slave {number} gets more than its credit")
        self.check((slot, first, attempt) not in self.made, f"the same attempt twice: {self.s.describe(slot)}")
        self.check(attempt < self.scenario.max_attempts, f"too many attempts: {self.s.describe(slot)}")
        self.made.add((slot, first, attempt))
        self.dispatched += 1
        self.becomes_ready(slave)
        message = Jobs(slot, first, self.s.jobs(slot), attempt, self.buffers[slot])
        self.send(number, "down", self.slave_receives, slave, slave.life, message)

    # ---- checks --------------------------------------------------------------------------------------------------

    def check(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise SimulationError(f"{otherwise} (at {self.now:.3f} s, event {self.out.events})\n{self.scenario}")

    def check_counts(self) -> None:
        """After each step; only what can be told at once."""
        s = self.s
        self.out.slots_most = max(self.out.slots_most, s.open_count)
        self.check(s.open_count <= self.slots, f"{s.open_count} slots are open, the ledger has {self.slots}")
        self.check(
            s.open_count >= len(self.open_batches), f"{len(self.open_batches)} batches in {s.open_count} open slots"
        )
        self.check(s.up_count == len(self.up), f"{len(self.up)} slaves are up, up_count says {s.up_count}")
        self.check(s.ended == len(self.ended), f"{len(self.ended)} batches ended, the scheduler says {s.ended}")
        self.check(s.waiting_count == 0 or s.ready_count == 0, "a slave is ready and a batch waits")
        if self.out.events % 50 == 0:
            self.check_books()

    def check_books(self) -> None:
        """Every slave and every slot: not at each step, since there are many."""
        s, credit = self.s, self.scenario.credit
        for slave in self.slaves.values():
            self.check(
                s.held(slave.number) == len(slave.outstanding),
                f"slave {slave.number} holds {s.held(slave.number)}, but owes {slave.outstanding}",
            )
        free_credit = sum(credit - len(self.slaves[number].outstanding) for number in self.up)
        self.check(s.free_credit == free_credit, f"free_credit is {s.free_credit}, not {free_credit}")
        ready = sum(len(self.slaves[number].outstanding) < credit for number in self.up)
        self.check(s.ready_count == ready, f"ready_count is {s.ready_count}, not {ready}")
        busy = sum(self.module.BATCH_STATES[s.state_of_batch(slot)] != "free" for slot in range(self.slots))
        self.check(s.open_count == busy, f"open_count is {s.open_count}, and {busy} slots are not free")
        for number in self.up:
            self.check_turns(self.slaves[number])

    def check_turns(self, slave: Slave) -> None:
        """Nobody who is ready waits while somebody else gets two turns."""
        waited = 0 if slave.ready_since is None else self.dispatched - slave.ready_since
        self.out.waited_most = max(self.out.waited_most, waited)
        self.check(waited < self.scenario.slaves, f"slave {slave.number} is ready and waited for {waited} dispatches")

    def run(self) -> Outcome:
        for slave in self.slaves.values():
            self.at(self.random.expovariate(1), self.slave_starts, slave)
        if self.scenario.scarce:
            self.job_arrives()
        self.master_turns()
        while self.queue:
            self.now, _, action, args = heapq.heappop(self.queue)
            self.out.events += 1
            action(*args)
            self.master_turns()
        self.out.time = self.now
        self.check_the_end()
        return self.out

    def check_the_end(self) -> None:
        """Liveness: nothing is under way any more, so all must have ended."""
        s = self.s
        self.check(
            self.next_job == self.scenario.jobs, f"only {self.next_job} of {self.scenario.jobs} jobs were fetched"
        )
        self.check(not self.open_batches, f"the batches from {sorted(self.open_batches)} on never ended")
        self.check(s.open_count == 0, f"{s.open_count} slots never became free")
        self.check(len(self.ended) == self.out.delivered + self.out.failed, "batches were not counted")
        self.check_books()
        self.out.counters = {name: getattr(s, name) for name in ("sent", "ended", "resent", "late", "refused", "lost")}


def run(module: ModuleType, scenario: Scenario) -> Outcome:
    """Simulate a run with the scheduler of `module`.

    Raises
    ------
    SimulationError
        If a promise was broken; the message holds the whole scenario.
    """
    return Simulation(module, scenario).run()

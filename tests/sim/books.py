"""The simulator's own books of who has what, and what must hold at every step. They know nothing of how the scheduler works.

What is checked (safety):

- Each job ends exactly once, and only an answer to a dispatch that was made can end it well.
- Nothing is sent to a slave unless it is up, and no more than its credit; no slot is used again while a live slave works on it.
- The attempts of a batch count up by one, and are fewer than 256.
- A batch is struck when a slave is suspected or lost and it is the oldest that the slave owes; no other one is. A job counts the
  strikes of its batch, before and after that was taken apart: never more than `max_attempts`.
- A batch is given up only if each of its jobs has `max_attempts` strikes, or it was dispatched 256 times, or it was struck and no
  slave is left. So a job is never given up unless slaves failed, as far as the master can know, while they ran its batch.
- A batch of several jobs with one strike left is taken apart and never sent again. (`max_attempts` 1 leaves no time for that.)
- The master never runs a job that was struck.
- The credit may change at any time; at 0 nothing goes out. No change of it strikes a batch or counts as an attempt. A run that was
  drained leaves jobs that never ended, but none of them is with a slave.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import ModuleType

from scenario import Scenario

DISPATCHES_MOST = 256


class SimulationError(AssertionError):
    """The scheduler broke a promise."""


@dataclass(slots=True, eq=False)
class Batch:
    """What is known of a batch in a slot."""

    slot: int
    first: int
    jobs: int
    strikes: int
    content: tuple[int, ...]  # what stands in the slot's buffer
    dispatches: int = 0
    ended: bool = False
    released: bool = False


@dataclass(slots=True, frozen=True)
class Dispatch:
    """One attempt of a batch: what travels to a slave, and comes back with the results."""

    batch: Batch
    slot: int
    first: int
    jobs: int
    attempt: int
    content: tuple[int, ...]


@dataclass(slots=True)
class Known:
    """What the master believes of a slave."""

    state: str = "absent"
    owes: dict[int, Dispatch] = field(default_factory=dict)  # by slot; the oldest first
    ready_since: int = -1  # number of the dispatch before which it became ready; -1: it is not


class Books:
    """The record of one run."""

    def __init__(self, module: ModuleType, scenario: Scenario, slots: int) -> None:
        self.module, self.scenario, self.slot_count = module, scenario, slots
        self.s = module.Scheduler(scenario.slaves, scenario.credit, slots, scenario.max_attempts)
        self.credit = scenario.credit
        self.slaves = [Known() for _ in range(scenario.slaves + 1)]
        self.states = Counter(absent=scenario.slaves, up=0, suspect=0, lost=0)
        self.slots: list[Batch | None] = [None] * slots
        self.worker = [0] * slots  # the slave that is up and works on it
        self.how = [""] * scenario.jobs  # "" or how a job ended: delivered, failed
        self.ended = self.dispatched = self.turns = 0  # ended: batches, also those that were taken apart
        self.events: Counter[str] = Counter()  # what became of batches that were struck, to see that all of it is tried
        self.gave_up: dict[int, str] = {}  # jobs, and why
        self.struck: Counter[int] = Counter()  # by job
        self.waited_most = self.slots_most = 0
        self.where = lambda: ""

    def check(self, holds: bool, otherwise: str, slot: int = -1) -> None:
        if not holds:
            about = f"; {self.s.describe(slot)}" if 0 <= slot < self.slot_count else ""
            raise SimulationError(f"{otherwise}{about} {self.where()}\n{self.scenario}")

    # ---- batches -------------------------------------------------------------------------------------------------

    def submitted(self, slot: int, first: int, jobs: int, strikes: int) -> None:
        self.check(self.slots[slot] is None, "a slot is used again before its batch ended", slot)
        self.check(not self.worker[slot], f"a slot is used again while slave {self.worker[slot]} works on it", slot)
        self.slots[slot] = Batch(slot, first, jobs, strikes, tuple(range(first, first + jobs)))

    def dispatches(self, slot: int) -> Dispatch:
        """The scheduler wants the slot sent to its holder."""
        s, number, batch = self.s, self.s.holder(slot), self.slots[slot]
        self.check(batch is not None and not batch.ended, "what goes out has ended or never was", slot)
        self.check((s.first(slot), s.jobs(slot)) == (batch.first, batch.jobs), "other jobs go out", slot)
        self.check(s.attempt(slot) == batch.dispatches < DISPATCHES_MOST, f"attempt {batch.dispatches} is another", slot)
        self.check(self.reason(batch) == "", "it must not be sent again", slot)
        self.check(self.credit > 0, "it goes out although nothing may", slot)
        batch.dispatches += 1
        dispatch = Dispatch(batch, slot, batch.first, batch.jobs, s.attempt(slot), batch.content)
        if number == 0:
            self.events["run by the master"] += 1
            self.check(not any(self.struck[job] for job in batch.content), "the master runs what was struck", slot)
            return dispatch
        slave = self.slaves[number]
        self.check(slave.state == "up", f"slave {number} is {slave.state} and gets a batch", slot)
        self.check_turns(number)
        slave.ready_since = -1
        slave.owes[slot] = dispatch
        self.worker[slot] = number
        self.check(len(slave.owes) <= self.credit, f"slave {number} gets more than its credit", slot)
        self.dispatched += 1
        self.becomes_ready(slave)
        return dispatch

    def expected(self, facts: tuple[int, int, int, int]) -> str:
        """The verdict that an answer deserves; "": anything but to be delivered."""
        slot, first, jobs, attempt = facts
        if not 0 <= slot < self.slot_count or attempt < 0:
            return "refused"
        batch = self.slots[slot]
        if batch is None or batch.first != first:
            return "late"
        made = batch.jobs == jobs and attempt < batch.dispatches
        if batch.ended:
            return "late" if made else ""
        return "deliver" if made else "refused"

    def answered(self, number: int, facts: tuple[int, int, int, int], verdict: str, expected: str) -> None:
        right = verdict == expected if expected else verdict != "deliver"
        self.check(right, f"the answer {facts} of slave {number} is {verdict}, should be {expected}", facts[0])
        slave, slot = self.slaves[number], facts[0]
        owed = slave.owes.get(slot)
        if owed is not None and (owed.slot, owed.first, owed.jobs, owed.attempt) == facts:
            del slave.owes[slot]
            self.worker[slot] = 0
            self.becomes_ready(slave)
            if owed.batch.released:
                self.slots[slot] = None

    def ends(self, slot: int, how: str) -> None:
        """A batch ended: delivered, failed or apart."""
        batch = self.slots[slot]
        batch.ended = True
        self.ended += 1
        if how != "apart":
            for job in batch.content:
                self.check(self.how[job] == "", f"job {job} ends twice: {self.how[job]}, {how}", slot)
                self.how[job] = how

    def released(self, slot: int) -> None:
        """The slot is free, unless somebody still works on it."""
        self.slots[slot].released = True
        if not self.worker[slot]:
            self.slots[slot] = None

    def reason(self, batch: Batch) -> str:
        """Why a batch must not be sent again as it is: it failed, it is to be taken apart, or there is none."""
        if batch.jobs > 1 and 0 < batch.strikes == self.scenario.max_attempts - 1:
            return "apart"
        return "failed" if batch.strikes >= self.scenario.max_attempts or batch.dispatches >= DISPATCHES_MOST else ""

    def given_up(self, slot: int, alone: bool) -> str:
        """The scheduler names a batch: what must become of it."""
        batch = self.slots[slot]
        self.check(batch is not None and not batch.ended, "it is given up, but ended or never was", slot)
        why = self.reason(batch) or ("failed" if alone and batch.strikes else "")
        self.check(why != "", "it is given up without a reason", slot)
        if why == "apart":
            self.events["taken apart"] += 1
            return why
        if batch.strikes >= self.scenario.max_attempts:
            because = "strikes"
            least = min(self.struck[job] for job in batch.content)
            self.check(least == self.scenario.max_attempts, f"a job is given up that was struck {least} times", slot)
        else:
            because = "256 dispatches" if batch.dispatches >= DISPATCHES_MOST else "no slave is left"
        self.events[f"failed: {because}"] += 1
        self.gave_up.update(dict.fromkeys(batch.content, because))
        return why

    # ---- slaves --------------------------------------------------------------------------------------------------

    def becomes(self, number: int, state: str) -> None:
        slave = self.slaves[number]
        self.states[slave.state] -= 1
        self.states[state] += 1
        slave.state, slave.ready_since = state, -1
        if state == "up":
            self.becomes_ready(slave)

    def becomes_ready(self, slave: Known) -> None:
        if slave.state == "up" and len(slave.owes) < self.credit and slave.ready_since < 0:
            slave.ready_since = self.dispatched

    def limited(self, credit: int, before: list[str]) -> None:
        """From now on slaves get no more than so many batches at a time; the slots were like this before."""
        after = [self.s.describe(slot) for slot in range(self.slot_count)]
        self.check(before == after, f"the credit is {credit} now, and batches have changed: {before}, {after}")
        self.credit = credit
        for slave in self.slaves:
            if len(slave.owes) >= credit:
                slave.ready_since = -1
            self.becomes_ready(slave)

    def oldest(self, number: int) -> int:
        """The slot that a slave runs, if it is what the master believes; or -1."""
        return next(iter(self.slaves[number].owes), -1)

    def taken_back(self, number: int, count: int) -> None:
        """The slave was suspected or lost, and held `count` batches, says the scheduler."""
        again, owes = 0, self.slaves[number].owes
        for place, (slot, dispatch) in enumerate(owes.items()):
            batch, self.worker[slot] = dispatch.batch, 0
            if batch.released:
                self.slots[slot] = None
            if batch.ended:
                continue
            again += 1
            if place == 0:
                batch.strikes += 1
                self.struck.update(batch.content)
                most = max(self.struck[job] for job in batch.content)
                self.check(most <= self.scenario.max_attempts, f"a job was struck {most} times", slot)
            self.check(self.s.strikes(slot) == batch.strikes, f"it has {batch.strikes} strikes", slot)
            self.check(self.s.attempt(slot) == batch.dispatches, f"it went out {batch.dispatches} times", slot)
        owes.clear()
        self.check(count == again, f"slave {number} held {again} batches, the scheduler says {count}")

    # ---- what must hold ------------------------------------------------------------------------------------------

    def check_counts(self) -> None:
        """After each turn of the master; only what can be told at once."""
        s, states = self.s, self.states
        counts, known = (s.up_count, s.suspect_count, s.absent_count), (states["up"], states["suspect"], states["absent"])
        self.check(counts == known, f"{known} slaves are up, suspect, absent; the scheduler says {counts}")
        self.check(s.ended == self.ended, f"{self.ended} batches ended, the scheduler says {s.ended}")
        self.check(s.waiting_count == 0 or s.ready_count == 0, "a slave is ready and a batch waits")
        self.slots_most = max(self.slots_most, s.open_count)
        self.turns += 1
        if self.turns % 16 == 0:
            self.check_all()

    def check_all(self) -> None:
        """Every slave and every slot: not at each step, since there are many."""
        s, credit, free, ready = self.s, self.credit, 0, 0
        for number in range(1, self.scenario.slaves + 1):
            slave = self.slaves[number]
            self.check(s.held(number) == len(slave.owes), f"slave {number} holds {s.held(number)}, but owes {slave.owes}")
            if slave.state == "up":
                free += max(0, credit - len(slave.owes))
                ready += len(slave.owes) < credit
                self.check_turns(number)
        counts = s.free_credit, s.ready_count
        self.check(counts == (free, ready), f"free_credit and ready_count are {counts}, should be {free, ready}")
        held = sum(len(slave.owes) for slave in self.slaves)
        self.check(s.held_count == held, f"slaves hold {held} batches, the scheduler says {s.held_count}")
        used = self.slot_count - self.slots.count(None)
        self.check(s.open_count == used, f"{s.open_count} slots are open, should be {used}")

    def check_turns(self, number: int) -> None:
        """Nobody who is ready waits while somebody else gets two turns."""
        since = self.slaves[number].ready_since
        waited = self.dispatched - since if since >= 0 else 0
        self.waited_most = max(self.waited_most, waited)
        self.check(waited < self.scenario.slaves, f"slave {number} is ready and waited for {waited} dispatches")

    def check_the_end(self) -> None:
        """Liveness: nothing is under way any more, so all must have ended."""
        failed = [job for job, how in enumerate(self.how) if how == "failed"]
        self.check(failed == sorted(self.gave_up), f"the jobs {failed} ended otherwise than they were given up")
        left = [job for job, how in enumerate(self.how) if not how]
        waiting = sum(batch is not None and not batch.ended for batch in self.slots)
        self.check(self.s.held_count == 0, f"{self.s.held_count} batches are with slaves")
        self.check(self.credit == 0 or not left, f"the jobs {left} never ended")
        self.check(self.credit == 0 or waiting == 0, f"{waiting} batches never ended")
        self.check(self.s.open_count == self.s.waiting_count == waiting, f"{self.s.open_count} slots never became free")
        self.check_all()

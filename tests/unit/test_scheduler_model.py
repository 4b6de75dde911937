"""The scheduler against a model of sets and lists that is too simple to be wrong, under random events.

The model keeps every dispatch that was ever made, so that any of them can be answered at any time: in order, late,
twice, by a slave that was given up for lost. A failure prints the shortest list of events that leads to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

# How often each event happens; one that cannot happen now is passed over.
WEIGHTS = {
    "send": 5,
    "answer_in_turn": 5,
    "answer_of_a_revenant": 3,
    "lose_busy": 2,
    "suspect_busy": 2,
    "suspect_or_refused": 1,
    "submit_apart": 2,
    "blink": 1,
    "answer_again": 1,
    "answer_bogus": 2,
    "forbidden_call": 1,
    "open": 1,
    "submit": 1,
    "cancel": 1,
    "assign": 1,
    "assign_local": 1,
    "assign_local_unstruck": 1,
    "ready_or_refused": 1,
    "lose_or_refused": 1,
    "release": 2,
    "next_given_up": 2,
    "everything_ends": 1,
}
EVENTS = st.sampled_from([name for name, weight in WEIGHTS.items() for _ in range(weight)])


@dataclass
class Batch:
    """What the model knows of a batch."""

    slot: int
    first: int
    jobs: int
    state: str = "waiting"  # then sent, ended
    attempt: int = 0
    strikes: int = 0
    order: int = 0  # number of its last dispatch
    made: set[int] = field(default_factory=set)  # attempts that were dispatched
    holder: int = 0  # the slave that is up and works on its newest attempt
    released: bool = False
    endings: list[str] = field(default_factory=list)


@dataclass
class Slave:
    """What the model knows of a slave. It waits since a tick from `since` to `until`; None: it cannot take a batch."""

    state: str = "absent"
    held: int = 0
    since: int | None = None
    until: int | None = None
    before: int | None = None  # `since` when it was last up


@dataclass(frozen=True)
class Dispatch:
    """One attempt of a batch that went out."""

    slave: int
    slot: int
    first: int
    jobs: int
    attempt: int


class Machine(RuleBasedStateMachine):
    module = None  # the scheduler's, set by the test

    @initialize(
        slaves=st.sampled_from([3, 2, 4, 1, 0]),
        credit=st.integers(1, 3),
        batches=st.integers(1, 6),
        attempts=st.integers(1, 4),
        up=st.sampled_from([True, True, False]),
        prompt=st.booleans(),
    )
    def start(self, slaves, credit, batches, attempts, up, prompt):
        """Slots are released at once if `prompt`, and the slaves are all there from the start if `up`."""
        self.s = self.module.Scheduler(slaves, credit, batches, attempts)
        self.credit, self.batch_count, self.max_attempts, self.prompt = credit, batches, attempts, prompt
        self.slaves = {number: Slave() for number in range(1, slaves + 1)}
        self.opened: set[int] = set()
        self.slots: dict[int, Batch] = {}  # those that are in a slot
        self.batches: list[Batch] = []  # all that ever were
        self.waiting: list[Batch] = []
        self.given_up: list[Batch] = []
        self.aside: list[tuple[int, int]] = []  # jobs of batches that were taken apart, and their strikes
        self.dispatches: list[Dispatch] = []
        self.next_job = self.tick = 0
        self.sent = self.resent = self.late = self.refused = self.lost = self.suspected = self.reinstated = 0
        for number in self.slaves if up else ():
            self.ready(number)

    @rule(event=EVENTS, data=st.data())
    def happens(self, event, data):
        self.draw = data.draw
        getattr(self, event)()

    def draw_one(self, things):
        """One of them, or None if there are none: then the event cannot happen."""
        things = list(things)
        return self.draw(st.sampled_from(things)) if things else None

    # ---- batches come in and go out ------------------------------------------------------------------------------

    def open(self):
        slot = self.s.open()
        if len(self.opened) + len(self.slots) == self.batch_count:
            assert slot == -1
            return
        assert 0 <= slot < self.batch_count
        assert slot not in self.opened
        assert slot not in self.slots, "a slot was reused while somebody needs it"
        self.opened.add(slot)

    def submit(self):
        slot = self.draw_one(sorted(self.opened))
        if slot is not None:
            strikes = self.draw(st.sampled_from([0, 0, 0, -1, 1, self.max_attempts - 1, self.max_attempts]))
            jobs = self.draw(st.integers(-1, 3))
            if jobs < 1 or not 0 <= strikes < self.max_attempts:
                assert self.s.submit(slot, self.next_job, jobs, strikes) == -1
                return
            self.submit_slot(slot, self.next_job, jobs, strikes)

    def submit_slot(self, slot, first, jobs, strikes=0):
        assert self.s.submit(slot, first, jobs, strikes) == 0
        self.opened.remove(slot)
        batch = self.slots[slot] = Batch(slot, first, jobs, strikes=strikes)
        self.batches.append(batch)
        self.waiting.append(batch)
        self.next_job = max(self.next_job, first + jobs)

    def submit_apart(self):
        """A job of a batch that was taken apart is a batch of its own: the only time that a number comes again."""
        if self.aside and len(self.opened) + len(self.slots) < self.batch_count:
            slot = self.s.open()
            self.opened.add(slot)
            job, strikes = self.aside.pop(0)
            self.submit_slot(slot, job, 1, strikes)

    def cancel(self):
        slot = self.draw_one(sorted(self.opened))
        if slot is not None:
            assert self.s.cancel(slot) == 0
            self.opened.remove(slot)

    def forbidden_call(self):
        """It is refused; the invariants see to it that it changed nothing."""
        slot, call = self.draw(st.integers(0, self.batch_count - 1)), self.draw_one(["submit", "cancel", "release"])
        batch = self.slots.get(slot)
        allowed = slot in self.opened
        if call == "release":
            allowed = batch is not None and batch.state == "ended" and not batch.released
        if not allowed:
            assert getattr(self.s, call)(*((slot, self.next_job, 1) if call == "submit" else (slot,))) == -1

    def send(self):
        """As a master does: fetch batches and give them out."""
        count = self.draw(st.integers(1, 6))
        for _ in range(count):
            if len(self.opened) + len(self.slots) < self.batch_count:
                self.open()
                self.submit_slot(max(self.opened), self.next_job, self.draw(st.sampled_from([1, 3])))
        for _ in range(count):
            self.assign()

    def assign(self):
        slot = self.s.assign()
        ready = {number: slave for number, slave in self.slaves.items() if slave.since is not None}
        if not self.waiting or not ready:
            assert slot == -1
            return
        assert slot == self.waiting[0].slot, "the batch that waits longest goes first"
        number = self.s.holder(slot)
        chosen = ready[number]
        assert chosen.state == "up"
        assert chosen.held < self.credit
        assert all(chosen.since <= other.until for other in ready.values()), "the slave that waits longest goes first"
        chosen.held += 1
        chosen.since = chosen.until = None
        if chosen.held < self.credit:
            self.becomes_ready(chosen)
        self.dispatch(number)

    def assign_local(self):
        slot = self.s.assign_local()
        while self.waiting and self.waiting[0].strikes:
            self.gives_up(self.waiting.pop(0))
        if not self.waiting:
            assert slot == -1
            return
        assert slot == self.waiting[0].slot
        assert self.s.holder(slot) == 0
        self.dispatch(0)

    def assign_local_unstruck(self):
        slot = self.s.assign_local(False, True)
        passed = next((at for at, batch in enumerate(self.waiting) if not batch.strikes), len(self.waiting))
        self.waiting = self.waiting[passed:] + self.waiting[:passed]  # those go to the back
        if passed == len(self.waiting):
            assert slot == -1
            return
        assert slot == self.waiting[0].slot
        self.dispatch(0)

    def dispatch(self, slave):
        batch = self.waiting.pop(0)
        batch.state, batch.holder = "sent", slave
        batch.made.add(batch.attempt)
        self.sent += 1
        batch.order = self.sent
        self.dispatches.append(Dispatch(slave, batch.slot, batch.first, batch.jobs, batch.attempt))

    def becomes_ready(self, slave):
        self.tick += 1
        if slave.since is None:
            slave.since = slave.until = self.tick

    # ---- slaves come and go --------------------------------------------------------------------------------------

    def ready_or_refused(self):
        self.ready(self.draw(st.integers(-1, len(self.slaves) + 1)))

    def ready(self, number):
        slave = self.slaves.get(number)
        if slave is None or slave.state == "up":
            assert self.s.on_ready(number) == -1
            return
        assert self.s.on_ready(number) == 0
        self.tick += 1
        self.reinstated += slave.state != "absent"
        slave.state = "up"
        slave.until = self.tick
        # it may have kept its place in the queue from before it was lost, or have a new one
        slave.since = self.tick if slave.before is None else slave.before

    def lose_or_refused(self):
        self.lose(self.draw(st.integers(-1, len(self.slaves) + 1)))

    def lose(self, number):
        slave = self.slaves.get(number)
        if slave is None or slave.state == "lost":
            assert self.s.on_lost(number) == -1
            return
        self.lost += 1
        self.take_back(slave, number, self.s.on_lost, "lost")

    def suspect_or_refused(self):
        self.suspect(self.draw(st.integers(-1, len(self.slaves) + 1)))

    def suspect(self, number):
        slave = self.slaves.get(number)
        if slave is None or slave.state != "up":
            assert self.s.on_suspect(number) == -1
            return
        self.suspected += 1
        self.take_back(slave, number, self.s.on_suspect, "suspect")

    def take_back(self, slave, number, event, state):
        held = sorted((batch for batch in self.slots.values() if batch.holder == number), key=lambda batch: batch.slot)
        again = [batch for batch in held if batch.state == "sent"]
        assert event(number) == len(again)
        if slave.state == "up":
            slave.before = slave.since
        slave.state, slave.held, slave.since, slave.until = state, 0, None, None
        oldest = min(held, key=lambda batch: batch.order, default=None)
        for batch in held:
            batch.holder = 0
            self.free_if_done(batch)
        for batch in again:
            batch.attempt += 1
            batch.strikes += batch is oldest
            if batch.strikes == self.max_attempts or (self.one_strike_left(batch) and batch.jobs > 1):
                self.gives_up(batch)
            else:
                batch.state = "waiting"
                self.waiting.append(batch)
                self.resent += 1

    def one_strike_left(self, batch):
        return batch.strikes > 0 and batch.strikes == self.max_attempts - 1

    def gives_up(self, batch):
        batch.state = "ended"
        self.given_up.append(batch)

    def lose_busy(self):
        self.busy_one_fails(self.lose)

    def suspect_busy(self):
        self.busy_one_fails(self.suspect)

    def busy_one_fails(self, event):
        """A slave that holds something fails and may return; its batches go to others; it may answer after all."""
        number = self.draw_one(number for number, slave in self.slaves.items() if slave.held)
        if number is None:
            return
        event(number)
        returns = self.draw(st.booleans())
        for other, slave in self.slaves.items():
            if slave.state != "up" and (returns or other != number):
                self.ready(other)
        for _ in range(len(self.waiting)):
            self.assign()
        late = [it for it in self.overtaken() if it.slave == number]
        if late and self.draw(st.booleans()):
            self.on_result(late[-1])

    def blink(self):
        """A slave is lost or suspected, or one after the other, and back at once."""
        number = self.draw_one(sorted(self.slaves))
        if number is not None:
            for event in self.draw(st.sampled_from([[self.lose], [self.suspect], [self.suspect, self.lose]])):
                event(number)
            self.ready(number)

    # ---- answers -------------------------------------------------------------------------------------------------

    def answer_again(self):
        """Any dispatch there ever was is answered: the newest ones most often."""
        it = self.draw_one(self.dispatches if self.draw(st.booleans()) else self.dispatches[-3:])
        if it is not None:
            self.on_result(it)

    def answer_of_a_revenant(self):
        """A dispatch is answered whose slave was given up, and whose batch has not ended."""
        it = self.draw_one(self.overtaken())
        if it is not None:
            self.on_result(it)

    def overtaken(self):
        alive = {batch.first: batch for batch in self.slots.values() if batch.state != "ended"}
        return [it for it in self.dispatches if it.first in alive and it.attempt < alive[it.first].attempt]

    def answer_in_turn(self):
        """A slave answers what it works on, as nearly always."""
        batch = self.draw_one(batch for batch in self.slots.values() if batch.holder)
        if batch is not None:
            self.on_result(Dispatch(batch.holder, batch.slot, batch.first, batch.jobs, batch.attempt))

    def answer_bogus(self):
        """Numbers near those that exist."""
        old = self.draw_one(self.dispatches) or Dispatch(1, 0, 0, 1, 0)
        near = {
            "slave": [-1, 0, 1, old.slave, len(self.slaves), len(self.slaves) + 1],
            "slot": [-1, 0, old.slot, self.batch_count - 1, self.batch_count],
            "first": [old.first, old.first + 1, self.next_job, 1 << 40],
            "jobs": [0, old.jobs, old.jobs + 1],
            "attempt": [-1, 0, old.attempt, old.attempt + 1],
        }
        self.on_result(Dispatch(**{name: self.draw_one(values) for name, values in near.items()}))

    def verdict(self, it):
        """The rule, as the scheduler's docstring has it."""
        if not (0 <= it.slave <= len(self.slaves) and 0 <= it.slot < self.batch_count and it.attempt >= 0):
            return "refused"
        batch = self.slots.get(it.slot)
        if batch is None or batch.first != it.first:
            return "late"
        if batch.state == "ended" and batch.jobs == it.jobs and it.attempt <= batch.attempt:
            return "late"
        return "deliver" if batch.jobs == it.jobs and it.attempt in batch.made else "refused"

    def on_result(self, it):
        expected = self.verdict(it)
        batch = self.slots.get(it.slot)
        got = self.module.VERDICTS[self.s.on_result(it.slave, it.slot, it.first, it.jobs, it.attempt)]
        assert got == expected
        self.refused += got == "refused"
        self.late += got == "late"
        if got == "refused" or batch is None or batch.first != it.first:
            return
        if batch.holder == it.slave > 0 and batch.attempt == it.attempt and batch.state != "waiting":
            batch.holder = 0
            slave = self.slaves[it.slave]
            slave.held -= 1
            self.becomes_ready(slave)
        if got == "deliver":
            if batch in self.waiting:
                self.waiting.remove(batch)
            batch.state = "ended"
            batch.endings.append("delivered")
            if self.prompt:
                self.release_batch(batch)
                return
        self.free_if_done(batch)

    def release(self):
        for batch in [batch for batch in self.slots.values() if batch.endings and not batch.released]:
            self.release_batch(batch)

    def release_batch(self, batch):
        assert self.s.release(batch.slot) == 0
        batch.released = True
        self.free_if_done(batch)

    def free_if_done(self, batch):
        if batch.released and batch.holder == 0:
            del self.slots[batch.slot]

    def next_given_up(self):
        slot = self.s.next_given_up()
        if not self.given_up:
            assert slot == -1
            return
        batch = self.given_up.pop(0)
        assert slot == batch.slot
        batch.endings.append("given up")
        if self.one_strike_left(batch) and batch.jobs > 1:
            self.aside += [(batch.first + k, batch.strikes) for k in range(batch.jobs)]

    def everything_ends(self):
        """With all slaves up and no more losses, everything must come to its end and every slot must be free."""
        for slot in sorted(self.opened):
            assert self.s.cancel(slot) == 0
        self.opened.clear()
        for number, slave in self.slaves.items():
            if slave.state != "up":
                self.ready(number)
        for _ in range(self.batch_count * (self.max_attempts + 6) + len(self.aside)):
            for batch in list(self.slots.values()):
                if batch.state == "sent" or batch.holder:
                    self.on_result(Dispatch(batch.holder, batch.slot, batch.first, batch.jobs, batch.attempt))
            self.next_given_up()
            self.release()
            self.submit_apart()
            if self.waiting:
                self.assign() if self.slaves else self.assign_local()
        assert self.s.open_count == 0
        assert not self.aside
        assert all(len(batch.endings) == 1 for batch in self.batches), "a batch never ended"

    # ---- what must hold after every event ------------------------------------------------------------------------

    @invariant()
    def slaves_agree(self):
        up = [slave for slave in self.slaves.values() if slave.state == "up"]
        assert self.s.up_count == len(up)
        assert self.s.absent_count == sum(slave.state == "absent" for slave in self.slaves.values())
        assert self.s.suspect_count == sum(slave.state == "suspect" for slave in self.slaves.values())
        assert self.s.free_credit == sum(self.credit - slave.held for slave in up)
        assert self.s.ready_count == sum(slave.held < self.credit for slave in up)
        for number, slave in self.slaves.items():
            assert self.module.SLAVE_STATES[self.s.state_of_slave(number)] == slave.state
            assert self.s.held(number) == slave.held <= self.credit
            holds = [batch for batch in self.slots.values() if batch.holder == number]
            assert slave.held == len(holds)
            assert self.s.running(number) == (min(holds, key=lambda batch: batch.order).slot if holds else -1)

    @invariant()
    def slots_agree(self):
        for slot in range(self.batch_count):
            batch, state = self.slots.get(slot), self.module.BATCH_STATES[self.s.state_of_batch(slot)]
            if batch is None:
                assert state == ("open" if slot in self.opened else "free")
                continue
            assert state == ("retired" if batch.released else batch.state)
            facts = (self.s.first(slot), self.s.jobs(slot), self.s.attempt(slot), self.s.strikes(slot), self.s.holder(slot))
            assert facts == (batch.first, batch.jobs, batch.attempt, batch.strikes, batch.holder)
        assert self.s.open_count == len(self.opened) + len(self.slots)
        assert self.s.waiting_count == len(self.waiting)

    @invariant()
    def counts_agree(self):
        for name in ("sent", "resent", "late", "refused", "lost", "suspected", "reinstated"):
            assert getattr(self.s, name) == getattr(self, name), name
        assert self.s.ended == sum(batch.state == "ended" for batch in self.batches)
        assert all(len(batch.endings) <= 1 for batch in self.batches), "a batch ended twice"


MODEL_SETTINGS = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


def test_scheduler_and_model_agree(scheduler_module):
    run_state_machine_as_test(type("SchedulerMachine", (Machine,), {"module": scheduler_module}), settings=MODEL_SETTINGS)

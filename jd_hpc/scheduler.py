# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True, annotation_typing=False
"""Who gets which jobs: the queue of idle slaves and the ledger of batches. Pure state: no MPI, no clock, no I/O.

The rules it keeps:

- A *batch* is the unit of dispatch: consecutive jobs that travel in one message. It lives in a *slot* of the ledger, which also
  names the buffer that holds its payload, so that memory is bounded by the number of slots.
- Every batch that was submitted ends exactly once: `on_result` says VERDICT_DELIVER once for it, or `next_given_up` names it once.
- A slave holds at most `credit` batches, and gets none unless it is up. `limit_credit` changes that in the middle of a run; with 0
  nothing goes out any more. One that is suspected keeps nothing: what it held is sent
  to others; it is taken on again by `on_ready`.
- Slaves take turns: the one that has waited longest gets the next batch.
- The first valid answer wins, whoever it comes from; later ones are counted and dropped. An answer is valid when the slot
  still holds those very jobs and that attempt was made. Job numbers never repeat, so an old answer cannot match a new batch.
- A slave runs its batches in the order in which it got them. When it is lost or suspected, the oldest one is struck: it may be
  the cause. A batch of several jobs that has one strike left is named by `next_given_up` too, for the caller to `submit` its jobs
  one by one: then only the job that is to blame is given up at last. A batch that was struck never runs in the
  master's own process.
- A slot whose jobs ended is used again only when the caller has released it and no live slave still works on it.

It takes events (`on_...`) and returns commands: `assign` (send this slot to its `holder`), verdicts (deliver this) and
`next_given_up`. A call that the rules forbid changes nothing and returns -1; the caller raises with what `describe` says.

This file compiles with scheduler.pxd and runs uncompiled just the same.
"""

from __future__ import annotations

from array import array

import cython

if not cython.compiled:
    SLAVE_ABSENT, SLAVE_UP, SLAVE_LOST, SLAVE_SUSPECT = range(4)
    BATCH_FREE, BATCH_OPEN, BATCH_WAITING, BATCH_SENT, BATCH_ENDED, BATCH_RETIRED = range(6)
    VERDICT_DELIVER, VERDICT_LATE, VERDICT_REFUSED = range(3)
    DISPATCHES_MOST = 256

SLAVE_STATES = ("absent", "up", "lost", "suspect")
BATCH_STATES = ("free", "open", "waiting", "sent", "ended", "retired")
VERDICTS = ("deliver", "late", "refused")


class Scheduler:
    """The queue of idle slaves and the ledger of batches.

    Parameters
    ----------
    slave_count : int
        Slaves are numbered 1 to `slave_count`; all are absent until `on_ready`. 0 stands for the master itself.
    credit : int
        Batches that a slave may hold at once, at least 1.
    batch_count : int
        Slots of the ledger: batches that can be open at once, at least 1.
    max_attempts : int
        Strikes after which a batch is given up, at least 1.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    def __init__(self, slave_count: int, credit: int, batch_count: int, max_attempts: int = 3) -> None:
        if slave_count < 0 or credit < 1 or batch_count < 1 or max_attempts < 1:
            raise ValueError(
                f"slave_count must be at least 0 and credit, batch_count and max_attempts at least 1; "
                f"got {slave_count}, {credit}, {batch_count}, {max_attempts}"
            )
        self.slave_count = slave_count
        self.credit = credit
        self.batch_count = batch_count
        self.max_attempts = max_attempts
        self.up_count = self.suspect_count = self.ready_count = self.waiting_count = self.open_count = self.free_credit = 0
        self.held_count = 0
        self.absent_count = slave_count
        self.sent = self.ended = self.resent = self.late = self.refused = self.lost = self.suspected = self.reinstated = 0
        self.slave_state = array("i", bytes(4 * (slave_count + 1)))
        self.slave_held = array("i", bytes(4 * (slave_count + 1)))
        self.slave_answers = array("q", bytes(8 * (slave_count + 1)))
        self.slave_queued = array("i", bytes(4 * (slave_count + 1)))
        self.ready = array("i", bytes(4 * (slave_count + 1)))
        self.ready_head = self.ready_length = 0
        self.batch_state = array("i", bytes(4 * batch_count))
        self.batch_first = array("q", bytes(8 * batch_count))
        self.batch_jobs = array("i", bytes(4 * batch_count))
        self.batch_attempt = array("i", bytes(4 * batch_count))
        self.batch_strikes = array("i", bytes(4 * batch_count))
        self.batch_order = array("q", bytes(8 * batch_count))
        self.batch_slave = array("i", bytes(4 * batch_count))
        self.free = array("i", range(batch_count - 1, -1, -1))
        self.free_length = batch_count
        self.waiting = array("i", bytes(4 * batch_count))
        self.waiting_head = 0
        self.given_up = array("i", bytes(4 * batch_count))
        self.given_up_head = self.given_up_length = 0

    # ---- batches come in ---------------------------------------------------------------------------------------------

    def open(self) -> int:
        """Take a free slot for the caller to fill; -1 if there is none."""
        if self.free_length == 0:
            return -1
        self.free_length -= 1
        slot = self.free[self.free_length]
        self.batch_state[slot] = BATCH_OPEN
        self.batch_slave[slot] = 0
        self.open_count += 1
        return slot

    def submit(self, slot: int, first: int, jobs: int, strikes: int = 0) -> int:
        """The open slot now holds `jobs` jobs from number `first` on, struck so often: let it wait for a slave."""
        if not 0 <= slot < self.batch_count or self.batch_state[slot] != BATCH_OPEN or jobs < 1 or first < 0:
            return -1
        if strikes < 0 or strikes >= self.max_attempts:
            return -1
        self.batch_first[slot] = first
        self.batch_jobs[slot] = jobs
        self.batch_attempt[slot] = 0
        self.batch_strikes[slot] = strikes
        self._queue_batch(slot)
        return 0

    def cancel(self, slot: int) -> int:
        """Give back an open slot that was not needed."""
        if not 0 <= slot < self.batch_count or self.batch_state[slot] != BATCH_OPEN:
            return -1
        self._free(slot)
        return 0

    # ---- batches go out ----------------------------------------------------------------------------------------------

    def assign(self) -> int:
        """Give the batch that waits first to the slave that waits longest: the slot to send to its `holder`, or -1."""
        if self.waiting_count == 0 or self.ready_count == 0:
            return -1
        slave = self._next_slave()
        slot = self._next_batch()
        self.batch_state[slot] = BATCH_SENT
        self.batch_slave[slot] = slave
        self.batch_order[slot] = self.sent
        self.slave_held[slave] += 1
        self.held_count += 1
        self.free_credit -= 1
        self.sent += 1
        if self.slave_held[slave] < self.credit:
            self._queue_slave(slave)
        return slot

    def assign_local(self, struck_too: bool = False, struck_wait: bool = False) -> int:
        """Give the batch that waits first to the master itself (slave 0): its slot, or -1.

        Those that were struck are given up, unless the master runs jobs in a process of their own and `struck_too` is set, or a
        slave may still take them and `struck_wait` is set.
        """
        for _ in range(self.waiting_count):
            slot = self._next_batch()
            if struck_too or self.batch_strikes[slot] == 0:
                self.batch_state[slot] = BATCH_SENT
                self.batch_slave[slot] = 0
                self.sent += 1
                return slot
            if struck_wait:
                self._queue_batch(slot)
            else:
                self._give_up(slot)
        return -1

    def limit_credit(self, credit: int) -> int:
        """From now on a slave may hold so many batches; those that hold more keep them. 0: nothing goes out any more."""
        if credit < 0:
            return -1
        self.credit = credit
        self.free_credit = 0
        for _ in range(self.ready_length):  # those that keep their turn first
            slave = self.ready[self.ready_head]
            self.ready_head = 0 if self.ready_head == self.slave_count else self.ready_head + 1
            self.ready_length -= 1
            self.slave_queued[slave] = 0
            if self.slave_state[slave] != SLAVE_UP:
                continue
            self.ready_count -= 1
            if self.slave_held[slave] < credit:
                self._queue_slave(slave)
        for slave in range(1, self.slave_count + 1):
            if self.slave_state[slave] == SLAVE_UP and self.slave_held[slave] < credit:
                self.free_credit += credit - self.slave_held[slave]
                if not self.slave_queued[slave]:
                    self._queue_slave(slave)
        return 0

    # ---- events ------------------------------------------------------------------------------------------------------

    def on_ready(self, slave: int) -> int:
        """A slave reports for work for the first time, or is there again after it was suspected or given up for lost."""
        if slave < 1 or slave > self.slave_count or self.slave_state[slave] == SLAVE_UP:
            return -1
        if self.slave_state[slave] == SLAVE_ABSENT:
            self.absent_count -= 1
        else:
            self.reinstated += 1
            self.suspect_count -= self.slave_state[slave] == SLAVE_SUSPECT
        self.slave_state[slave] = SLAVE_UP
        self.up_count += 1
        self.free_credit += self.credit
        if self.slave_queued[slave]:  # its entry from before it was lost is still in the ring, and counts again
            self.ready_count += 1
        elif self.credit > 0:
            self._queue_slave(slave)
        return 0

    def on_result(self, slave: int, slot: int, first: int, jobs: int, attempt: int) -> int:
        """A slave answers: VERDICT_DELIVER (the caller delivers and then calls `release`), VERDICT_LATE or VERDICT_REFUSED."""
        if slave < 0 or slave > self.slave_count or slot < 0 or slot >= self.batch_count or attempt < 0:
            self.refused += 1
            return VERDICT_REFUSED
        self.slave_answers[slave] += 1
        state = self.batch_state[slot]
        if state < BATCH_WAITING or self.batch_first[slot] != first:
            self.late += 1
            return VERDICT_LATE
        newest = self.batch_attempt[slot]
        # while it waits, its newest attempt is not made yet
        if self.batch_jobs[slot] != jobs or attempt > newest or (state == BATCH_WAITING and attempt == newest):
            self.refused += 1
            return VERDICT_REFUSED
        if state != BATCH_WAITING and slave > 0 and self.batch_slave[slot] == slave and attempt == newest:
            self._give_back(slave)
            self.batch_slave[slot] = 0
        if state >= BATCH_ENDED:
            self.late += 1
            if state == BATCH_RETIRED and self.batch_slave[slot] == 0:
                self._free(slot)
            return VERDICT_LATE
        if state == BATCH_WAITING:
            self._unqueue_batch(slot)
        self.batch_state[slot] = BATCH_ENDED
        self.ended += 1
        return VERDICT_DELIVER

    def release(self, slot: int) -> int:
        """The caller is done with a batch that ended. The slot is free once no live slave works on it any more."""
        if not 0 <= slot < self.batch_count or self.batch_state[slot] != BATCH_ENDED:
            return -1
        if self.batch_slave[slot] > 0:
            self.batch_state[slot] = BATCH_RETIRED
        else:
            self._free(slot)
        return 0

    def on_lost(self, slave: int) -> int:
        """A slave is given up for lost: its batches wait for another one, or are given up. Returns how many it held, or -1."""
        if slave < 1 or slave > self.slave_count or self.slave_state[slave] == SLAVE_LOST:
            return -1
        if self.slave_state[slave] == SLAVE_ABSENT:
            self.absent_count -= 1
        elif self.slave_state[slave] == SLAVE_SUSPECT:
            self.suspect_count -= 1
        count = self._take_back(slave)
        self.slave_state[slave] = SLAVE_LOST
        self.lost += 1
        return count

    def on_suspect(self, slave: int) -> int:
        """A slave that is up does not answer: what it holds goes to others. Returns how many batches that were, or -1."""
        if slave < 1 or slave > self.slave_count or self.slave_state[slave] != SLAVE_UP:
            return -1
        count = self._take_back(slave)
        self.slave_state[slave] = SLAVE_SUSPECT
        self.suspect_count += 1
        self.suspected += 1
        return count

    def next_given_up(self) -> int:
        """The next batch that must not be sent again as it is, or -1.

        If it has several jobs and exactly one strike left (but at least one strike), the caller takes it apart: it sets the jobs
        aside, calls `release`, and submits them one by one with these strikes, before any new job, as slots become free. (To submit
        them all before the release may wait for ever: every slot may hold such a batch.) Else it delivers the failure and then
        calls `release`.
        """
        if self.given_up_length == 0:
            return -1
        slot = self.given_up[self.given_up_head]
        self.given_up_head = (self.given_up_head + 1) % self.batch_count
        self.given_up_length -= 1
        return slot

    # ---- facts -------------------------------------------------------------------------------------------------------

    def holder(self, slot: int) -> int:
        """The slave that works on this slot; 0: none, or the master itself."""
        return self.batch_slave[slot]

    def attempt(self, slot: int) -> int:
        """How often the slot's batch was dispatched before this time."""
        return self.batch_attempt[slot]

    def strikes(self, slot: int) -> int:
        """How often a slave was lost or suspected while it ran the slot's batch."""
        return self.batch_strikes[slot]

    def running(self, slave: int) -> int:
        """The slot that the slave runs now: the one that it got first of those that it holds; -1 if it holds none."""
        found = -1
        if slave < 1:  # the master is no slave, and 0 stands for nobody too
            return found
        for slot in range(self.batch_count):
            if self.batch_slave[slot] == slave and (found < 0 or self.batch_order[slot] < self.batch_order[found]):
                found = slot
        return found

    def order(self, slot: int) -> int:
        """What `sent` was when the slot's batch was dispatched last: tells which of two a slave got first."""
        return self.batch_order[slot]

    def jobs(self, slot: int) -> int:
        """How many jobs the slot's batch has."""
        return self.batch_jobs[slot]

    def first(self, slot: int) -> int:
        """The number of the first job of the slot's batch."""
        return self.batch_first[slot]

    def held(self, slave: int) -> int:
        """How many batches the slave holds."""
        return self.slave_held[slave]

    def answers(self, slave: int) -> int:
        """How many answers came from the slave, late and refused ones included."""
        return self.slave_answers[slave]

    def state_of_slave(self, slave: int) -> int:
        """SLAVE_ABSENT, SLAVE_UP, SLAVE_LOST or SLAVE_SUSPECT."""
        return self.slave_state[slave]

    def state_of_batch(self, slot: int) -> int:
        """BATCH_FREE, BATCH_OPEN, BATCH_WAITING, BATCH_SENT, BATCH_ENDED or BATCH_RETIRED."""
        return self.batch_state[slot]

    def describe(self, slot: int) -> str:
        """Everything that is known of a slot, for an error message."""
        return (
            f"slot {slot} of {self.batch_count}: {BATCH_STATES[self.batch_state[slot]]}, jobs {self.batch_first[slot]} "
            f"+ {self.batch_jobs[slot]}, attempt {self.batch_attempt[slot]}, strikes {self.batch_strikes[slot]}, "
            f"slave {self.batch_slave[slot]}"
        )

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _queue_slave(self, slave: int) -> None:
        tail = self.ready_head + self.ready_length
        if tail > self.slave_count:  # the ring has slave_count + 1 places
            tail -= self.slave_count + 1
        self.ready[tail] = slave
        self.ready_length += 1
        self.ready_count += 1
        self.slave_queued[slave] = 1

    def _next_slave(self) -> int:
        while True:  # ready_count > 0, so there is one; entries of lost slaves are dropped on the way
            slave = self.ready[self.ready_head]
            self.ready_head = 0 if self.ready_head == self.slave_count else self.ready_head + 1
            self.ready_length -= 1
            self.slave_queued[slave] = 0
            if self.slave_state[slave] == SLAVE_UP:
                self.ready_count -= 1
                return slave

    def _give_back(self, slave: int) -> None:
        self.slave_held[slave] -= 1
        self.held_count -= 1
        if self.slave_held[slave] < self.credit:
            self.free_credit += 1
            if not self.slave_queued[slave]:
                self._queue_slave(slave)

    def _queue_batch(self, slot: int) -> None:
        tail = self.waiting_head + self.waiting_count
        if tail >= self.batch_count:
            tail -= self.batch_count
        self.waiting[tail] = slot
        self.waiting_count += 1
        self.batch_state[slot] = BATCH_WAITING

    def _next_batch(self) -> int:
        slot = self.waiting[self.waiting_head]
        self.waiting_head = 0 if self.waiting_head == self.batch_count - 1 else self.waiting_head + 1
        self.waiting_count -= 1
        return slot

    def _unqueue_batch(self, slot: int) -> None:
        """Take a slot out of the middle of the ring: rare (a lost slave came back), so the walk does not matter."""
        for _ in range(self.waiting_count):
            other = self._next_batch()
            if other != slot:
                self._queue_batch(other)

    def _take_back(self, slave: int) -> int:
        """Everything that a slave holds waits for another one, or is given up: how many batches that are."""
        if self.slave_state[slave] == SLAVE_UP:
            self.up_count -= 1
            self.free_credit -= max(0, self.credit - self.slave_held[slave])
            self.ready_count -= self.slave_queued[slave]
        self.held_count -= self.slave_held[slave]
        self.slave_held[slave] = 0
        struck = self.running(slave)
        count = 0
        for slot in range(self.batch_count):
            if self.batch_slave[slot] != slave:
                continue
            self.batch_slave[slot] = 0
            if self.batch_state[slot] == BATCH_RETIRED:
                self._free(slot)
            elif self.batch_state[slot] == BATCH_SENT:
                count += 1
                if slot == struck:
                    self.batch_strikes[slot] += 1
                self._again(slot)
        return count

    def _again(self, slot: int) -> None:
        self.batch_attempt[slot] += 1
        strikes = self.batch_strikes[slot]
        if strikes >= self.max_attempts or self.batch_attempt[slot] >= DISPATCHES_MOST:
            self._give_up(slot)
        elif strikes > 0 and strikes == self.max_attempts - 1 and self.batch_jobs[slot] > 1:
            self._give_up(slot)  # for the caller to take apart
        else:
            self.resent += 1
            self._queue_batch(slot)

    def _give_up(self, slot: int) -> None:
        self.batch_state[slot] = BATCH_ENDED
        self.ended += 1
        self.given_up[(self.given_up_head + self.given_up_length) % self.batch_count] = slot
        self.given_up_length += 1

    def _free(self, slot: int) -> None:
        self.batch_state[slot] = BATCH_FREE
        self.free[self.free_length] = slot
        self.free_length += 1
        self.open_count -= 1

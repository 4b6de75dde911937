"""What the unit tests of the scheduler drive it with."""

from __future__ import annotations

COUNTERS = ("up_count", "absent_count", "suspect_count", "ready_count", "waiting_count", "open_count", "free_credit")
TOTALS = ("sent", "ended", "resent", "late", "refused", "lost", "suspected", "reinstated")


class Driver:
    """A scheduler that speaks in names instead of numbers, and remembers what it sent."""

    def __init__(self, module, slaves=3, credit=1, batches=6, max_attempts=3, up=True):
        self.module = module
        self.s = module.Scheduler(slaves, credit, batches, max_attempts)
        self.next_job = 0
        for slave in range(1, slaves + 1 if up else 1):
            assert self.s.on_ready(slave) == 0

    def submit(self, jobs=1, strikes=0):
        slot = self.s.open()
        assert slot >= 0
        assert self.s.submit(slot, self.next_job, jobs, strikes) == 0
        self.next_job += jobs
        return slot

    def send(self, jobs=1):
        """Submit a batch and assign it: (slot, slave)."""
        self.submit(jobs)
        return self.assign()

    def assign(self):
        slot = self.s.assign()
        assert slot >= 0
        return slot, self.s.holder(slot)

    def dispatch(self, slot):
        """What travels with a batch, and comes back with its answer."""
        return (slot, self.s.first(slot), self.s.jobs(slot), self.s.attempt(slot))

    def answer(self, slave, dispatch):
        return self.module.VERDICTS[self.s.on_result(slave, *dispatch)]

    def batch(self, slot):
        return self.module.BATCH_STATES[self.s.state_of_batch(slot)]

    def slave(self, slave):
        return self.module.SLAVE_STATES[self.s.state_of_slave(slave)]

    def facts(self):
        """All that can be seen from outside."""
        s = self.s
        return (
            {name: getattr(s, name) for name in COUNTERS + TOTALS},
            [(self.slave(i), s.held(i)) for i in range(s.slave_count + 1)],
            [s.describe(slot) for slot in range(s.batch_count)],
        )

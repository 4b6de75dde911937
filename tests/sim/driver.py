"""A master as small as can be: it tells the scheduler what it hears, and does what the scheduler says.

It does so exactly as a real one must:

- A batch of several jobs that is given up with one strike left is taken apart: its jobs are set aside with its strikes, its slot
  is released, and they are submitted one by one, before any new job, as slots become free. To submit them all before the release
  would be wrong: when every slot holds such a batch, there would never be a free one.
- It works itself only when every slave is lost: one that is suspected may be back at any moment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from books import Books, Dispatch


class Driver:
    """The master of one run.

    Parameters
    ----------
    books : Books
        Holds the scheduler, and checks each of its answers.
    send : callable
        ``send(slave, dispatch)`` puts a batch on its way; slave 0 is the master itself, which answers in its time.
    later : callable
        ``later(action, ...)`` calls the action in a while.
    """

    def __init__(self, books: Books, send: Callable[[int, Dispatch], None], later: Callable[..., None]) -> None:
        self.books, self.s, self.scenario, self.send, self.later = books, books.s, books.scenario, send, later
        self.available = 0 if self.scenario.scarce else self.scenario.jobs  # jobs that the user has
        self.next_job = 0
        self.aside: deque[tuple[int, int]] = deque()  # jobs of batches that were taken apart, and their strikes
        self.works = False

    # ---- what it hears -------------------------------------------------------------------------------------------

    def hears_ready(self, number: int) -> None:
        self.books.check(self.s.on_ready(number) == 0, f"slave {number} reports for work and is refused")
        self.books.becomes(number, "up")
        self.turn()

    def hears_silence(self, number: int) -> None:
        self._takes_back(number, "suspect", self.s.on_suspect)

    def hears_loss(self, number: int) -> None:
        self._takes_back(number, "lost", self.s.on_lost)

    def _takes_back(self, number: int, state: str, event: Callable[[int], int]) -> None:
        running, oldest = self.s.running(number), self.books.oldest(number)
        self.books.check(running == oldest, f"slave {number} runs slot {oldest}, not {running}")
        count = event(number)
        self.books.becomes(number, state)
        self.books.taken_back(number, count)
        self.turn()

    def hears_answer(self, number: int, facts: tuple[int, int, int, int], results: tuple[int, ...]) -> None:
        expected = self.books.expected(facts)
        verdict = self.books.module.VERDICTS[self.s.on_result(number, *facts)]
        self.books.answered(number, facts, verdict, expected)
        if verdict == "deliver":
            content = self.books.slots[facts[0]].content
            self.books.check(content == results, f"slot {facts[0]} holds {content}, its results are {results}")
            self._end(facts[0], "delivered")
        self.turn()

    def hears_own_answer(self, dispatch: Dispatch) -> None:
        self.works = False
        self.hears_answer(0, (dispatch.slot, dispatch.first, dispatch.jobs, dispatch.attempt), dispatch.content)

    def limits(self, credit: int) -> None:
        """The end of the allocation is near, or is not; or a signal came."""
        before = [self.s.describe(slot) for slot in range(self.s.batch_count)]
        self.books.check(self.s.limit_credit(credit) == 0, f"a credit of {credit} is refused")
        self.books.limited(credit, before)
        self.turn()

    # ---- what it does --------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """After each event."""
        self._settle()
        self._fetch()
        while (slot := self.s.assign()) >= 0:
            self.send(self.s.holder(slot), self.books.dispatches(slot))
        while self.books.credit and self.is_alone() and not self.works and self.s.waiting_count:
            slot = self.s.assign_local()
            self._settle()  # those that were struck
            if slot >= 0:
                self.works = True
                self.send(0, self.books.dispatches(slot))
            self._fetch()
        self.books.check_counts()

    def is_alone(self) -> bool:
        return self.scenario.work_alone and self.s.up_count + self.s.suspect_count + self.s.absent_count == 0

    def _settle(self) -> None:
        """Deliver the failure of what is given up, and take apart what has one strike left."""
        while (slot := self.s.next_given_up()) >= 0:
            first, jobs, strikes = self.s.first(slot), self.s.jobs(slot), self.s.strikes(slot)
            how = "apart" if jobs > 1 and 0 < strikes == self.s.max_attempts - 1 else "failed"
            why = self.books.given_up(slot, self.is_alone())
            self.books.check(how == why, f"a batch that should be {why} is {how}", slot)
            if how == "apart":
                self.aside.extend((job, strikes) for job in range(first, first + jobs))
            self._end(slot, how)
        if self.aside:
            held = len(self.aside) + sum(batch.jobs for batch in self.books.slots if batch is not None and not batch.ended)
            self.books.check(held <= self.books.slot_count * self.scenario.grain, f"{held} jobs are in memory")

    def _end(self, slot: int, how: str) -> None:
        self.books.ends(slot, how)
        if self.scenario.slow_user:
            self.later(self.releases, slot)
        else:
            self._release(slot)

    def releases(self, slot: int) -> None:
        self._release(slot)
        self.turn()

    def _release(self, slot: int) -> None:
        self.books.released(slot)
        self.books.check(self.s.release(slot) == 0, "cannot release", slot)

    def _fetch(self) -> None:
        """Fill slots: with what was set aside, then with new jobs."""
        while self.aside and (slot := self.s.open()) >= 0:
            job, strikes = self.aside.popleft()
            self._submit(slot, job, 1, strikes)
        while not self.aside and self.next_job < self.available and self.room() > 0 and (slot := self.s.open()) >= 0:
            jobs = min(self.scenario.grain, self.available - self.next_job)
            self._submit(slot, self.next_job, jobs, 0)
            self.next_job += jobs

    def room(self) -> int:
        """How many batches the user may be asked for now."""
        if self.books.credit == 0:
            return 0
        if self.s.up_count == 0:
            return int(self.is_alone() and self.s.open_count == 0)
        return self.s.free_credit + self.scenario.read_ahead - self.s.waiting_count

    def _submit(self, slot: int, first: int, jobs: int, strikes: int) -> None:
        self.books.submitted(slot, first, jobs, strikes)
        self.books.check(self.s.submit(slot, first, jobs, strikes) == 0, "cannot submit", slot)

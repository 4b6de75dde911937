"""What ``jd-hpc check`` does: reads the events of a history, and verifies what was promised of the run. No MPI, no printing.

It keeps books of its own, from the events alone, and knows nothing of how the scheduler works. What must hold:

- A job is given to process_result once, after an answer of it was accepted, or to process_failure once. When the run ended well,
  every job has ended.
- An answer is accepted only if that slave was sent that batch with that attempt, and only the first one of a job. The first one is
  not dropped; later ones are.
- A batch goes out again only after it was taken back, with the next attempt, and never after it has ended.
- A slave is sent something only while it is up, and never more than its credit. It is up again only after it was lost or suspected.
- A batch that a slave ran when it was lost or suspected is struck. With max_attempts strikes it is given up, and with fewer only if
  too few slaves are left, or it went out 256 times. One of several jobs with one strike left is taken apart.
- The master runs jobs itself only when too few slaves are left, and then (but for `isolate`) none that was struck.
- With `ordered`, jobs end in the order of their numbers.
- The counters at the end agree with the lines.

Job numbers are given in order, so all that is known and not open has ended: memory is bounded by the jobs that are open.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jd_hpc.errors import HistoryError
from jd_hpc.history import FORMAT
from jd_hpc.verdict import VIOLATIONS_KEPT, Run, Violation

DISPATCHES_MOST = 256
COUNTED = {"messages sent": "sent", "late results dropped": "late", "slaves lost": "lost", "slaves suspected": "suspect"}
"""The master's counters, and the events of which there must be so many."""

Event = dict[str, Any]
Dispatch = tuple[int, int, int, int]  # slot, first, count, attempt


@dataclass(slots=True, eq=False)
class Batch:
    """Jobs that are open, and travel together."""

    first: int
    count: int
    strikes: int = 0
    sent: list[tuple[int, int, int]] = field(default_factory=list)  # slave, slot and attempt of each dispatch
    earlier: list[tuple[int, int, int]] = field(default_factory=list)  # before it began anew: these answers may count too
    holder: int = -1  # who works on it; -1: nobody
    back_line: int = 0  # where it was taken back last
    answered: bool = False
    given_up: bool = False

    def __str__(self) -> str:
        return f"job {self.first}" if self.count == 1 else f"jobs {self.first} to {self.first + self.count - 1}"

    @property
    def state(self) -> str:
        """In words."""
        if self.answered:
            return "answered, but not delivered"
        if self.given_up:
            return "given up, but its failure was not delivered"
        if self.holder > 0:
            return f"sent to slave {self.holder}, and not answered"
        return "run by the master" if self.holder == 0 else "not sent again" if self.sent else "never sent"


class Checker:
    """The books of one run.

    Parameters
    ----------
    line : int
        Number of the run's first line.
    begin : dict
        That line.
    """

    def __init__(self, line: int, begin: Event) -> None:
        if begin["format"] != FORMAT:
            raise HistoryError(f"line {line}: a history of format {begin['format']}; this version knows {FORMAT}")
        self.run = Run(line, begin)
        self.line = line
        options = begin["options"]
        self.credit, self.grain, self.most = options["credit"], options["grain"], options["max_attempts"]
        self.least_slaves: int = max(1, options["min_slaves"])
        self.isolate: bool = options["isolate"]
        self.ordered: bool = options.get("ordered", False)
        self.states = ["absent"] * (begin["slaves"] + 1)
        self.usable: int = begin["slaves"]  # up, or not there yet
        self.owed: list[dict[Dispatch, Batch]] = [{} for _ in self.states]  # sent to a slave and not answered, the oldest first
        self.alone_line = line  # when too few slaves were left last
        self.open: dict[int, Batch] = {}  # by their first job
        self.unsent: list[tuple[int, int]] = []  # numbers that were passed over: first, count
        self.next_job = 0
        self.next_end = 0  # with `ordered`: which job is the next one to end
        self.handlers = {
            "up": self._up, "back": self._up, "lost": self._down, "suspect": self._down, "sent": self._sent,
            "accepted": self._answer, "late": self._answer, "refused": self._answer, "delivered": self._delivered,
            "stored": self._stored,
            "failed": self._failed, "given_up": self._given_up, "apart": self._apart, "again": self._again, "end": self._end,
        }  # fmt: skip

    def take(self, line: int, event: Event) -> None:
        """Enter an event. Kinds that are not known are counted.

        Raises
        ------
        KeyError, TypeError, ValueError, IndexError
            If it is not what a history says of such events.
        """
        self.line = line
        kind = event["e"]
        self.run.seconds = event["t"]
        if self.run.how is not None:
            self._wrong(f"{kind!r} after the end of the run")
        self.run.counts[kind] += kind not in ("delivered", "stored", "failed")  # these are counted by jobs
        handler = self.handlers.get(kind)
        if handler is not None:
            handler(event)

    def close(self) -> Run:
        """Return the verdict. What is open by now stays so."""
        run = self.run
        passed = [(first, count, "never sent") for first, count in self.unsent]
        left = sorted([(batch.first, batch.count, batch.state) for batch in self.open.values()] + passed)
        run.left_jobs = sum(count for _, count, _ in left)
        for first, count, state in left:
            facts = f"{Batch(first, count)}: {state}"
            if run.how == "ok":
                self._wrong(f"the run ended well without {facts}")
            elif len(run.left) < VIOLATIONS_KEPT:
                run.left.append(facts)
        return run

    def _wrong(self, facts: str) -> None:
        self.run.violation_count += 1
        if len(self.run.violations) < VIOLATIONS_KEPT:
            self.run.violations.append(Violation(self.line, facts))

    # ---- slaves ------------------------------------------------------------------------------------------------------

    def _is_alone(self) -> bool:
        return self.usable < self.least_slaves

    def _slave_of(self, event: Event, least: int = 1) -> int:
        slave = event["slave"]
        if not least <= slave < len(self.states):
            raise ValueError(f"slave {slave} of {len(self.states) - 1}")
        return int(slave)

    def _becomes(self, slave: int, state: str) -> None:
        was_alone = self._is_alone()
        self.usable += (state == "up") - (self.states[slave] in ("up", "absent"))
        self.states[slave] = state
        if was_alone or self._is_alone():
            self.alone_line = self.line

    def _up(self, event: Event) -> None:
        slave = self._slave_of(event)
        was = self.states[slave]
        if was == "up" or (event["e"] == "back" and was == "absent"):
            self._wrong(f"slave {slave} is {event['e']}, and was {was} before")
        self._becomes(slave, "up")
        if event["e"] == "back":
            self.run.slaves.append((event["t"], slave, "back", event["how"]))

    def _down(self, event: Event) -> None:
        """What the slave held is taken back; what it ran, the oldest, is struck."""
        slave, state = self._slave_of(event), event["e"]
        was = self.states[slave]
        if was == "lost" or (state == "suspect" and was != "up"):
            self._wrong(f"slave {slave} is {state}, and was {was} before")
        self._becomes(slave, state)
        self.run.slaves.append((event["t"], slave, state, event["how"]))
        struck = True
        for batch in self.owed[slave].values():
            if batch.holder == slave and not batch.answered:
                batch.holder, batch.back_line = -1, self.line
                batch.strikes += struck
            struck = False
        self.owed[slave].clear()

    # ---- batches go out, and answers come in -------------------------------------------------------------------------

    def _sent(self, event: Event) -> None:
        slave, slot, attempt = self._slave_of(event, 0), event["slot"], event["attempt"]
        first, count = event["first"], event["count"]
        jobs = Batch(first, count)
        batch = self.open.get(first)
        if batch is None or batch.count != count:
            batch = self._enter(jobs)
        if batch is None:
            ended = "have ended" if self._holding(first) is None else "are part of another batch"
            self._wrong(f"{jobs} sent to slave {slave}, but they {ended}")
            return
        if slave > 0 and self.states[slave] != "up":
            self._wrong(f"{jobs} sent to slave {slave}, which is {self.states[slave]}")
        if slave == 0 and not self._is_alone():
            self._wrong(f"{jobs} run by the master, but {self.usable} slaves are there")
        if slave == 0 and batch.strikes and not self.isolate:
            self._wrong(f"{jobs} run by the master, which was struck before")
        if count > self.grain:
            self._wrong(f"{jobs} sent in one message, but grain is {self.grain}")
        self._check_dispatch(batch, slave, attempt)
        batch.sent.append((slave, slot, attempt))
        batch.holder = slave
        if slave > 0:
            owed = self.owed[slave]
            owed[slot, first, count, attempt] = batch
            if len(owed) > self.credit:
                self._wrong(f"{jobs} sent to slave {slave}, which holds {len(owed)} batches now: over its credit of {self.credit}")

    def _check_dispatch(self, batch: Batch, slave: int, attempt: int) -> None:
        """Whether it may go out now, and whether the attempt is the next one."""
        if batch.answered or batch.given_up:
            self._wrong(f"{batch} sent to slave {slave}, but it was {'answered' if batch.answered else 'given up'} before")
        elif batch.holder >= 0:
            self._wrong(f"{batch} sent to slave {slave}, but {batch.state}")
        if batch.strikes >= self.most:
            self._wrong(f"{batch} sent to slave {slave} after {batch.strikes} strikes: max_attempts is {self.most}")
        elif batch.count > 1 and 0 < batch.strikes == self.most - 1:
            self._wrong(f"{batch} sent to slave {slave} after {batch.strikes} strikes, and not taken apart")
        if attempt != len(batch.sent) or attempt >= DISPATCHES_MOST:
            self._wrong(f"{batch} sent to slave {slave} as attempt {attempt}, but it is attempt {len(batch.sent)}")

    def _enter(self, jobs: Batch) -> Batch | None:
        """Jobs that are sent for the first time; None if they are not new."""
        end = jobs.first + jobs.count
        if jobs.first < 0 or jobs.count < 1:
            raise ValueError(f"{jobs.count} jobs from {jobs.first} on")
        if jobs.first >= self.next_job:
            if jobs.first > self.next_job:
                self.unsent.append((self.next_job, jobs.first - self.next_job))
            self.next_job = end
        else:
            for at, (first, count) in enumerate(self.unsent):
                if first <= jobs.first and end <= first + count:
                    rest = [(first, jobs.first - first), (end, first + count - end)]
                    self.unsent[at : at + 1] = [span for span in rest if span[1]]
                    break
            else:
                return None
        self.open[jobs.first] = jobs
        self.run.sent_jobs += jobs.count
        return jobs

    def _holding(self, job: int) -> Batch | None:
        """The open batch that this job is in."""
        batch = self.open.get(job)
        if batch is None:
            batch = next((one for one in self.open.values() if one.first <= job < one.first + one.count), None)
        return batch

    def _answer(self, event: Event) -> None:
        slave, slot, attempt = self._slave_of(event, 0), event["slot"], event["attempt"]
        first, count = event["first"], event["count"]
        self.owed[slave].pop((slot, first, count, attempt), None)
        batch = self.open.get(first)
        if batch is not None and batch.count != count:
            batch = None
        made, waits = (slave, slot, attempt), batch is not None and not (batch.answered or batch.given_up)
        what = f"attempt {attempt} of {Batch(first, count)} by slave {slave}"
        if event["e"] != "accepted":
            if batch is not None and waits and made in batch.sent and not self._is_doomed(batch):
                self._wrong(f"{what} is {event['e']}, but it is the first valid answer")
            return
        if batch is None:
            ended = "such a batch was never sent" if first >= self.next_job else "these jobs have ended, or go out otherwise"
            self._wrong(f"{what} accepted, but {ended}")
            return
        if not waits:
            self._wrong(f"{what} accepted, but it was {'answered' if batch.answered else 'given up'} before")
        elif made not in batch.sent and made not in batch.earlier:
            self._wrong(f"{what} accepted, but that was never sent")
        batch.answered = True

    # ---- jobs end ----------------------------------------------------------------------------------------------------

    def _take_out(self, first: int, count: int, how: str, may_be: str) -> None:
        """These jobs are not open any more."""
        end = first + count
        while first < end:
            batch = self._holding(first)
            if batch is None:
                next_open = min((one for one in self.open if one > first), default=end)
                stop = min(end, next_open)
                if first < self.next_job:
                    stop = min(stop, self.next_job)
                why = "had ended before" if first < self.next_job else "never sent"
                self._wrong(f"{Batch(first, stop - first)} {how}, but {why}")
                first = stop
                continue
            stop = min(end, batch.first + batch.count)
            if not (batch.answered or (batch.given_up and may_be == "given up")):
                self._wrong(f"{Batch(first, stop - first)} {how}, but {batch.state}")
            self._cut(batch, first, stop)
            self.run.counts[how] += stop - first
            first = stop

    def _cut(self, batch: Batch, first: int, end: int) -> None:
        """Take jobs out of a batch, and leave the rest."""
        del self.open[batch.first]
        for start, stop in ((batch.first, first), (end, batch.first + batch.count)):
            if start < stop:
                self.open[start] = replace(batch, first=start, count=stop - start, sent=[], earlier=[])

    def _check_turn(self, first: int, count: int) -> None:
        """Whether these jobs may end now."""
        if self.ordered and first != self.next_end:
            self._wrong(f"{Batch(first, count)} ended, but the run is ordered, and job {self.next_end} is the next one")
        self.next_end = first + count

    def _delivered(self, event: Event) -> None:
        for first, count in event["jobs"]:
            self._check_turn(first, count)
            self._take_out(first, count, "delivered", "")

    def _stored(self, event: Event) -> None:
        """Results of an earlier run, out of a journal."""
        for first, count in event["jobs"]:
            self._check_turn(first, count)
            if self._enter(Batch(first, count)) is None:
                self._wrong(f"{Batch(first, count)} delivered from the journal, but they were there before")
                continue
            del self.open[first]
            self.run.sent_jobs -= count
            self.run.counts["stored"] += count

    def _failed(self, event: Event) -> None:
        index, attempts = event["index"], len(event["attempts"])
        self._check_turn(index, 1)
        if attempts > self.most or (event["died"] is not None and attempts < self.most):
            self._wrong(f"job {index} failed after {attempts} attempts: max_attempts is {self.most}")
        self._take_out(index, 1, "failed", "given up")

    def _given_up(self, event: Event) -> None:
        batch = self._untouched(event)
        if batch is None:
            return
        if not self._has_failed(batch):
            self._wrong(f"{batch} given up with {batch.strikes} strikes: max_attempts is {self.most}")
        batch.given_up = True

    def _has_failed(self, batch: Batch) -> bool:
        """Whether it may be given up: too many strikes or dispatches; or one strike, if too few slaves were left meanwhile."""
        alone = self._is_alone() or self.alone_line >= batch.back_line
        return batch.strikes >= self.most or len(batch.sent) >= DISPATCHES_MOST or (alone and batch.strikes > 0)

    def _is_doomed(self, batch: Batch) -> bool:
        """Whether it may be given up or taken apart by now, which is told a little later."""
        return self._has_failed(batch) or (batch.count > 1 and 0 < batch.strikes == self.most - 1)

    def _apart(self, event: Event) -> None:
        batch = self._untouched(event)
        if batch is None:
            return
        del self.open[batch.first]
        for job in range(batch.first, batch.first + batch.count):
            self.open[job] = Batch(job, 1, batch.strikes)

    def _untouched(self, event: Event) -> Batch | None:
        """A batch that nobody works on, and that is given up or taken apart."""
        what = Batch(event["first"], event["count"])
        kind = {"given_up": "given up", "apart": "taken apart"}[event["e"]]
        batch = self.open.get(what.first)
        if batch is None or batch.count != what.count:
            self._wrong(f"{what} {kind}, but no such batch is open")
            return None
        if batch.answered or batch.given_up or batch.holder >= 0:
            self._wrong(f"{what} {kind}, but {batch.state}")
        if batch.strikes != event["strikes"]:
            self._wrong(f"{what} {kind} with {event['strikes']} strikes, but it was struck {batch.strikes} times")
        return batch

    def _again(self, event: Event) -> None:
        """The process that ran a job died: the job goes out again, by itself."""
        index = event["index"]
        batch = self._holding(index)
        if batch is None or not batch.answered:
            self._wrong(f"job {index} goes out again, but {'it had ended before' if batch is None else batch.state}")
            return
        self._cut(batch, index, index + 1)
        fresh = Batch(index, 1, batch.strikes + 1, earlier=batch.sent + batch.earlier if batch.count == 1 else [])
        if fresh.strikes != event["strikes"] or fresh.strikes >= self.most:
            told = f"it has {fresh.strikes}, and max_attempts is {self.most}"
            self._wrong(f"job {index} goes out again with {event['strikes']} strikes, but {told}")
        self.open[index] = fresh

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _end(self, event: Event) -> None:
        self.run.how, counters = event["how"], event["counters"]
        if self.run.how != "ok":
            return
        jobs = counters["jobs"]
        if jobs > self.next_job:
            self.unsent.append((self.next_job, jobs - self.next_job))
        elif jobs < self.next_job:
            self._wrong(f"the master counted {jobs} jobs, but jobs up to {self.next_job - 1} were sent")
        for name, kind in COUNTED.items():
            if name in counters and counters[name] != self.run.counts[kind]:
                self._wrong(f"the master counted {counters[name]} {name}, but there are {self.run.counts[kind]} lines of that")


def read(lines: Iterable[bytes]) -> Iterator[tuple[int, Event | None]]:
    """Yield the events with the numbers of their lines; None for one that is no event.

    Half a line is left by a run that was killed while it wrote: it is the last one of the file, or a new run begins behind it.
    """
    for number, line in enumerate(lines, 1):
        event = None
        with contextlib.suppress(ValueError):
            event = json.loads(line)
        yield number, event if isinstance(event, dict) and "e" in event and "t" in event else None


def check(lines: Iterable[bytes]) -> list[Run]:
    """Verify the runs of a history.

    Parameters
    ----------
    lines : iterable of bytes
        Of the file.

    Raises
    ------
    HistoryError
        If it is no history.
    """
    runs: list[Run] = []
    checker: Checker | None = None
    cut = 0
    for number, event in read(lines):
        begins = event is not None and event["e"] == "begin"
        if cut and not begins:
            raise HistoryError(f"line {cut} is no event of a history, and not the last one of a run")
        if event is None:
            cut = number
            continue
        try:
            if begins:
                _close(checker, cut, runs)
                cut = 0
                checker = Checker(number, event)
            elif checker is None:
                raise HistoryError(f"line {number} comes before the beginning of a run")
            else:
                checker.take(number, event)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise HistoryError(f"line {number} does not tell what it should: {type(error).__name__}: {error}") from error
    if checker is None:
        raise HistoryError("there is no run in it")
    _close(checker, cut, runs)
    return runs


def _close(checker: Checker | None, cut: int, runs: list[Run]) -> None:
    if checker is None:
        if cut:
            raise HistoryError(f"line {cut} is no event of a history")
        return
    checker.run.cut_line = cut
    runs.append(checker.close())


def check_file(path: str) -> list[Run]:
    """Verify the runs of the history in a file.

    Raises
    ------
    HistoryError
        If it cannot be read, or is no history.
    """
    try:
        with Path(path).open("rb") as file:
            return check(file)
    except OSError as error:
        raise HistoryError(f"cannot be read: {error.strerror}") from error

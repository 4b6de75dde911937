"""Who is alive: what the master makes of beats, of connections that end and of deadlines. It decides, and does nothing itself.

The rules it keeps:

- A connection that ends is a process that is gone: its rank is lost.
- A rank that said farewell will come to no run: it is lost to this one, unless it has left it in order.
- Silence proves nothing: a silent rank is suspected, and taken on again as soon as it is heard.
- A rank that beats but does not answer within the deadline of what it runs is suspected until it answers.
- Nobody is judged by a master that was away itself: first it reads what came in meanwhile (of beats the listener knows).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jd_hpc.beats import Listener

AWAY_S = 0.5
"""With longer between two ticks the master was busy elsewhere (a hook of the user's) ..."""
CATCH_UP_S = 0.2
"""... and then takes so long to read what waits before it judges."""
FAREWELL_S = 2.0
"""A rank that has left the program is not waited for; what it said to the run before that may still be on its way for so long."""
DEADLINE_CHECKS_S = 0.05
"""How often deadlines are looked at: it takes a walk through the ledger."""

ABSENT, UP, LOST, SUSPECT = range(4)
"""The scheduler's states of a slave."""


class Verdict(NamedTuple):
    """What became of a slave, and how that is known.

    Attributes
    ----------
    slave : int
        Its rank.
    what : str
        "gone": its process ended; "lost": it has not reported for work, and is silent, or it has left the program; "suspect": it is
        silent or late, and may come back; "back": it did.
    how : str
        For the log, and for the history of a job's attempts.
    """

    slave: int
    what: str
    how: str


class Watch:
    """Turns signs of life into verdicts.

    Parameters
    ----------
    scheduler : Scheduler
        Is asked only: who is up, who runs what.
    listener : Listener or None
        The side channel; without it there are only deadlines.
    liveness_timeout_s : float
        Silence after which a slave is suspected.
    job_timeout_s : float or None
        What one job may take; a batch may take as many times that as it has jobs.
    margin_s : float
        What the slave itself may need on top, when it is the one that ends such a job.
    """

    def __init__(
        self,
        scheduler: Any,
        listener: Listener | None,
        liveness_timeout_s: float,
        job_timeout_s: float | None = None,
        margin_s: float = 0.0,
    ) -> None:
        self._scheduler = scheduler
        self._listener = listener
        self._liveness_timeout_s = liveness_timeout_s
        self._job_timeout_s = job_timeout_s
        self._margin_s = margin_s
        self._last_tick: float | None = None
        self._judge_from = 0.0
        self._deadlines_from = 0.0
        self._running: dict[int, tuple[int, float]] = {}  # slave → (order of the batch that it runs, since when)
        self._silent: dict[int, float] = {}  # suspected for silence → since when
        self._left: dict[int, float] = {}  # said farewell to the program → known since
        self._overdue: dict[int, int] = {}  # suspected for its deadline → answers it had given by then

    def tick(self, now: float) -> list[Verdict]:
        """Tell what has changed, at the time `now` (monotonic, seconds). To be called every few ms."""
        verdicts: list[Verdict] = []
        away = self._last_tick is None or now - self._last_tick > AWAY_S
        self._last_tick = now
        if away:
            self._judge_from = now + CATCH_UP_S
        if self._listener is not None:
            self._hear(self._listener, now, verdicts)
        if self._job_timeout_s is not None and now >= self._deadlines_from:
            self._deadlines_from = now + DEADLINE_CHECKS_S
            self._check_deadlines(self._job_timeout_s, now, verdicts)
        return verdicts

    def _hear(self, listener: Listener, now: float, verdicts: list[Verdict]) -> None:
        for rank, kind in listener.poll(now):
            if kind in ("connected", "left"):
                continue
            how = "its connection ended: the process is gone" if kind == "closed" else f"its beats are no beats ({kind})"
            verdicts.append(Verdict(rank, "gone", how))
            self._silent.pop(rank, None)
            self._overdue.pop(rank, None)
        for rank in listener.left:
            since = self._left.setdefault(rank, now)
            if since < now - FAREWELL_S:
                self._left[rank] = math.inf
                verdicts.append(Verdict(rank, "lost", "it has left the program"))
        for rank in listener.silent(now, self._liveness_timeout_s):
            if rank not in self._silent:
                self._silent[rank] = now
                state = self._state_of(rank)
                if state in (UP, ABSENT):
                    what = "suspect" if state == UP else "lost"
                    verdicts.append(Verdict(rank, what, f"silent for {self._liveness_timeout_s:g} s"))
        for rank, since in list(self._silent.items()):
            heard = listener.last_heard(rank)
            if heard is not None and heard > since:
                del self._silent[rank]
                if self._state_of(rank) == SUSPECT and rank not in self._overdue:
                    verdicts.append(Verdict(rank, "back", "it is heard again"))

    def _state_of(self, rank: int) -> int:
        """The scheduler knows only the ranks that are used."""
        return self._scheduler.state_of_slave(rank) if rank <= self._scheduler.slave_count else ABSENT

    def _check_deadlines(self, job_timeout_s: float, now: float, verdicts: list[Verdict]) -> None:
        scheduler = self._scheduler
        heads: dict[int, tuple[int, int]] = {}
        for slot in range(scheduler.batch_count):
            slave = scheduler.holder(slot)
            if slave > 0:
                found = (scheduler.order(slot), slot)
                if slave not in heads or found < heads[slave]:
                    heads[slave] = found
        for slave, (order, slot) in heads.items():
            known = self._running.get(slave)
            if known is None or known[0] != order:
                self._running[slave] = (order, now)
            elif now - known[1] > job_timeout_s * scheduler.jobs(slot) + self._margin_s and now >= self._judge_from:
                verdicts.append(Verdict(slave, "suspect", f"over its deadline: job_timeout_s = {job_timeout_s:g}"))
                self._overdue[slave] = scheduler.answers(slave)
        for slave, answers in list(self._overdue.items()):
            if scheduler.answers(slave) != answers and slave not in self._silent:
                del self._overdue[slave]
                if scheduler.state_of_slave(slave) == SUSPECT:
                    verdicts.append(Verdict(slave, "back", "it has answered"))

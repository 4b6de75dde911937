"""When to stop giving out jobs: what the master makes of the end of the allocation and of signals. Pure state: no clock, no I/O.

The rules it keeps:

- Nothing goes out that would not end before the hard end, which is `margin_s` before the end of the allocation. A slave that holds
  a batch runs the next one after it; so, as the end comes near, slaves first get no second batch, and then none at all.
- Until something is learned about the jobs, they go out.
- A signal is final. What the clock says is not: with shorter jobs, or more time, jobs go out again while others still run.
- At the hard end, or when somebody insists, what still runs is cut off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from numbers import Real

from jd_hpc.errors import WalltimeError

GAIN = 1 / 16
"""What the newest job counts for in the averages; while there are fewer, they count alike."""
DEVIATIONS = 4
"""How many mean deviations above the mean a job is expected to take, as TCP does for its timeouts."""
ASK_EVERY_S = 5.0
"""How often the time left is asked for: it may be a function of the user's, and an allocation may be extended."""
LOOK_EVERY_S = 0.02
"""How often the clock is compared with what was learned."""
TERM_LIMIT_S = 20.0
"""SIGTERM is often followed by SIGKILL (Slurm: after 30 s, KillWait): what runs for longer after it is cut off."""

FORMATS = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})(?P<fraction>\.\d+)?")


def parse(text: str) -> float:
    """Return the seconds of a time as Slurm writes it: 90, MM:SS, H:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS.

    A number alone counts seconds, not minutes as in Slurm's own --time.

    Raises
    ------
    WalltimeError
        If it is none.
    """
    found = FORMATS.fullmatch(text.strip())
    if found is None:
        raise WalltimeError(f"{text!r} is no time. Cure: seconds, MM:SS, H:MM:SS or D-HH:MM:SS, such as 3:50:00")
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = [0, 0, *parts][-3:]
    return int(found["days"] or 0) * 86400 + hours * 3600 + minutes * 60 + seconds + float(found["fraction"] or 0)


class Pace:
    """How long a job takes, learned from those that ended.

    Attributes
    ----------
    count : int
        Samples so far.
    mean_s, deviation_s : float
        Moving averages of the duration of a job, and of how far the next one was from that, in seconds.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean_s = self.deviation_s = 0.0

    def learn(self, job_s: float) -> None:
        """A job took so long, in seconds; of a batch, on average."""
        self.count += 1
        gain = max(1 / self.count, GAIN)
        # nothing is known of the deviation after one job: assume half
        off_s = abs(job_s - self.mean_s) if self.count > 1 else job_s / 2
        self.mean_s += gain * (job_s - self.mean_s)
        self.deviation_s += gain * (off_s - self.deviation_s)

    @property
    def high_s(self) -> float:
        """What a job may well take, in seconds; 0 if nothing is known."""
        return self.mean_s + DEVIATIONS * self.deviation_s


class Walltime:
    """The end of the allocation.

    Parameters
    ----------
    left : callable
        Returns the seconds that are left; asked now and then.
    margin_s : float
        What is needed after the last job to deliver, to write and to part, in seconds.
    """

    def __init__(self, left: Callable[[], object], margin_s: float) -> None:
        self._left = left
        self._margin_s = margin_s
        self._ask_at = -math.inf
        self._hard_end_s = math.inf

    def hard_end_s(self, now: float) -> float:
        """Return when everything must have come in, by the same clock as `now`.

        Raises
        ------
        WalltimeError
            If the function fails, or gives no number.
        """
        if now >= self._ask_at:
            self._ask_at = now + ASK_EVERY_S
            try:
                left_s = self._left()
            except Exception as error:
                raise WalltimeError(f"the walltime function failed: {type(error).__name__}: {error}") from error
            if not isinstance(left_s, Real) or math.isnan(left_s):  # numpy's are some too
                raise WalltimeError(f"the walltime function returned {left_s!r}. Cure: return the seconds that are left, a number")
            self._hard_end_s = now + float(left_s) - self._margin_s
        return self._hard_end_s


class Drain:
    """Decides how many batches a slave may hold, and when the run is cut off.

    Parameters
    ----------
    grain, credit : int
        Jobs in a batch, and batches that a slave may hold while there is time.
    walltime : Walltime or None
        None: no end is known, and only signals count.

    Attributes
    ----------
    credit : int
        Batches that a slave may hold now; 0: nothing goes out.
    cut_off : bool
        What still runs is to be left alone.
    reason : str
        Why nothing goes out, in words.
    pace : Pace
        What was learned.
    """

    def __init__(self, grain: int, credit: int, walltime: Walltime | None) -> None:
        self._grain, self._most = grain, credit
        self._walltime = walltime
        self._hard_end_s = math.inf
        self._look_at = -math.inf
        self._told = ""
        self.credit = credit
        self.cut_off = False
        self.reason = ""
        self.pace = Pace()

    @property
    def is_clocked(self) -> bool:
        """Whether it matters how long jobs take."""
        return self._walltime is not None

    def ask(self, now: float, reason: str, limit_s: float = math.inf, at_once: bool = False) -> None:
        """Somebody asks to end the run: nothing more goes out, and in `limit_s`, or at once, what still runs is cut off."""
        if not self._told:
            self._told = reason
        self._hard_end_s = min(self._hard_end_s, now + limit_s)
        self.cut_off = self.cut_off or at_once
        self._look_at = -math.inf

    def tick(self, now: float, job_s: Iterable[float] = ()) -> int:
        """Learn from jobs that took so long, and return the credit at the time `now`. To be called every few ms.

        Raises
        ------
        WalltimeError
            See `Walltime.hard_end_s`.
        """
        for seconds in job_s:
            self.pace.learn(seconds)
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            self._look(now)
        return self.credit

    def stop_by_s(self, now: float, patience_s: float) -> float:
        """Return until when to wait for slaves that should leave: their jobs are cut off, or the hard end comes."""
        return now + patience_s if self.cut_off else max(now, self._end(now)) + patience_s

    def _end(self, now: float) -> float:
        return min(self._hard_end_s, math.inf if self._walltime is None else self._walltime.hard_end_s(now))

    def _look(self, now: float) -> None:
        left_s = self._end(now) - now
        batch_s = self._grain * self.pace.high_s
        self.credit = self._most
        if left_s <= 0 or self._told:
            self.credit = 0
        elif batch_s > 0 and left_s < self._most * batch_s:
            self.credit = int(left_s / batch_s)
        self.cut_off = self.cut_off or left_s <= 0
        if self._told:
            self.reason = self._told
        elif left_s <= 0:
            self.reason = "the time is over"
        elif self.credit == 0:
            jobs = "a job" if self._grain == 1 else f"{self._grain} jobs"
            self.reason = f"{left_s:.3g} s are left, and {jobs} may take {batch_s:.3g} s"

"""Signals in the middle of a run: Ctrl-C reaches the user's code, USR2 and TERM ask the run to drain.

The rules it keeps:

- Ctrl-C never comes between two ranks that are parting.
- A handler of the user's own stays in place, and means what the user wants.
- USR1 is never touched: Hydra sends it to all survivors when a rank dies.
- The handlers only take a note; master and slaves look at it every few ms, and between jobs.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self

from jd_hpc.errors import Unfinished
from jd_hpc.walltime import TERM_LIMIT_S, Drain

GIVE_UP_AFTER = 3
"""So many Ctrl-C while ranks part, and this one leaves without a goodbye."""
DRAINS = (signal.SIGUSR2, signal.SIGTERM)
AGAIN_S = 1.0
"""A second TERM within this time is the first one come twice: from Slurm, and passed on by the supervisor or the launcher."""


class Asked:
    """What signals have asked of this process, and no run has answered yet.

    Attributes
    ----------
    level : int
        0: nothing. 1: to drain. 2: to do so within TERM_LIMIT_S. 3: at once.
    number : int
        The signal that raised the level last.
    """

    def __init__(self) -> None:
        self.level = self.number = 0
        self._term_at = math.inf

    def hear(self, number: int, now: float) -> None:
        """A signal came in."""
        level = 1
        if number == signal.SIGTERM:
            level = 3 if now > self._term_at + AGAIN_S else 2
            self._term_at = min(now, self._term_at)
        if level > self.level:
            self.level, self.number = level, number

    def forget(self) -> None:
        """The run has ended because of it."""
        self.__init__()  # type: ignore[misc]

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take a note: the handler."""
        self.hear(number, time.monotonic())


def is_request(level: int, number: int) -> bool:
    """Tell whether this is what a signal can ask for."""
    return 1 <= level <= 3 and number in DRAINS


def pass_on(drain: Drain, now: float, level: int, number: int, rank: int) -> None:
    """Tell a drain what a signal at a rank asks for."""
    reason = f"{signal.Signals(number).name} at rank {rank}"
    drain.ask(now, reason, limit_s=math.inf if level < 2 else TERM_LIMIT_S, at_once=level > 2)


asked = Asked()
"""What this process was asked."""


def remember() -> None:
    """Have USR2 noted from now on: one that comes before a run, or between two, drains the next one."""
    if signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL:
        signal.signal(signal.SIGUSR2, asked.note)


def let_go() -> None:
    """At the end of the program a USR2 has nothing to drain, and must not kill this rank while it finalizes MPI.

    Python gives handlers of its own up before that; what is ignored stays so.
    """
    if signal.getsignal(signal.SIGUSR2) == asked.note:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class Notes:
    """While it is on, USR2 and TERM are noted.

    Where Python's own handlers are not in place, or outside the main thread, nothing is changed.
    """

    def __init__(self) -> None:
        self._ours: list[signal.Signals] = []

    def begin(self) -> None:
        """Note signals from now on."""
        if threading.current_thread() is threading.main_thread():
            self._ours = [number for number in DRAINS if signal.getsignal(number) is signal.SIG_DFL]
            for number in self._ours:
                signal.signal(number, asked.note)

    def end(self) -> None:
        """Let them have their usual effect again."""
        if threading.current_thread() is threading.main_thread():
            for number in self._ours:
                if signal.getsignal(number) == asked.note:  # a hook may have put its own there
                    signal.signal(number, signal.SIG_DFL)
            self._ours = []


class Drains:
    """Context of a run: USR2 and TERM are noted. Gives what they ask for; None to a run inside a hook or a job of another run."""

    _here = threading.local()  # depth: how many runs of this thread are inside each other
    _on: ClassVar[set[Drains]] = set()  # the outer ones, of all threads
    _answered = False  # one of them has ended because of what was asked

    def __init__(self) -> None:
        self._notes = Notes()

    @classmethod
    def is_inside(cls) -> bool:
        """Whether this thread is in a hook or a job of a run."""
        return getattr(cls._here, "depth", 0) > 0

    def __enter__(self) -> Asked | None:
        is_inside = self.is_inside()
        self._here.depth = getattr(self._here, "depth", 0) + 1
        if is_inside:
            return None
        self._on.add(self)
        self._notes.begin()
        return asked

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._here.depth -= 1
        self._notes.end()
        self._on.discard(self)
        Drains._answered = Drains._answered or isinstance(error, Unfinished)
        if Drains._answered and not self._on:  # a run of another thread may have to hear it yet
            Drains._answered = False
            asked.forget()


class Interrupts:
    """Context of a run: SIGINT raises KeyboardInterrupt as ever, but waits while `link.parting` is set.

    Where Python's own handler is not in place, or outside the main thread, nothing is changed.

    Parameters
    ----------
    link
        The core's master or slave. It sets `parting` itself when it leaves its loop, so that no signal can come in between; with
        `impatient` it leaves at once.
    """

    def __init__(self, link: Any) -> None:
        self._link = link
        self._held = 0
        self._ours = False

    def __enter__(self) -> Self:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._ours = True
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._link.parting:
            self._held += 1
            if self._held < GIVE_UP_AFTER:
                return
            self._link.impatient = True
        raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ours and signal.getsignal(signal.SIGINT) == self._handle:  # a hook may have put its own there
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._held and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt

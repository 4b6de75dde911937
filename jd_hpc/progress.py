"""How far a run is: a bar where there is a terminal, a line per minute where there is none. No MPI.

The rules it keeps:

- No job pays for it: it is given counters a few times a second.
- Whatever becomes of the run, the bar is closed, and what others write to stderr begins on a line of its own.
- A terminal that is gone ends the bar, not the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from operator import index
from types import TracebackType
from typing import Any, NamedTuple, Self, SupportsIndex, cast

from jd_hpc.errors import ProgressError

VARIABLE = "JD_HPC_PROGRESS"
BAR_EVERY_S = 0.2
LINE_EVERY_S = 60.0
MOST = 1 << 60
COLUMNS = 100


class Counts(NamedTuple):
    """Where a run is."""

    done: int
    """Jobs that ended: in `process_result`, or in `process_failure`."""
    failed: int
    """Those of them that failed."""
    busy: int
    """Slaves that hold jobs."""
    slaves: int
    """Slaves that are there."""


def wanted(option: bool | int | None) -> bool | int:
    """Return what the option says, or else the environment: False, True, or how many jobs there are.

    Raises
    ------
    TypeError, ValueError
        If it is none of these.
    """
    if option is None:
        text = os.environ.get(VARIABLE, "").strip()
        if not text.isdecimal() and text:
            raise ValueError(f"{VARIABLE}={text} is no number. Cure: 0 for no progress bar, 1 for one, or how many jobs there are")
        number = int(text or "0")
        return number > 0 if number < 2 else number
    if isinstance(option, bool):
        return option
    try:
        number = index(option)
    except TypeError as error:
        raise TypeError(f"progress = {option!r} is neither True nor False nor how many jobs there are") from error
    if not 0 <= number <= MOST:
        raise ValueError(f"progress = {number} is out of range: it is how many jobs there are")
    return number if number else False


class Progress:
    """Shows how far a run is. A context: at its end the bar is closed.

    Parameters
    ----------
    total_of : callable
        Returns how many jobs there are, or None if nobody knows; asked at every turn.
    """

    def __init__(self, total_of: Callable[[], int | None]) -> None:
        self._count_of = total_of
        self._next_s = 0.0
        self._bar: Any = None
        self._quiet: list[tuple[logging.Filterer, Callable[[logging.LogRecord], bool]]] = []
        self._line_s: float | None = None
        self._line_done = 0
        self._is_terminal = False
        self._is_over = False

    def __enter__(self) -> Self:
        """See where stderr goes.

        Raises
        ------
        ProgressError
            If it is a terminal, and there is no tqdm.
        """
        self._is_terminal = _is_terminal()
        if self._is_terminal:
            self._open_bar()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handler, clear in self._quiet:
            handler.removeFilter(clear)
        self._quiet.clear()
        with self._tolerant():
            if self._bar is not None:
                self._bar.close()
        self._bar = None
        self._is_over = True

    def tick(self, now: float, counts_of: Callable[[], tuple[int, int, int, int]], last: bool = False) -> None:
        """Show where the run is, at the time `now` (monotonic, seconds), if it is time for that. `last`: if there is a bar.

        `counts_of` returns what makes a `Counts`.
        """
        if self._is_over or (now < self._next_s and not last):
            return
        self._next_s = now + BAR_EVERY_S
        if self._bar is not None:
            with self._tolerant():
                self._draw(Counts(*counts_of()))
        elif not self._is_terminal:
            self._next_s = self._tell(now, counts_of)

    def _total_of(self) -> int | None:
        """How many jobs there are. What is no number was not meant for us."""
        try:
            return index(cast(SupportsIndex, self._count_of()))
        except TypeError:
            return None

    # ---- a bar -----------------------------------------------------------------------------------------------------

    def _open_bar(self) -> None:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ProgressError(
                'progress needs tqdm, which is not installed. Cure: pip install tqdm, or "jd_hpc[progress]"; or leave progress out'
            ) from error

        # tqdm would start a thread to watch over it, and jobs may fork
        Bar: Any = type("Bar", (tqdm,), {"monitor_interval": 0})  # noqa: N806
        Bar.set_lock(threading.RLock())  # else one that processes share
        with self._tolerant():
            width = {"dynamic_ncols": True} if _knows_its_width() else {"ncols": COLUMNS, "nrows": 2}
            self._bar = Bar(total=self._total_of(), file=sys.stderr, unit=" jobs", mininterval=0, miniters=1, leave=True, **width)
        for handler in _console_handlers():
            handler.addFilter(self._clear)
            self._quiet.append((handler, self._clear))

    def _clear(self, record: logging.LogRecord) -> bool:
        """A log line comes: take the bar away; it is drawn again at the next turn."""
        with self._tolerant():
            if self._bar is not None:
                self._bar.clear()
        return True

    def _draw(self, counts: Counts) -> None:
        bar = self._bar
        bar.total = self._total_of()
        bar.set_postfix_str(f"{counts.busy}/{counts.slaves} busy, {counts.failed} failed", refresh=False)
        if counts.done > bar.n:
            bar.update(counts.done - bar.n)
        else:
            bar.refresh()

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """A terminal that is gone, or a stderr that was closed, is no reason to end a run."""
        try:
            yield
        except (OSError, ValueError):
            self._bar = None
            self._is_over = True

    # ---- a line per minute -----------------------------------------------------------------------------------------

    def _tell(self, now: float, counts_of: Callable[[], tuple[int, int, int, int]]) -> float:
        """Print a line, but at the first turn; return when the next one is due."""
        if self._line_s is None:
            self._line_s = now
        elif now - self._line_s >= LINE_EVERY_S:
            counts = Counts(*counts_of())
            with self._tolerant():
                if sys.stderr is not None:  # print would take stdout
                    print(self._line(counts, now - self._line_s), file=sys.stderr, flush=True)
            self._line_s, self._line_done = now, counts.done
        return self._line_s + LINE_EVERY_S

    def _line(self, counts: Counts, seconds: float) -> str:
        total = self._total_of()
        rate = max(0.0, (counts.done - self._line_done) / seconds)
        left = ""
        if total is not None and rate > 0:
            left = f", {_clock((total - counts.done) / rate)} left"
        of_total = "" if total is None else f" of {total}"
        return (
            f"jd_hpc: {counts.done}{of_total} jobs done, {rate:.3g} jobs/s, {counts.busy} of {counts.slaves} slaves busy, "
            f"{counts.failed} failed{left}"
        )


def _clock(seconds: float) -> str:
    """Write a time as H:MM:SS."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, OSError, ValueError):  # there is none, or one that a program has made; or it is closed
        return False


def _knows_its_width() -> bool:
    """A terminal that a program has made may not."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (AttributeError, OSError, ValueError):
        return False


def _console_handlers() -> list[logging.Handler]:
    """Return the handlers that may write to this terminal."""
    ours, root = logging.getLogger("jd_hpc"), logging.getLogger()
    found: list[logging.Handler] = [
        handler
        for handler in [*ours.handlers, *root.handlers]
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stderr, sys.stdout)
    ]
    return found + ([logging.lastResort] if logging.lastResort is not None else [])

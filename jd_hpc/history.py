"""The history of a run: a file with one line of JSON per event, which ``jd-hpc check`` verifies (check.py).

The rules it keeps:

- Nothing is ever overwritten: a run is added to what the file holds. One run at a time writes to it.
- A file that cannot be opened is an error before the first job. A write that fails later ends the history, and not the run.
- What happens for every batch is put together by compiled code (_history.pyx), all else here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import sys
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from jd_hpc._history import Lines
from jd_hpc.errors import Failure, HistoryError, JobError

logger = logging.getLogger("jd_hpc")

VARIABLE = "JD_HPC_HISTORY"
FORMAT = 1
"""Raised when a line that was right before means something else; new kinds of events and new facts do not count."""
REASON_CHARACTERS = 500


def path_of(named: str | os.PathLike[str] | None) -> str:
    """Return the file that the option names, or else the environment; "" for none. ``{pid}`` stands for the process."""
    path = os.environ.get(VARIABLE, "") if named is None else os.fspath(named)
    return path.replace("{pid}", str(os.getpid()))


class History:
    """The lines of one run. A context: the run's end, however it comes, is its last line.

    Parameters
    ----------
    path : str
        "": no history.

    Attributes
    ----------
    lines : Lines
        Takes the events of every batch.
    counters : dict of str to int
        What the last line is to tell.
    how : str
        What it says of a run that raised nothing. "ok": every job has ended.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.lines = Lines()
        self.counters: dict[str, int] = {}
        self.how = "ok"
        self._file = -1
        self._told = False

    def begin(self, facts: dict[str, Any]) -> Self | None:
        """Open the file and write the first line; None if there is to be no history.

        Raises
        ------
        HistoryError
            If the file cannot be written, or another run writes to it.
        """
        if not self.path:
            return None
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._lock()
            self._end_cut_line()
            self.lines.start(self._file)
            now = datetime.now(UTC).isoformat()
            self._add("begin", format=FORMAT, wall=now, host=socket.gethostname(), pid=os.getpid(), program=sys.argv[0], **facts)
            if self.lines.trouble:
                raise OSError(self.lines.trouble, os.strerror(self.lines.trouble))
        except OSError as error:
            self._close()
            raise HistoryError(
                f"the history {self.path} cannot be written: {error.strerror}. Cure: name a file that can be, by history= or "
                f"{VARIABLE}, or none"
            ) from error
        return self

    def _lock(self) -> None:
        """Lines of two runs must not mix."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise HistoryError(
                f"another run writes to the history {self.path} now. Cure: a file for each: {{pid}} in its name is replaced by the "
                f"number of the process"
            ) from None
        except OSError:  # a file system without locks
            pass

    def _end_cut_line(self) -> None:
        """A run that was killed while it wrote has left half a line."""
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def event(self, name: str, **facts: Any) -> None:
        """Write an event of a rare kind, and all that waits, at once."""
        self._add(name, **facts)
        self.look_for_trouble()

    def failed(self, error: JobError) -> None:
        """Tell that a job goes to process_failure."""
        facts = {"error": error.type_name, "died": error.died, "attempts": error.attempts}
        self.event("failed", index=error.index, slave=error.slave, **facts)

    def _add(self, name: str, **facts: Any) -> None:
        tail = json.dumps(facts, separators=(",", ":"), default=str)[1:]
        self.lines.add(f'{name}"{"," if facts else ""}{tail}\n'.encode())

    def look_for_trouble(self) -> None:
        """Tell, once, if a write failed."""
        if self.lines.trouble and not self._told:
            self._told = True
            why = os.strerror(self.lines.trouble)
            logger.warning("The history %s ends here, and the run goes on: it cannot be written: %s", self.path, why)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file < 0:
            return
        how = self.how
        if error is not None:
            failure = Failure.of(error)
            how = f"{failure.type_name}: {failure.message}".partition("\n")[0][:REASON_CHARACTERS]
        self.event("end", how=how, counters=self.counters)
        self.lines.stop()
        self._close()

    def _close(self) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)  # a process that was forked meanwhile would hold it on
            os.close(self._file)
            self._file = -1

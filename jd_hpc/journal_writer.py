"""Writes a journal while a run is on.

The rules it keeps:

- All writing is done by one thread. The master only lays results down, so neither a slow disk nor a long hook is in the other's
  way, and a Ctrl-C never comes between two writes.
- What waits is written at least every FLUSH_S, and as soon as it is FLUSH_BYTES; each time as one block, then fsync (at full rate
  not after every block, but every FLUSH_S). So a process that dies loses at most FLUSH_S, and so does a machine, plus one fsync.
- Before every block: is the lock still ours, is the file as we left it? If not, nothing is written any more.
- What could not be written whole is cut off again. An error is told by the next call from the master, once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections import deque
from pathlib import Path

from jd_hpc.errors import JournalError, JournalHeldError, JournalMismatchError, JournalWriteError
from jd_hpc.journal_file import (
    OBJECT,
    OBJECTS,
    ROWS,
    VERSION,
    Facts,
    JournalReader,
    Piece,
    Table,
    beginning,
    encode_block,
    load,
)
from jd_hpc.journal_lock import RENEW_S, JournalLock

logger = logging.getLogger("jd_hpc")

FLUSH_S = 1.0
FLUSH_BYTES = 1 << 20
WAITING_MOST_BYTES = 1 << 25
"""With more than that laid down the master waits for the disk."""

Record = tuple[int, list[Piece]]
"""Count, and what goes into a block: indices, fingerprints, (lengths,) results."""


def new_facts(result: str, job: str, name: str, seed: int | None = None) -> Facts:
    """Return the facts of a journal that is made now, from the texts of its dtypes, the name of a class, and a seed."""
    return Facts(VERSION, result, job, name, time.strftime("%Y-%m-%d %H:%M:%S %z"), socket.gethostname(), seed)


class JournalWriter:
    """A journal that this process may write.

    Parameters
    ----------
    path : str
        The file. It is made if it is not there; its torn end is cut, if it has one.
    facts : Facts
        Whose results they are to be.

    Raises
    ------
    JournalHeldError
        If another process writes it.
    JournalMismatchError
        If it holds results of other dtypes.
    JournalFormatError
        If it is no journal, of a newer version, or damaged.
    JournalWriteError
        If there is no folder, no right or no room.

    Attributes
    ----------
    reader : JournalReader
        Reads what was there.
    """

    def __init__(self, path: str, facts: Facts) -> None:
        self.path = path
        self._waiting: deque[Record] = deque()
        self._given_bytes = 0  # only the master changes this one, and only the thread the next one
        self._taken_bytes = 0
        self._error: JournalError | None = None
        self._is_told = False
        self._stopping = False
        self._wake = threading.Event()
        self._taken = threading.Event()
        self._fd = -1
        self._end = self._synced = 0
        self._renewed_s = self._synced_s = time.monotonic()
        self._owner = threading.current_thread()
        if Path(path).exists() and not Path(path).is_file():  # /dev/null is as empty as a file that is to be made
            raise JournalWriteError(f"the journal {path} is no plain file, and left as it is; name another file, or none")
        self._lock = JournalLock(path)
        self._thread = threading.Thread(target=self._run, name="jd_hpc journal")
        self._thread.start()  # from now on the lock gives signs of life
        try:
            self.reader, self._table = self._open(facts)
        except BaseException:
            self.close()
            raise

    # ---- the file is opened --------------------------------------------------------------------------------------

    def _open(self, facts: Facts) -> tuple[JournalReader, Table]:
        kind = "opened"
        try:
            if not Path(self.path).exists() or Path(self.path).stat().st_size == 0:
                kind = "made"
                make_file(self.path, facts)
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except OSError as error:
            raise JournalWriteError(f"the journal {self.path} cannot be {kind}: {error.strerror}") from error
        reader = JournalReader(self.path, self._fd)
        self._compare(facts, reader.facts)
        table, end = load(reader)
        torn = os.fstat(self._fd).st_size - end
        if torn:
            logger.info("the journal %s ends in %d bytes that were not written to the end: they are cut off", self.path, torn)
            os.ftruncate(self._fd, end)
        self._end = end
        if kind == "opened":
            self._sync()
        return reader, table

    def _compare(self, mine: Facts, found: Facts) -> None:
        for what, here, there in (("results", mine.result, found.result), ("jobs", mine.job, found.job)):
            if here != there:
                raise JournalMismatchError(
                    f"the journal {self.path} belongs to other jobs: its {what} are {_plain(there)} ({found.name}, begun "
                    f"{found.created}), and those of {mine.name} are {_plain(here)}. Give this run a journal of its own"
                )
        if mine.seed != found.seed:
            raise JournalMismatchError(
                f"the journal {self.path} holds results of {_seeded(found.seed)} ({found.name}, begun {found.created}), and this "
                f"run has {_seeded(mine.seed)}: other numbers. Give this run a journal of its own, or the same rng and seed"
            )

    # ---- the master's side ---------------------------------------------------------------------------------------

    def take_table(self) -> Table:
        """Return what was there when the file was opened: the caller's from now on, since it may be large."""
        table, self._table = self._table, Table(False)
        return table

    def add(self, count: int, pieces: list[Piece]) -> None:
        """Lay down results: it is `Record`.

        Raises
        ------
        JournalError
            If an earlier one could not be written.
        """
        self._tell()
        self._waiting.append((count, pieces))
        self._given_bytes += sum(map(len, pieces))
        if self._given_bytes - self._taken_bytes >= FLUSH_BYTES:
            self._wake.set()
            while self._given_bytes - self._taken_bytes > WAITING_MOST_BYTES:
                self._taken.clear()
                self._taken.wait(0.1)
                self._tell()

    def _tell(self) -> None:
        if self._error is not None:
            self._is_told = True
            raise self._error

    def close(self) -> None:
        """Write what waits, and give the lock back.

        Raises
        ------
        JournalError
            If something could not be written, and `add` has not told of it.
        """
        self._stopping = True
        self._wake.set()
        self._thread.join()
        if not self._is_told:
            self._tell()

    # ---- the thread's side ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            stopping = False
            while not stopping:
                self._wake.wait(min(FLUSH_S, RENEW_S))
                self._wake.clear()
                stopping = self._stopping or not self._owner.is_alive()
                self._turn(stopping)
        finally:
            self._lock.release()
            if self._fd >= 0:
                os.close(self._fd)

    def _turn(self, last: bool) -> None:
        now = time.monotonic()
        if now - self._renewed_s >= RENEW_S:
            self._renewed_s = now
            self._lock.renew()
        if self._error is not None:
            return
        try:
            while self._waiting:
                self._write_waiting()
                if not last:  # at full rate there is always more: the lock must have its turn too
                    break
            if self._synced < self._end and (last or now - self._synced_s >= FLUSH_S):
                self._synced_s = now
                self._sync()
        except JournalError as error:
            self._error = error
        except BaseException as error:
            self._error = JournalWriteError(f"the journal {self.path} cannot be written: {type(error).__name__}: {error}")
            self._error.__cause__ = error
        if self._error is not None:
            self._waiting.clear()
        self._taken.set()

    def _write_waiting(self) -> None:
        count = taken = 0
        records = []
        while self._waiting and taken < FLUSH_BYTES:
            more, pieces = self._waiting.popleft()
            count += more
            taken += sum(map(len, pieces))
            records.append(pieces)
        # a large result is a block by itself, and not copied
        body = records[0] if len(records) == 1 else [b"".join(column) for column in zip(*records, strict=True)]
        self._write(encode_block(ROWS if len(body) == 3 else OBJECTS, count, body, self._synced))
        self._taken_bytes += taken
        if self._waiting:
            self._wake.set()

    def _write(self, pieces: list[Piece]) -> None:
        self._lock.check()
        state = os.fstat(self._fd)
        if state.st_nlink == 0:
            raise JournalWriteError(f"the journal {self.path} was removed while the run was on")
        if state.st_size != self._end:
            raise JournalHeldError(
                f"somebody else has changed the journal {self.path}: it has {state.st_size} bytes, and had {self._end} after the "
                f"last block. This process writes no more"
            )
        try:
            self._end += write_all(self._fd, pieces)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            raise self._refused(error) from error

    def _sync(self) -> None:
        end = self._end
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._refused(error) from error
        self._synced = end

    def _refused(self, error: OSError) -> JournalWriteError:
        return JournalWriteError(
            f"the journal {self.path} cannot be written any more: {error.strerror}. The {self._end} bytes that are there are kept; "
            f"make room (or raise the quota or limit), start the same script again, and it goes on from there"
        )


def _seeded(seed: int | None) -> str:
    return "no seed (no rng=True, or merged under other numbers)" if seed is None else f"seed {seed}"


def _plain(text: str) -> str:
    return "Python objects" if text == OBJECT else text


def make_file(path: str, facts: Facts) -> None:
    """Make a journal without results: under another name first, so that nobody ever finds a half of it."""
    new = f"{path}.{os.getpid()}.new"
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            write_all(fd, [beginning(facts)])
        finally:
            os.close(fd)
        Path(new).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(new).unlink()
        raise


def write_all(fd: int, pieces: list[Piece]) -> int:
    """Write these bytes, by one call of the system if it takes them all; return how many they are."""
    views = [memoryview(piece) for piece in pieces if len(piece)]
    total = 0
    while views:
        written = os.writev(fd, views)
        total += written
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if views:
            views[0] = views[0][written:]
    return total

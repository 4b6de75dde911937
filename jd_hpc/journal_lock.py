"""Who may write a journal: one process at a time, wherever it runs.

The rules it keeps:

- No flock and no fcntl locks, which NFS and Lustre mounts may not have. The lock is a file made by O_CREAT | O_EXCL.
- The file says who holds it, and holds a number that the holder counts up every second. A holder that can be seen to live (same
  machine) is never robbed, one that can be seen to be gone is robbed at once, of any other one the number decides.
- Of several that come to take over one wins: the old lock is renamed, and whoever finds something else in his hands than what he
  judged gives it back.
- A holder looks before it writes whether the lock is still its own. One that was robbed while it slept writes no more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any

from jd_hpc.errors import JournalHeldError, JournalWriteError

logger = logging.getLogger("jd_hpc")

RENEW_S = 1.0
"""How often the holder counts up."""
STILL_S = 10.0
"""A holder on another machine whose number stands still for so long is taken for dead."""
LOOK_S = 0.2
FILE_BYTES = 1024
"""Always the same: who reads while the number is written sees an old digit or a new one, and never a part."""
GAP_S = 0.05
"""For so long the file may be away, three times, while somebody gives back what he took."""


def _start_of(pid: int) -> str | None:
    """When a process of this machine was started, as the kernel counts; None if there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _process_space() -> str:
    """Name the machine since its start, and the space in which its process numbers are valid: the same text, the same processes."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _facts() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "space": _process_space(),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "user": os.environ.get("USER") or str(os.getuid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "token": secrets.token_hex(16),
    }


def _read(path: str) -> dict[str, Any] | None:
    """Read a lock; None if there is none. One that cannot be understood is {}: it was just made, or its maker died over it."""
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalWriteError(f"the lock {path} cannot be read: {error.strerror}") from error
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    return {}


def named(holder: dict[str, Any]) -> str:
    """Say who the holder is."""
    if not holder:
        return "a process that has not said its name"
    job = f", Slurm job {holder['slurm_job']}" if holder.get("slurm_job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')} (user {holder.get('user')}{job}) since {holder.get('since')}"


def holder_of(journal: str) -> str | None:
    """Say who holds the lock of a journal; None if nobody does."""
    holder = _read(f"{journal}.lock")
    return None if holder is None else named(holder)


class JournalLock:
    """The right to write a journal.

    Parameters
    ----------
    journal : str
        The file; the lock lies next to it and ends in ``.lock``.

    Raises
    ------
    JournalHeldError
        If somebody has it.
    JournalWriteError
        If it cannot be made.
    """

    def __init__(self, journal: str) -> None:
        self.journal = journal
        self.path = f"{journal}.lock"
        self._facts = _facts()
        self._number = 0
        was_held = False
        while not self._make():
            if (holder := _read(self.path)) is not None:
                was_held = True
                why = self._why_gone(holder)
                if why is not None and self._rob(holder):
                    logger.warning("the journal %s was held by %s: %s; it is taken over", journal, named(holder), why)
        if was_held:  # somebody who judged the same holder, but is slower, may take this lock for that one
            time.sleep(GAP_S)
            self.check()

    @property
    def token(self) -> str:
        """What is written in the lock and in no other one."""
        return str(self._facts["token"])

    def _text(self) -> bytes:
        # At the end, so that a long name cannot push it out of its place.
        text = json.dumps({**self._facts, "number": f"{self._number:012d}"})
        return text.encode().ljust(FILE_BYTES - 1) + b"\n"

    def _make(self) -> bool:
        """Make the lock, if there is none."""
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            folder = Path(self.path).parent
            raise JournalWriteError(f"the journal {self.journal} needs the folder {folder}, which is not there; make it") from error
        except OSError as error:
            raise JournalWriteError(
                f"the journal {self.journal} cannot be locked: {self.path}: {error.strerror}; its folder must be writable"
            ) from error
        try:
            os.write(fd, self._text())
            os.close(fd)  # some file systems write only now
        except OSError as error:
            Path(self.path).unlink()
            raise JournalWriteError(f"the lock {self.path} cannot be written: {error.strerror}") from error
        return True

    # ---- somebody else has it --------------------------------------------------------------------------------------

    def _why_gone(self, holder: dict[str, Any]) -> str | None:
        """Tell how it is known that the holder is gone; None if it has just left by itself.

        Raises
        ------
        JournalHeldError
            If it is there.
        """
        mine = self._facts
        if holder.get("space") and holder["space"] == mine["space"]:
            if holder["started"] is None or _start_of(holder["pid"]) != holder["started"]:
                return "that process is gone"
            raise self._held(holder)
        same_job = holder.get("slurm_job") and holder["slurm_job"] == mine["slurm_job"]
        if same_job and int(holder["slurm_restart"]) < int(mine["slurm_restart"]):
            return "that job was started again since"
        end = time.monotonic() + STILL_S
        while time.monotonic() < end:
            time.sleep(LOOK_S)
            now = _read(self.path)
            if now is None or now.get("token") != holder.get("token"):
                return None
            if now != holder:
                raise self._held(now)
        return f"it gave no sign of life for {STILL_S:g} s"

    def _held(self, holder: dict[str, Any]) -> JournalHeldError:
        return JournalHeldError(
            f"the journal {self.journal} is held by {named(holder)}, and has one writer at a time. Wait for that run or end it, or "
            f"give this one a journal of its own; `jd-hpc journal show` and `export` can read it now"
        )

    def _rob(self, holder: dict[str, Any]) -> bool:
        """Take away the lock that was judged, and only that one."""
        mine = f"{self.path}.{self.token}"
        if _read(self.path) != holder:
            return False
        try:
            Path(self.path).rename(mine)
        except FileNotFoundError:
            return False
        found = _read(mine) or {}
        if found.get("token") != holder.get("token"):
            with contextlib.suppress(OSError):  # a third one was quicker: the one whose lock this is will notice
                os.link(mine, self.path)
        Path(mine).unlink()
        return found.get("token") == holder.get("token")

    # ---- it is ours ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """See whether it still is.

        Raises
        ------
        JournalHeldError
            If somebody has taken it over.
        """
        for _ in range(3):
            found = _read(self.path)
            if found is not None:
                break
            time.sleep(GAP_S)
        if found is None or found.get("token") != self.token:
            by = "is gone: somebody has removed it" if found is None else f"was taken over by {named(found)}"
            raise JournalHeldError(
                f"the lock of the journal {self.journal} {by}, since this process gave no sign of life, or was believed dead. It "
                f"writes no more; what it wrote is kept"
            )

    def renew(self) -> None:
        """Give a sign of life. Nothing happens if the lock is not ours any more, or cannot be reached now."""
        self._number += 1
        with contextlib.suppress(OSError):
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                # whose lock the open file is cannot change any more
                if self.token.encode() in os.pread(fd, FILE_BYTES, 0):
                    os.pwrite(fd, self._text(), 0)
            finally:
                os.close(fd)

    def release(self) -> None:
        """Give it back."""
        with contextlib.suppress(JournalHeldError, OSError):
            self.check()
            Path(self.path).unlink()

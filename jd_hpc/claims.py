"""Which communicators of this process are in a run, and from which threads and processes a run may use MPI. No MPI of its own.

The rules it keeps:

- A communicator is in one run at a time. A second one would wait for ever for ranks that are busy with the first: it is refused.
- Outside the thread that initialized MPI a run needs MPI_THREAD_MULTIPLE; in a process that was forked from a rank there is no MPI.
"""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import Any, Self

from jd_hpc.errors import NestedRunError, ThreadLevelError

_lock = threading.Lock()
_claimed: dict[int, int] = {}  # a communicator's handle → the thread that has a run on it
_is_forked = False


def _note_fork() -> None:
    global _is_forked, _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    _is_forked = "mpi4py.MPI" in sys.modules


os.register_at_fork(after_in_child=_note_fork)


class Claim:
    """Context: the communicator is in a run of this thread, until `release` or the end.

    Parameters
    ----------
    mpi : module
        mpi4py.MPI.
    handle : int
        The user's communicator.

    Raises
    ------
    NestedRunError
        If it is in a run already, or this process was forked from a rank.
    ThreadLevelError
        If MPI does not allow calls from this thread.
    """

    def __init__(self, mpi: Any, handle: int) -> None:
        if _is_forked:
            raise NestedRunError(
                "run() was called on ranks of MPI in a process that was forked from one of them, where MPI cannot be used: a job "
                "under isolate=True, or multiprocessing. Cure: vm=None there, or isolate=False"
            )
        if mpi.Query_thread() < mpi.THREAD_MULTIPLE and not mpi.Is_thread_main():
            raise ThreadLevelError(
                "run() was called from another thread than the one that initialized MPI, and MPI was initialized without "
                "MPI_THREAD_MULTIPLE. Cure: call it from the main thread; or set mpi4py.rc.thread_level = 'multiple', the default, "
                "before mpi4py.MPI is imported"
            )
        with _lock:
            holder = _claimed.get(handle)
            if holder is None:
                _claimed[handle] = threading.get_ident()
        if holder is not None:
            whose = "this thread, in whose hook or job it was called" if holder == threading.get_ident() else "another thread"
            raise NestedRunError(
                f"run() was called on a communicator that is in a run of {whose}: its ranks cannot be in both. Cure: inside a hook "
                f"or a job use vm=None, MPI.COMM_SELF or a communicator of ranks that call run() there too; for runs at the same "
                f"time in several threads give each its own duplicate (comm.Dup(), made by all ranks before)"
            )
        self._handle: int | None = handle

    def release(self) -> None:
        """The ranks have left the run. A second call does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with _lock:
                del _claimed[handle]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

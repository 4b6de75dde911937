"""How a process leaves after a failure.

The rules it keeps:

1. Without a failure nothing differs: Python ends, mpi4py finalizes MPI.
2. After a failure nobody calls MPI_Finalize, which may wait for the dead for ever. Slaves leave by `_exit`; the master waits a
   bounded time for them, and then ends the run, stopped stragglers too, by MPI_Abort with the script's own exit code.
3. It is the last thing of all that Python does: threads are joined, and other atexit hooks have run. mpi4py finalizes even later
   (Py_AtExit); so our hook is registered as early as can be, which is when this module is imported.
4. What was printed, logged or written by C code is out before the process goes.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from jd_hpc import slurm, supervisor
from jd_hpc.errors import Unfinished

logger = logging.getLogger("jd_hpc")

UNFINISHED = Unfinished.CODE
"""The exit code of a run that was drained: start it again for the rest."""
GRACE_S = 5.0
"""How long the master waits for live slaves to leave, by default."""
ABORT_LIMIT_S = 20
"""An MPI_Abort that takes longer is cut off by SIGALRM."""
SHARED_MEMORY = ("mpich_shm_", "vader_segment.", "sm_segment.")
"""How the files begin that MPICH and Open MPI leave in /dev/shm when MPI is not finalized."""


class _Ending:
    """What is known about the end of this process."""

    why: str | None = None
    pid = 0  # a process forked later must not end the run
    others_gone: Callable[[], bool] | None = None
    grace_s = GRACE_S
    code: int | None = None
    was_drained = False
    parts: ClassVar[list[Callable[[], object]]] = []


def failed(why: str, others_gone: Callable[[], bool] | None = None, grace_s: float = GRACE_S) -> None:
    """Say that a rank was lost, or that the run cannot be finalized for another reason. From then on this process ends by `leave`.

    May be called again: the first reason stays, a new `others_gone` replaces the old one.

    Parameters
    ----------
    why : str
        For the master's last line.
    others_gone : callable, optional
        Master: returns True when all slaves that are still alive have left, so that nobody's work is cut off. It is called every
        5 ms, from the atexit hook. Without it the master does not wait.
    grace_s : float
        Master: wait for that no longer than this.
    """
    if _Ending.why is None:
        _Ending.why, _Ending.pid = why, os.getpid()
        _watch_sys_exit()
    if others_gone is not None:
        _Ending.others_gone, _Ending.grace_s = others_gone, grace_s


def why_failed() -> str | None:
    """Return what `failed` was told first, or None if all is well."""
    return _Ending.why


def exit_with(code: int) -> None:
    """Fix the exit code with which this process leaves after a failure.

    Not needed under ``python -m jd_hpc``, which knows it exactly. A plain script cannot see its own exit code in an atexit hook.
    What is known then: 1 after an uncaught exception, 130 after Ctrl-C, and what was given to `sys.exit` after the failure (also
    if somebody caught that SystemExit). Not known are ``raise SystemExit(code)``, ``exit(code)`` and a `sys.exit` that was
    imported by name: these leave with 0, or with UNFINISHED if a run was drained, if `exit_with` was not called.
    """
    _Ending.code = code


def drained() -> None:
    """Say that a run has raised `Unfinished`: a plain script of which nothing else is known then leaves with UNFINISHED."""
    _Ending.was_drained = True


def status_of(code: object) -> int:
    """Return the exit status that Python makes of the argument of `sys.exit`."""
    return 0 if code is None else code & 0xFF if isinstance(code, int) else 1


def leave(code: int) -> NoReturn:
    """End this process now, in the way that fits after a failure. No atexit hook runs any more.

    Rank 0 of COMM_WORLD waits for the others, as far as `failed` was told how, and ends the whole run by MPI_Abort; any other rank
    ends by itself, and its supervisor, with default flags, stays until rank 0 ends the run.

    Parameters
    ----------
    code : int
        The exit status, 0 to 255. mpiexec's own exit code is the one of rank 0, where its flags allow.
    """
    _flush()
    mpi = _live_mpi()
    if mpi is None:
        if code == 0 or _is_finalized():  # else the others wait for this rank in MPI_Init
            supervisor.say_in_order()
    elif mpi.COMM_WORLD.Get_rank() == 0 and mpi.COMM_WORLD.Get_size() > 1:
        _abort(mpi, code)
    else:
        remove_shared_memory("mpich_shm_")  # every rank of a node has it mapped since MPI_Init
        slurm.leave_pmix()
        if mpi.COMM_WORLD.Get_size() == 1:  # nobody's end is bound to ours, whatever the launcher believes
            supervisor.say_in_order()
    os._exit(code)


def remove_shared_memory(*prefixes: str) -> None:
    """Unlink the MPI's files in /dev/shm that this process has mapped, and that begin like this (default: all kinds)."""
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.parent == Path("/dev/shm") and path.name.startswith(prefixes or SHARED_MEMORY):
            path.unlink(missing_ok=True)


def _abort(mpi: Any, code: int) -> None:
    all_gone = _wait_for_others()
    if all_gone and slurm.started_by_srun():
        remove_shared_memory()
        slurm.leave_pmix()
        supervisor.say_in_order()
        os._exit(code)
    logger.info("ends by MPI_Abort with exit code %d, whatever MPI calls it: %s", code, _Ending.why)
    _flush()
    remove_shared_memory()
    slurm.note_exit_code(code)
    supervisor.say_aborts()
    if code and supervisor.passes_code_on():
        os._exit(code)
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(ABORT_LIMIT_S)
    mpi.COMM_WORLD.Abort(code)


def _wait_for_others() -> bool:
    """Wait for those that are still at work, for a bounded time, and tell whether all have left."""
    end = time.monotonic() + _Ending.grace_s
    if _Ending.others_gone is not None:
        # A question that raises has no answer: MPI may be in any state now.
        with contextlib.suppress(Exception):
            while not (gone := _Ending.others_gone()) and time.monotonic() < end:
                time.sleep(0.005)
            return gone
    return False


def _live_mpi() -> Any:
    """Return mpi4py.MPI if MPI is initialized and not finalized."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else None


def _is_finalized() -> bool:
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.Is_finalized()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(Exception):
            if stream is not None:
                stream.flush()
    with contextlib.suppress(Exception):
        logging.shutdown()
    ctypes.CDLL(None).fflush(None)  # what C code has printed


def _watch_sys_exit() -> None:
    """Note what `sys.exit` is called with: nothing else of it is left when atexit hooks run."""
    original = sys.exit

    def exit_and_note(code: Any = None, /) -> NoReturn:
        _Ending.code = status_of(code)
        original(code)

    sys.exit = exit_and_note


def _code_of_script() -> int:
    if _Ending.code is not None:
        return _Ending.code
    error = getattr(sys, "last_value", None)  # Python's own note of an uncaught exception
    if error is None:
        return UNFINISHED if _Ending.was_drained else 0
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def before_end(part: Callable[[], object]) -> None:
    """Have `part` called at the end of the program, while MPI is still there and nothing has failed: it may call `failed`."""
    _Ending.parts.append(part)


def _at_exit() -> None:
    while _Ending.why is None and _live_mpi() is not None and _Ending.parts:
        _Ending.parts.pop()()
    if _Ending.why is None or _is_finalized():
        supervisor.say_in_order()
    elif _Ending.pid == os.getpid():
        leave(_code_of_script())


atexit.register(_at_exit)

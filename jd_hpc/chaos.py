"""Faults on demand: what may happen to a rank, done to it on purpose, so that users can see what their own class survives.

``python -m jd_hpc --chaos "kill=2,stop=1,seed=7" script.py`` does so many of each kind, to different slaves, at times drawn from
the seed; the same spec does the same to the same ranks. `KINDS` has the kinds; ``within=`` says in how many seconds all of it
happens (default 5), ``pause=`` how long the pauses are (default 3).
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from jd_hpc.errors import ChaosError

VARIABLE = "JD_HPC_CHAOS"
"""The environment variable by which ``python -m jd_hpc --chaos`` tells the ranks."""
FOR_EVER_S = 3600


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _segv() -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    ctypes.string_at(0)


def _raise() -> None:
    raise ChaosError


def _raise_in_main_thread() -> None:
    """Have the main thread raise it, in the Python code that it runs next."""
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(ChaosError))


def _stop(pause_s: float) -> None:
    """Stop this process, and have another one continue it."""
    subprocess.Popen(["/bin/sh", "-c", f"sleep {pause_s}; kill -CONT {os.getpid()}"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def _hold(seconds: float) -> None:
    """Hold the GIL."""
    ctypes.PyDLL(None).sleep(ctypes.c_uint(int(seconds)))


def _compute(seconds: float) -> None:
    """Stay in C code, without the GIL."""
    ctypes.CDLL(None).usleep(ctypes.c_uint(int(seconds * 1e6)))


def _eat() -> None:
    """Take memory, without end."""
    eaten = []
    while True:
        eaten.append(b"x" * (1 << 26))


KINDS: dict[str, Callable[[float], object]] = {
    "kill": lambda pause_s: _kill(),
    "segv": lambda pause_s: _segv(),
    "exit0": lambda pause_s: os._exit(0),
    "exit3": lambda pause_s: os._exit(3),
    "raise": lambda pause_s: _raise(),
    "stop": _stop,
    "freeze": lambda pause_s: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda pause_s: _hold(FOR_EVER_S),
    "hold": _hold,
    "compute": _compute,
    "eat": lambda pause_s: _eat(),
}
"""What can be done to a process.

``kill``, ``segv``, ``exit0`` and ``exit3`` end it; ``freeze`` stops it and ``hang`` holds the GIL, both for ever. ``stop``,
``hold`` (of the GIL) and ``compute`` (without the GIL) end after a pause. ``eat`` takes all memory, and wants a memory limit.
``raise`` is an exception that nobody expects: by ``--chaos`` it comes in whatever Python code the main thread runs next, mostly
a job.

:meta hide-value:
"""


def strike(kind: str, pause_s: float = 3.0) -> None:
    """Do it to this process, now.

    Raises
    ------
    ValueError
        If there is no such kind.
    ChaosError
        That is the fault called ``raise``.
    """
    if kind not in KINDS:
        raise ValueError(f"no fault {kind!r}: it is one of {', '.join(KINDS)}")
    KINDS[kind](pause_s)


class Chaos(NamedTuple):
    """How many faults of each kind, when, and from which seed."""

    faults: tuple[str, ...]
    seed: int
    within_s: float
    pause_s: float

    @classmethod
    def parse(cls, spec: str) -> Chaos:
        """Read ``kind=count,...``; ``seed=``, ``within=`` (seconds, default 5) and ``pause=`` (default 3) are no kinds.

        Raises
        ------
        ValueError
            If it cannot be understood, with what can be.
        """
        faults: list[str] = []
        settings = {"seed": 0.0, "within": 5.0, "pause": 3.0}
        for part in spec.split(","):
            name, _, value = part.strip().partition("=")
            try:
                number = float(value)
                if name in settings:
                    settings[name] = number
                    continue
                if name not in KINDS or not number.is_integer() or not 0 <= number <= 1000:
                    raise ValueError
            except ValueError:
                raise ValueError(
                    f"chaos: cannot understand {part!r} in {spec!r}; it is kind=count, with the kinds {', '.join(KINDS)}, and "
                    f"seed=, within= and pause= (seconds)"
                ) from None
            faults += [name] * int(number)
        return cls(tuple(faults), int(settings["seed"]), settings["within"], settings["pause"])

    def fate(self, rank: int, size: int) -> tuple[str, float] | None:
        """Return what happens to a rank, and after how many seconds: every rank works out the same lot. Never to the master."""
        chance = random.Random(self.seed)
        slaves = list(range(1, size))
        chance.shuffle(slaves)
        for fault, slave in zip(self.faults, slaves, strict=False):
            after_s = chance.uniform(0, self.within_s)
            if slave == rank:
                return fault, after_s
        return None

    def arm(self, rank: int, size: int) -> None:
        """Have this rank meet its fate, in a thread."""
        fate = self.fate(rank, size)
        if fate is not None:
            threading.Thread(target=self._meet, args=(rank, *fate), daemon=True).start()

    def _meet(self, rank: int, kind: str, after_s: float) -> None:
        time.sleep(after_s)
        print(f"jd_hpc chaos: {kind} of rank {rank} after {after_s:.2f} s", file=sys.stderr, flush=True)
        if kind == "raise":
            _raise_in_main_thread()  # here it would harm nobody
        else:
            strike(kind, self.pause_s)


_armed = False


def arm_from_environment(rank: int, size: int) -> None:
    """Arm this rank, once, if ``--chaos`` asked for it."""
    global _armed
    if VARIABLE in os.environ and not _armed:
        _armed = True
        Chaos.parse(os.environ[VARIABLE]).arm(rank, size)

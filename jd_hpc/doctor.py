"""``jd-hpc doctor``: what is here, and what this place survives.

The rules it keeps: it says in plain words what it saw, not what should be; whatever it starts has a limit of time and carries a
mark in its environment, by which what outlives it is found and ended, and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from jd_hpc import __version__, launch
from jd_hpc.errors import LaunchError
from jd_hpc.machine import FAMILIES

MARK = "JD_HPC_DOCTOR"
LIMIT_S = 60.0
"""A trial that takes longer has failed."""


class Ended(NamedTuple):
    """What became of a command.

    Attributes
    ----------
    code : int or None
        Its exit code; None if it had to be ended.
    out, err : str
        What it printed.
    seconds : float
        How long it took.
    """

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def answer(self) -> dict[str, Any]:
        """The line of JSON that it printed, or nothing."""
        for line in self.out.splitlines():
            with contextlib.suppress(ValueError):
                if line.startswith("{"):
                    answer = json.loads(line)
                    assert isinstance(answer, dict)
                    return answer
        return {}


def run_bounded(command: list[str], limit_s: float = LIMIT_S, **settings: str) -> Ended:
    """Run a command in a session of its own; after the limit end it and all that it started."""
    mark = uuid.uuid4().hex
    begin = time.monotonic()
    process = subprocess.Popen(
        command, env={**os.environ, **settings, MARK: mark}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    code = None
    try:
        out, err = process.communicate(timeout=limit_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        process.terminate()  # mpiexec then ends its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        _end_all(mark)
        out, err = process.communicate()
    finally:
        _end_all(mark)
    return Ended(code, out, err, time.monotonic() - begin)


def _end_all(mark: str) -> None:
    sought = f"{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
            if entry.name.isdigit() and sought in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


def examine(mpiexec: str, rank_count: int) -> int:
    """Print what is found here, try what it survives, and return 0 if ``jd-hpc launch`` works and survives a killed slave."""
    _say("python", f"{platform.python_version()} ({sys.executable})")
    _say("jd_hpc", __version__)
    try:
        launcher = launch.identify(mpiexec)
    except LaunchError as error:
        _say("launcher", str(error))
        return 1
    _say("launcher", str(launcher))
    cores = launch.core_count()
    added = launch.flags(launcher, rank_count, os.environ, [], cores)
    _say("cores", f"{cores}, for {rank_count} ranks" + (": more ranks than cores" if rank_count > cores else ""))
    _say("flags", f"jd-hpc launch adds: {shlex.join(added)}")
    if not _look_at_mpi(launcher, rank_count, added):
        return 1
    if rank_count < 3:
        _say("trial", "none: it takes a slave to kill and another to survive: jd-hpc doctor -n 4")
        return 0
    return _try_deaths(launcher, rank_count, added)


def _look_at_mpi(launcher: launch.Launcher, rank_count: int, added: list[str]) -> bool:
    """Start all ranks and let MPI tell what it is; return whether it works."""
    seen = run_bounded(launch.command_line(launcher, rank_count, [], ["-m", "jd_hpc.trial", "facts"], added))
    answer = seen.answer or run_bounded([sys.executable, "-m", "jd_hpc.trial", "facts"]).answer  # then at least one rank alone
    if not answer:
        _say("mpi4py", f"cannot start MPI. {seen.err.strip()[-800:]}")
        return False
    _say("mpi4py", f"runs on {answer['vendor']} {answer['version']}, threads: {answer['thread']}, ULFM: {_yes(answer['ulfm'])}")
    family = FAMILIES.get(answer["vendor"], "mpich")
    fits = family == launcher.family
    _say(
        "fit", "launcher and MPI belong together" if fits else f"NO: the launcher is of {launcher.family}, mpi4py runs on {family}"
    )
    core = any(Path(__file__).parent.glob(f"_core_{family}.*"))
    _say("core", f"compiled for {family}" if core else f"NONE for {family}: rebuild jd_hpc with this MPI's mpicc")
    size = seen.answer.get("size")
    if size == rank_count and seen.code == 0:
        _say("ranks", f"MPI sees {size} of {rank_count}")
        return fits and core
    if size is not None and size < rank_count:
        _say("ranks", f"MPI sees {size} of {rank_count}: silent singletons. Cure: the launcher that belongs to the MPI of mpi4py")
    else:
        _say("ranks", f"{rank_count} could not be started (exit code {seen.code}). {_words_of(seen.err)}{_hint(seen.err)}")
    return False


def _try_deaths(launcher: launch.Launcher, rank_count: int, added: list[str]) -> int:
    """Kill a slave, under the plain launcher and under ours, and say what happened."""
    # What a launch cannot do without here is given to the plain one as well: the question is who dies, not who starts.
    plain = [word for word in added if word in ("--map-by", ":OVERSUBSCRIBE", "--oversubscribe")]
    good = True
    for name, words in (("plain mpiexec, python -m jd_hpc", plain), ("jd-hpc launch", added)):
        ended = run_bounded(launch.command_line(launcher, rank_count, [], ["-m", "jd_hpc.trial", "SIGKILL"], words))
        survived = ended.answer.get("finished") == rank_count - 2
        good = survived and ended.code == 0
        code = "it had to be ended" if ended.code is None else f"{_yes(ended.code == 0)} ({ended.code})"
        _say("killed slave", f"{name}: survivors went on: {_yes(survived)}; exit code right: {code}; {ended.seconds:.1f} s")
        if not survived and ended.err:
            _say("", _words_of(ended.err))
    if good:
        _say("so", f"start with: jd-hpc launch -n {rank_count} script.py")
    else:
        _say("so", "start with what survived above, if anything did; judge a run by its results, not by mpiexec's exit code alone")
    return 0 if good else 1


def _say(what: str, text: str) -> None:
    print(f"{what + ':' if what else '':14}{text}", flush=True)


def _yes(answer: Any) -> str:
    return "yes" if answer else "no"


def _words_of(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if re.search(r"[A-Za-z]", line)]
    return " / ".join(lines)[:400]


def _hint(text: str) -> str:
    if "run as root" in text.lower() or "running as root" in text.lower():
        return " Cure, if you mean it: OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    return ""

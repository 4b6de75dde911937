"""The cluster, and its users: one for each MPI family, with that family's Python.

JD_HPC_SLURM_PYTHONS names the interpreters, separated by spaces; without it they are the environments that make sets up.
JD_HPC_SLURM=required: it is a failure, and no reason to skip, if there can be no cluster here, or an environment is missing.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cluster import Cluster, why_not
from slurm_helpers import FAMILIES, PROJECT, User, refuse

ASK = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.get_vendor()[0])"


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

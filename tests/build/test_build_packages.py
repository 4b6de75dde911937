"""What a build makes is complete and runs where it is installed."""

from __future__ import annotations

import os
import sys
import tarfile
import time
import zipfile
from pathlib import Path

from build_helpers import FAMILIES, PROJECT, SMOKE, copy_of_the_tree, run

PACKAGE_SOURCES = {
    str(path.relative_to(PROJECT))
    for end in ("*.py", "*.pyx", "*.pxd", "*.pxi", "*.pyi", "py.typed")
    for path in (PROJECT / "jd_hpc").rglob(end)
}
TEMPLATES = {f"jd_hpc/templates/{path.name}" for path in (PROJECT / "slurm").glob("*.sbatch")}


def assert_core_loads(environment: Path, family: str, cwd: Path):
    """Load the core on two ranks of the environment's own MPI."""
    bin_folder = environment / "bin"
    mpiexec = [bin_folder / "mpiexec", "-n", "2"]
    said = run([*mpiexec, bin_folder / "python", "-c", SMOKE], cwd, timeout_s=60).stdout
    assert said.count(f"_core_{family}") == 2, said


def test_sdist_is_complete(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = PACKAGE_SOURCES | TEMPLATES | {f"slurm/{Path(name).name}" for name in TEMPLATES}
    needed |= {"pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "Makefile", ".ci/run"}
    assert needed - names == set()
    assert not [name for name in names if name.endswith((".so", ".c")) and name.startswith("jd_hpc/")]


def test_wheel_holds_stubs_and_declarations_but_no_generated_source(wheel, family):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in PACKAGE_SOURCES | TEMPLATES if not name.endswith((".pyx", ".pxi"))} - names == set()
    cores = [name for name in names if name.startswith("jd_hpc/_core_") and name.endswith(".so")]
    assert len(cores) == 1
    assert cores[0].startswith(f"jd_hpc/_core_{family}.")
    assert not [name for name in names if name.endswith((".c", ".pyx", ".pxi"))]


def test_wheel_runs_in_a_fresh_environment(wheel, family, environments, tmp_path):
    fresh = environments[family]
    run([fresh / "bin/pip", "install", "-q", f"jd_hpc[{family}] @ {wheel.as_uri()}"], tmp_path)
    assert_core_loads(fresh, family, tmp_path)
    rendered = run([fresh / "bin/jd-hpc", "slurm", "render", "--nodes", "7"], tmp_path).stdout
    assert "#SBATCH --nodes=7 " in rendered
    run([fresh / "bin/pip", "uninstall", "-q", "-y", "jd_hpc"], tmp_path)


def test_one_tree_serves_two_environments(environments, tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree")
    editable = ["install", "-q", "--no-build-isolation", "--no-deps", "--editable", tree]
    for family in FAMILIES:
        run([environments[family] / "bin/pip", *editable], tmp_path, CFLAGS="-O0")
    for family in FAMILIES:
        assert len(list((tree / "jd_hpc").glob(f"_core_{family}.*.so"))) == 1
        assert_core_loads(environments[family], family, tmp_path)
    assert list((tree / "jd_hpc").glob("*.c")) == []


def test_core_older_than_the_sources_is_removed(tmp_path):
    # After a change one environment is built anew. The other's core would meet a scheduler that it was not made for.
    tree = copy_of_the_tree(tmp_path / "tree")
    stale, fresh, source = (tree / "jd_hpc" / name for name in ("_core_openmpi.so", "_core_mpich.so", "scheduler.pxd"))
    stale.touch()
    source.touch()  # so that its time is not the one that was copied
    fresh.touch()
    os.utime(stale, (time.time() - 60,) * 2)
    call = "import runpy; runpy.run_path('setup.py')['BuildExt'].remove_stale_cores(None)"
    run([sys.executable, "-c", call, "--version"], tree)
    assert fresh.exists()
    assert not stale.exists()

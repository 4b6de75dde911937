# make demo | test | test-slurm | soak | chaos | lint | docs | bench | wheel | clean | distclean     MPI=openmpi (the default) or MPI=mpich
#
# Nothing need be there but make, a C compiler and a Python >= 3.11 with its headers (PYTHON=... names another one).
# The MPI comes as a wheel into an environment of its own: .venv for the default family, .venv-<family> for the other.

DEFAULT_MPI := openmpi
MPI         ?= $(DEFAULT_MPI)
PYTHON      ?= python3

ifeq ($(filter $(MPI),openmpi mpich),)
  $(error MPI=$(MPI): it is openmpi or mpich)
endif

VENV    := .venv$(if $(filter-out $(DEFAULT_MPI),$(MPI)),-$(MPI))
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check
MPIEXEC := timeout -k 10 600 $(BIN)/mpiexec

# The environment's own mpicc compiles and its own mpi4py runs, whatever else the shell is set up for.
unexport MPICC PYTHONPATH PYTHONHOME MPI4PY_MPIABI MPI4PY_LIBMPI
export MPI VENV DEFAULT_MPI

ifeq ($(MPI),openmpi)
  # More ranks than cores, and root in a container: Open MPI wants to be told. MPICH does not mind.
  export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
  ifeq ($(shell id -u),0)
    export OMPI_ALLOW_RUN_AS_ROOT := 1
    export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
  endif
endif

# What an environment is made from. A change of any of these installs anew; pure Python needs no new install.
SOURCES := pyproject.toml setup.py jd_hpc/scheduler.py $(wildcard jd_hpc/*.pyx jd_hpc/*.pxd jd_hpc/*.pxi)

.PHONY: demo test test-slurm soak chaos lint docs bench wheel clean distclean
.DELETE_ON_ERROR:

# dev contains example.
demo: $(firstword $(wildcard $(VENV)/.made-dev) $(VENV)/.made-example)
	$(MPIEXEC) -n 4 $(BIN)/python examples/sunspots.py

test: $(VENV)/.made-dev
	bash .ci/test

# On a real Slurm of four nodes on this machine, for each family whose environment is there. Needs root, and Slurm: see .ci/slurm.
test-slurm: $(VENV)/.made-dev
	bash .ci/slurm

# A million random schedules with faults. SOAK="--seed 17 --count 1" replays one.
soak: $(VENV)/.made-dev
	$(BIN)/python tests/sim/soak.py $(SOAK)

# 500 runs in which ranks meet a fault. CHAOS="--runs 20 --seed 7 --only kill,stop" chooses.
chaos: $(VENV)/.made-dev
	$(BIN)/python tests/launch/chaos_runs.py $(CHAOS)

lint: $(VENV)/.made-dev
	$(BIN)/ruff check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cython-lint jd_hpc
	$(BIN)/mypy
	bash .ci/stubtest

# The site, in build/docs. Warnings are errors, and nothing is fetched.
docs: $(VENV)/.made-dev
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/docs

bench: $(VENV)/.made-dev
	$(BIN)/python benchmarks/run.py

# Other than pip, build runs setup.py in an environment of its own, where there is no mpicc.
wheel: $(VENV)/.made-dev
	MPICC="$(CURDIR)/$(BIN)/mpicc" $(BIN)/python -m build --outdir dist

# The MPI goes in first: its mpicc compiles the core that the second pip installs.
$(VENV)/.made-%: $(VENV)/.made $(SOURCES)
	$(PIP) install --quiet --editable ".[$*]"
	touch $@

$(VENV)/.made:
	@command -v cc >/dev/null || { echo "No C compiler. On Debian: apt install gcc libc6-dev" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(PYTHON) is missing or older than 3.11. Name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	    { echo "$(PYTHON) cannot make environments. On Debian: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
	    { echo "$(PYTHON) has no C headers. On Debian: apt install python3-dev" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(MPI)
	touch $@

clean:
	rm -rf build dist *.egg-info jd_hpc/*.so .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f .venv/.made-* .venv-*/.made-*
	find jd_hpc tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-*

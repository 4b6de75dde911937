"""The vm: what a user may pass, and what is found out about the launch and the MPI."""

from __future__ import annotations

import importlib
import socket

import pytest

from jd_hpc import FamilyError, JobDispatcher, LaunchError, LocalMachine, MPIMachine, machine
from jd_hpc.machine import FAMILIES, Channel, as_machine, check_launch, load_core

LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """The tests run alone, whatever started them."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def mpi():
    return pytest.importorskip("mpi4py.MPI")


# ---- launches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "cause"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "4 processes .*Open MPI's mpiexec.* started a program of another MPI"),
        ({"PMI_SIZE": "8"}, "8 processes .*MPICH's mpiexec, or srun --mpi=pmi2"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "2 processes .*srun --mpi=pmi2 for MPICH.* --mpi=pmix for Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, "4 processes .*Open MPI's mpiexec"),
        ({"PMI_SIZE": "8", "SLURM_STEP_NUM_TASKS": "8"}, "8 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "3"}, "3 processes"),
    ],
)
def test_silent_singletons_are_refused(environ, cause):
    cures = "use the .* that belongs to the MPI of mpi4py|srun --mpi=pmi2 or --mpi=pmix.*jd-hpc slurm env"
    with pytest.raises(LaunchError, match=f"{cause}.*Cure: ({cures})"):
        check_launch(1, environ | {"PATH": "/bin"})


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_SIZE": "1"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "4"},  # sbatch -n 4, and no srun
        {
            "OMPI_COMM_WORLD_SIZE": "1",
            "SLURM_STEP_NUM_TASKS": "4",
        },  # mpiexec -n 1 under its daemons, which srun started
        {"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"},
    ],
)
def test_one_process_may_be_alone(environ):
    check_launch(1, environ)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ranks_that_see_each_other_are_fine(name):
    check_launch(4, {name: "4"})


def test_a_launch_is_checked_when_the_machine_is_made(mpi, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "4")
    with pytest.raises(LaunchError, match="4 processes were launched, but MPI sees only this one"):
        MPIMachine(mpi.COMM_WORLD)
    with pytest.raises(LaunchError):
        JobDispatcher(mpi.COMM_SELF)


# ---- machines ------------------------------------------------------------------------------------------------------


def test_local_machine():
    here = LocalMachine()
    assert (here.is_master, here.rank, here.size, here.slots, here.free_slots) == (True, 0, 1, 1, 1)
    assert here.hosts == {socket.gethostname(): [0]}


def test_as_machine(mpi):
    assert isinstance(as_machine(None), LocalMachine)
    here = LocalMachine()
    assert as_machine(here) is here
    there = as_machine(mpi.COMM_SELF)
    assert isinstance(there, MPIMachine)
    assert as_machine(there) is there
    assert JobDispatcher(there).machine is there


@pytest.mark.parametrize("vm", [4, "world", object(), [0, 1], MPIMachine])
def test_what_is_no_vm_is_refused(mpi, vm):
    with pytest.raises(
        LaunchError, match=r"is no communicator of ranks; pass an intracommunicator such as .*, or vm=None"
    ):
        as_machine(vm)
    with pytest.raises(LaunchError):
        JobDispatcher(vm)


def test_communicators_of_no_use_are_refused(mpi):
    with pytest.raises(LaunchError, match="is no communicator"):
        as_machine(mpi.COMM_NULL)


def test_a_machine_of_one_rank(mpi):
    comm = mpi.COMM_SELF.Dup()
    here = MPIMachine(comm)
    assert (here.is_master, here.rank, here.size, here.slots, here.free_slots) == (True, 0, 1, 1, 1)
    assert here.hosts == {mpi.Get_processor_name(): [0]}
    here.busy = lambda: 1
    assert here.free_slots == 0
    comm.Free()


class Counts(JobDispatcher):
    def reset(self):
        self.todo = [1, 2, 3]

    def next_job(self):
        return self.todo.pop() if self.todo else None

    def process_job(self, job):
        return job * job

    def process_result(self, index, job, result):
        self.last = job, result

    def postprocess(self):
        return self.last


def test_a_communicator_of_one_rank_runs_the_jobs_here(mpi):
    assert Counts(mpi.COMM_SELF).run() == (1, 1)
    assert Counts(MPIMachine(mpi.COMM_SELF), min_slaves=2, max_slaves=7).run() == (1, 1)


def test_a_communicator_has_one_channel_and_frees_it(mpi):
    comm = mpi.COMM_SELF.Dup()
    channel = MPIMachine(comm).channel()
    assert Channel.of(comm) is channel
    assert MPIMachine(comm).channel() is channel
    assert channel.comm != comm
    assert channel.comm.Get_errhandler() == mpi.ERRORS_RETURN
    assert channel.handle == mpi._handleof(channel.comm) != 0
    assert (channel.next_run(), channel.next_run()) == (1, 2)
    other = mpi.COMM_SELF.Dup()
    assert MPIMachine(other).channel() is not channel
    assert MPIMachine(other).channel().next_run() == 1
    comm.Free()
    assert channel.comm == mpi.COMM_NULL
    other.Free()


# ---- the compiled core ---------------------------------------------------------------------------------------------


def test_load_core_finds_the_family(mpi):
    core = load_core()
    assert core.__name__ == f"jd_hpc._core_{FAMILIES[mpi.get_vendor()[0]]}"
    assert core is load_core()
    assert core.Master
    assert core.Slave


@pytest.mark.parametrize(
    ("files", "has"),
    [
        (["_batch.so"], "no compiled core"),
        (["_core_mpich.so"], "a compiled core only for mpich"),
        (["_core_mpich.so", "_core_other.so", "_core_other.cpython.so"], "a compiled core only for mpich and other"),
    ],
)
def test_a_missing_core_names_cause_and_cure(mpi, monkeypatch, tmp_path, files, has):
    def import_module(name):
        raise ImportError(f"there is no {name}")

    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(mpi, "get_vendor", lambda: ("Open MPI", (5, 0, 11)))
    with pytest.raises(FamilyError) as caught:
        load_core()
    text = str(caught.value)
    assert text.startswith(f"mpi4py runs on Open MPI 5.0.11 (family openmpi), but jd_hpc has {has} in this environment")
    assert "there is no jd_hpc._core_openmpi" in text
    assert "Cure: build jd_hpc with that MPI's mpicc" in text
    assert "MPICC=/path/to/mpicc pip install" in text
    assert isinstance(caught.value.__cause__, ImportError)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize(("vendor", "family"), [*FAMILIES.items(), ("Something New", "mpich")])
def test_the_core_asked_for_is_that_of_the_vendor(mpi, monkeypatch, vendor, family):
    asked = []
    monkeypatch.setattr(mpi, "get_vendor", lambda: (vendor, (1, 2, 3)))
    monkeypatch.setattr(importlib, "import_module", lambda name: asked.append(name))
    load_core()
    assert asked == [f"jd_hpc._core_{family}"]

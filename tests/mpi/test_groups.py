"""Slaves of several ranks: every rank of a group runs the job, on the group's own communicator. With 1, 2, 4, 5 and 7 ranks."""

from __future__ import annotations

import time

import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import Sweep, Tolerant, check_healthy, error_of, everywhere, run, value_of

from jd_hpc import GroupError, JobError, MPIMachine, SlaveError

pytestmark = pytest.mark.mpi


@pytest.fixture(params=[1, 2, 3])
def machine(comm, request):
    """Groups of so many ranks; what is left is idle."""
    return MPIMachine(comm, request.param, leave_rest_idle=True)


def width(machine):
    """How many ranks run a job: on a machine without a whole group it is the master alone."""
    return machine.ranks_per_slave if machine.slaves else 1


class Sums(Sweep):
    """Adds up over the group, by MPI."""

    def process_job(self, job):
        rank, size = self.comm.rank, self.comm.size
        ranks = self.comm.allgather(MPI.COMM_WORLD.rank)
        total = self.comm.allreduce(int(job) * (rank + 1))
        if rank:
            time.sleep(0.001)  # the first rank is ahead, but not by a job
            return "what the others return does not count"
        return total, size, ranks

    def process_result(self, index, job, result):
        super().process_result(index, job, result[0])
        self.teams.add(tuple(result[2]))
        assert result[1] == width(self.machine)

    def reset(self):
        super().reset()
        self.teams = set()

    def postprocess(self):
        return self.results, self.teams


def test_all_ranks_of_a_group_run_the_job(comm, machine):
    factor = sum(range(1, width(machine) + 1))
    dispatcher = Sums(range(30), machine)
    for _ in range(3):
        results, teams = value_of(dispatcher, comm)
        assert results == {n: factor * n for n in range(30)}
    groups = [tuple(ranks) for ranks in machine.groups]
    assert teams <= set(groups or [(0,)])
    assert len(teams) == len(groups) or len(groups) == 0
    assert comm.allgather(groups) == [groups] * comm.size
    assert len({rank for ranks in groups for rank in ranks}) == len(groups) * machine.ranks_per_slave
    assert (machine.slaves, machine.slots) == (len(groups), max(1, len(groups)))
    check_healthy(comm)


def test_several_machines_of_one_communicator(comm):
    for ranks_per_slave in (2, 1, 3, 2):
        machine = MPIMachine(comm, ranks_per_slave, leave_rest_idle=True)
        assert sorted(rank for ranks in machine.hosts.values() for rank in ranks) == list(range(comm.size))
        results, _ = value_of(Sums(range(5), machine), comm)
        assert len(results) == 5


def test_communicators_of_groups_do_not_leak(world):
    for _ in range(40):
        comm = world.Dup()
        value = Sums(range(3), MPIMachine(comm, 2, leave_rest_idle=True)).run()
        with everywhere(world):
            assert (value is None) == (comm.rank > 0)
        comm.Free()
    check_healthy(world)


def test_rows(comm, machine):
    class Dots(Sweep):
        job_dtype = ("f8", 4000)
        result_dtype = ("f8", 2)

        def process_job(self, job):
            assert not job.flags.writeable
            return self.comm.allreduce(float(job.sum())), self.comm.allreduce(1.0)

    results, failures = value_of(Dots([np.full(4000, float(n)) for n in range(8)], machine), comm)
    assert failures == {}
    assert {n: tuple(result) for n, result in results.items()} == {n: (4000 * n * width(machine), width(machine)) for n in range(8)}
    check_healthy(comm)


def test_jobs_that_are_objects_may_be_written_to_on_all_ranks(comm, machine):
    class Doubles(Sweep):
        def process_job(self, job):
            job *= 2
            return self.comm.allreduce(float(job.sum()))

    results, failures = value_of(Doubles([np.full(4, float(n)) for n in range(8)], machine), comm)
    assert failures == {}
    assert results == {n: 8 * n * width(machine) for n in range(8)}
    check_healthy(comm)


def test_shared_data_and_hooks_on_all_ranks(comm, machine):
    class Shares(Sweep):
        def on_startup(self):
            self.started = True

        def shared(self):
            return np.arange(50_000)

        def process_job(self, job):
            return self.comm.allreduce(int(self.shared[job]) * self.started)

        def on_shutdown(self):
            self.ended = True

    dispatcher = Shares(range(5), machine)
    assert value_of(dispatcher, comm)[0] == {n: n * width(machine) for n in range(5)}
    with everywhere(comm):
        assert dispatcher.ended


def test_slaves_are_numbered_from_1(comm, machine):
    seen = []
    dispatcher = Sums(range(12), machine)
    dispatcher.on_slave_started = seen.append
    value_of(dispatcher, comm)
    seen = comm.bcast(seen)
    assert seen or not machine.slaves  # one that starts late may find all done
    assert set(seen) <= set(range(1, machine.slaves + 1))


def test_fewer_groups_than_there_are(comm):
    machine = MPIMachine(comm, 2, leave_rest_idle=True)
    _, teams = value_of(Sums(range(6), machine, max_slaves=1), comm)
    assert len(teams) == 1
    dispatcher = Sweep(range(6), machine, min_slaves=99)  # too few: the master works itself
    dispatcher.shared = lambda: 7
    dispatcher.process_job = lambda job: dispatcher.comm.size * dispatcher.shared
    assert set(value_of(dispatcher, comm)[0].values()) == {7}
    check_healthy(comm)


@pytest.mark.parametrize("where", ["first", "last", "all"])
def test_an_exception_on_any_rank_is_the_jobs_failure(comm, machine, where):
    class Fails(Tolerant):
        def process_job(self, job):
            total = self.comm.allreduce(job)
            at = {"first": 0, "last": self.comm.size - 1, "all": self.comm.rank}[where]
            if job % 3 == 1 and self.comm.rank == at:
                raise ValueError(f"job {job} fails")
            return total

    for _ in range(2):
        results, failures = value_of(Fails(range(9), machine), comm)
        assert results == {n: n * width(machine) for n in range(9) if n % 3 != 1}
        assert sorted(failures) == [1, 4, 7]
        for index, error in failures.items():
            assert error.type_name == "ValueError"
            assert f"job {index} fails" in error.message
            assert "in process_job" in error.remote_traceback
            if width(machine) > 1:
                assert f"(rank {(width(machine) - 1) * (where == 'last')} of {width(machine)} of the group" in error.message
    check_healthy(comm)


def test_a_failure_ends_the_run_by_default(comm, machine):
    class Fails(Sweep):
        def process_job(self, job):
            raise ValueError("all ranks do")

    error = error_of(Fails(range(9), machine), comm)
    assert isinstance(error, JobError)
    check_healthy(comm)
    assert len(value_of(Sums(range(9), machine), comm)[0]) == 9


def test_a_rank_that_cannot_start(comm):
    machine = MPIMachine(comm, 2, leave_rest_idle=True)
    if not machine.slaves:
        return

    class Fails(Sums):
        def on_startup(self):
            if self.machine.rank == machine.groups[0][1]:
                raise OSError("no licence")

    outcomes = run(Fails(range(9), machine), comm)
    assert isinstance(outcomes[0].error, SlaveError)
    assert "no licence" in str(outcomes[0].error)
    check_healthy(comm)


# ---- what is refused --------------------------------------------------------------------------------------------------


def test_ranks_left_over(comm):
    rest = (comm.size - 1) % 2
    if rest:
        with pytest.raises(GroupError, match=f"make {(comm.size - 1) // 2} groups of 2 and leave 1. Cure: start {comm.size - 1}"):
            MPIMachine(comm, 2)
    else:
        assert MPIMachine(comm, 2).slaves == (comm.size - 1) // 2
    for wrong in (0, -1, 1.5, "2"):
        with pytest.raises(GroupError, match="out of range"):
            MPIMachine(comm, wrong)


class InBlocks(Sums):
    def process_jobs(self, jobs, results):
        raise AssertionError


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [(Sums, {"isolate": True}, "isolate"), (Sums, {"grain": 2}, "grain"), (InBlocks, {}, "process_jobs")],
)
def test_what_groups_cannot_do(comm, kind, options, word):
    machine = MPIMachine(comm, 2, leave_rest_idle=True)
    if comm.size == 1:
        return
    outcomes = run(kind(range(3), machine, **options), comm)
    for outcome in outcomes:
        assert isinstance(outcome.error, GroupError), outcome
        assert word in str(outcome.error)
        assert "Cure: " in str(outcome.error)
    check_healthy(comm)


def test_the_communicator_of_a_slave_that_is_one_rank(comm):
    dispatcher = Sweep(range(5), comm)
    dispatcher.process_job = lambda job: dispatcher.comm.allreduce(job)
    assert value_of(dispatcher, comm)[0] == {n: n for n in range(5)}
    with everywhere(comm):
        assert dispatcher.comm == MPI.COMM_SELF
        assert Sweep([1]).comm == MPI.COMM_SELF

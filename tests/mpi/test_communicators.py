"""Which ranks take part: communicators of every making, several dispatchers on one, and the user's own messages."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import Sweep, check_healthy, everywhere, same, until, value_of

from jd_hpc import JobError, LaunchError, MPIMachine

pytestmark = pytest.mark.mpi


class Ranks(Sweep):
    """Which world ranks ran jobs."""

    def process_job(self, job):
        return job, MPI.COMM_WORLD.rank

    def process_result(self, index, job, result):
        assert result[0] == job
        self.results[index] = result[1]

    def postprocess(self):
        return MPI.COMM_WORLD.rank, set(self.results.values()), len(self.results)


def test_world(world):
    master, ran, count = value_of(Ranks(range(50), world), world)
    assert (master, count) == (0, 50)
    assert ran <= (set(range(1, world.size)) or {0})
    check_healthy(world)


def test_reversed_ranks(world):
    """The master is rank 0 of the communicator, wherever that is in the world."""
    comm = world.Split(0, -world.rank)
    try:
        master, ran, count = value_of(Ranks(range(50), comm), comm)
        assert (master, count) == (world.size - 1, 50)
        assert ran <= (set(range(world.size - 1)) or {0})
        check_healthy(comm)
    finally:
        comm.Free()


def test_two_halves_at_the_same_time(world):
    for _ in range(5):
        half = world.Split(world.rank % 2, world.rank)
        try:
            value = Ranks(range(40 + world.rank % 2), half).run()
            with everywhere(world):
                assert (value is None) == (half.rank > 0)
                if value is not None:
                    assert value[0] == world.rank
                    assert {rank % 2 for rank in value[1]} == {world.rank % 2}
                    assert value[2] == 40 + world.rank % 2
            check_healthy(half, 100.0 * (world.rank % 2))
        finally:
            half.Free()


def test_some_ranks_do_not_take_part(world):
    color = 0 if world.rank < max(1, world.size - 1) else MPI.UNDEFINED
    comm = world.Split(color)
    if comm == MPI.COMM_NULL:
        with everywhere(world), pytest.raises(LaunchError, match="no communicator of ranks"):
            Ranks([1], comm)
        return
    with everywhere(world):
        value = Ranks(range(10), comm).run()
        assert (value is not None) == (comm.rank == 0)
    comm.Free()


def test_every_rank_alone(world):
    """A communicator of one rank is a local run, on every rank at the same time."""
    with everywhere(world):
        for comm in (MPI.COMM_SELF, world.Split(world.rank)):
            assert Ranks(range(20), comm).run() == (world.rank, {world.rank}, 20)
            assert Ranks(range(20), MPIMachine(comm)).run() == (world.rank, {world.rank}, 20)
            assert list(MPIMachine(comm).hosts.values()) == [[0]]
            if comm != MPI.COMM_SELF:
                comm.Free()


def test_a_run_within_a_job(comm):
    """A job, and a hook of the master, may use a dispatcher of their own."""

    class Outer(Sweep):
        def process_job(self, job):
            inner = Sweep(range(job), MPI.COMM_SELF if job % 2 else None).run()
            return sum(inner[0].values())

        def process_result(self, index, job, result):
            assert Sweep(range(3), MPI.COMM_SELF).run()[0] == {0: 0, 1: 1, 2: 2}
            super().process_result(index, job, result)

    assert value_of(Outer(range(20), comm), comm)[0] == {n: n * (n - 1) // 2 for n in range(20)}


def test_cartesian_and_other_intracommunicators(comm):
    cartesian = comm.Create_cart([comm.size])
    group = comm.Get_group()
    created = comm.Create(group)
    for other in (cartesian, created):
        master, _, count = value_of(Ranks(range(20), other), comm)
        assert (master, count) == (0, 20)
        other.Free()
    group.Free()


def test_two_dispatchers_take_turns(comm):
    one, other = Ranks(range(10), comm), Sweep([np.arange(3000)] * 7, comm, grain=2)
    machine = MPIMachine(comm)
    third = Ranks(range(5), machine, max_slaves=1)
    fourth = Ranks(range(6), machine)
    for _ in range(5):
        assert value_of(one, comm)[2] == 10
        results, _ = value_of(other, comm)
        assert all(same(result, np.arange(3000)) for result in results.values())
        assert value_of(third, comm)[2] == 5
        assert value_of(fourth, comm)[2] == 6


def test_dispatchers_on_two_communicators(comm):
    second = comm.Dup()
    dispatchers = [Ranks(range(10), comm), Ranks(range(11), second), Ranks(range(12), comm.Split(0, -comm.rank))]
    reverse = dispatchers[2].machine.comm
    for _ in range(3):
        for dispatcher, where, count in zip(dispatchers, (comm, second, reverse), (10, 11, 12), strict=True):
            assert value_of(dispatcher, where)[2] == count
    second.Free()
    assert value_of(dispatchers[0], comm)[2] == 10
    reverse.Free()


def test_a_duplicate_of_a_used_communicator(comm):
    value_of(Ranks(range(10), comm), comm)
    duplicate = comm.Dup()
    value_of(Ranks(range(10), duplicate), duplicate)
    value_of(Ranks(range(10), comm), comm)
    duplicate.Free()
    value_of(Ranks(range(10), comm), comm)


def test_communicators_do_not_leak(world):
    """Ours goes with the user's: neither they nor what is made of them run out."""
    for i in range(300):
        comm = world.Dup()
        if i % 4 == 0:
            value = Ranks(range(3), comm).run()
            assert (value is not None) == (comm.rank == 0)
        else:
            hosts = MPIMachine(comm).hosts
            assert sorted(rank for ranks in hosts.values() for rank in ranks) == list(range(comm.size))
        ours = MPIMachine(comm).channel().comm
        assert ours not in (MPI.COMM_NULL, comm)
        comm.Free()
        assert ours == MPI.COMM_NULL
    check_healthy(world)


def test_freed_after_a_failed_run(world):
    class Fails(Sweep):
        def process_job(self, job):
            raise ValueError("fails")

    for _ in range(100):
        comm = world.Dup()
        failed = False
        try:
            Fails([np.zeros(500)], comm).run()
        except JobError:
            failed = True
        assert failed == (comm.rank == 0)
        comm.Free()
    check_healthy(world)


# ---- the user's own messages ------------------------------------------------------------------------------------------

TAGS = [0, 1, 2, 16, 17, 1039]


@pytest.mark.parametrize("large", [False, True])
def test_messages_received_after_the_run(world, large):
    """Sent before the run, with tags as ours, and received afterwards: they are still there."""
    length = 300_000 if large else 10
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    sends = [world.Isend(np.full(length, 10 * world.rank + i), dest=right, tag=tag) for i, tag in enumerate(TAGS)]
    value_of(Ranks(range(100), world, grain=3), world)
    check_healthy(world)
    with everywhere(world):
        for i, tag in enumerate(TAGS):
            received = np.zeros(length, int)
            world.Recv(received, source=left, tag=tag)
            assert (received == 10 * left + i).all()
    MPI.Request.Waitall(sends)


@pytest.mark.parametrize("large", [False, True])
def test_receives_posted_before_the_run(world, large):
    """For any source and any tag: the run does not match them."""
    length = 300_000 if large else 10
    right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    buffers = [np.full(length, -1) for _ in TAGS]
    receives = [world.Irecv(buffer, source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG) for buffer in buffers]
    value_of(Ranks(range(100), world, grain=3), world)
    check_healthy(world)
    with everywhere(world):
        assert not any(request.Test() for request in receives)
        assert all((buffer == -1).all() for buffer in buffers)
    for i, tag in enumerate(TAGS):
        world.Send(np.full(length, 10 * world.rank + i), dest=right, tag=tag)
    with everywhere(world):
        for i, (request, buffer) in enumerate(zip(receives, buffers, strict=True)):
            status = MPI.Status()
            request.Wait(status)
            assert status.Get_source() == left
            assert status.Get_tag() == TAGS[i]
            assert (buffer == 10 * left + i).all()


def test_messages_during_the_run(comm):
    """Jobs and hooks may send and receive on the communicator as they like."""

    class Talks(Sweep):
        def process_job(self, job):
            self.sends.append(comm.isend(("news", job), dest=0, tag=1))
            return job

        def process_result(self, index, job, result):
            super().process_result(index, job, result)
            self.news.append(comm.recv(source=MPI.ANY_SOURCE, tag=1)[1])

        def on_startup(self):
            self.sends, self.news = [], []

        def next_job(self):
            assert self.machine.size > 1 or not comm.iprobe(source=MPI.ANY_SOURCE, tag=16)
            return super().next_job()

        def postprocess(self):
            assert not comm.iprobe(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)
            return sorted(self.news)

    dispatcher = Talks(range(60), comm, credit=3)
    assert value_of(dispatcher, comm) == list(range(60))
    MPI.Request.waitall(dispatcher.sends)


def test_collectives_between_runs(comm):
    dispatcher = Ranks(range(5), comm)
    for i in range(20):
        request = comm.Ibarrier()
        assert comm.allreduce(i) == i * comm.size
        value_of(dispatcher, comm)
        until(request.Test)


# ---- what is no vm -----------------------------------------------------------------------------------------------------


def test_wrong_vm(comm):
    freed = comm.Dup()
    freed.Free()
    for vm in (MPI.COMM_NULL, freed, "world", 0, 4, [comm], comm.Get_rank, object(), MPI):
        with pytest.raises(LaunchError, match="no communicator of ranks"):
            Sweep([1], vm)
        with pytest.raises(LaunchError, match="vm=None"):
            MPIMachine(vm)


def test_intercommunicator_is_refused(comm):
    if comm.size == 1:
        return
    half = comm.Split(comm.rank % 2)
    inter = half.Create_intercomm(0, comm, 1 - comm.rank % 2)
    with everywhere(comm), pytest.raises(LaunchError, match="intracommunicator"):
        Sweep([1], inter)
    inter.Free()
    half.Free()


def test_hosts(comm):
    names = comm.allgather(MPI.Get_processor_name())
    found = MPIMachine(comm).hosts
    expected = {name: [rank for rank, other in enumerate(names) if other == name] for name in names}
    assert comm.allgather(found) == [expected] * comm.size

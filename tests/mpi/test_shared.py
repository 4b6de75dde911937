"""shared(): what it returns on the master is there on every slave before its first job, once per host."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI
from mpi_helpers import Sweep, check_healthy, error_of, everywhere, run, value_of

from jd_hpc import MPIMachine, PayloadError, RanksDisagreeError, SlaveError
from jd_hpc.sharing import MAPPED_FROM_BYTES, Memory

pytestmark = pytest.mark.mpi

SMALL, MIDDLE, LARGE = 20, 5000, MAPPED_FROM_BYTES // 4
"""Numbers of 8 bytes: within a message, with a body, in memory that can be mapped."""


def mapped_bytes():
    """Return the bytes of shared data that this process has mapped."""
    return sum(
        int(ends[1], 16) - int(ends[0], 16)
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "memfd:jd_hpc" in line
        for ends in [line.split()[0].split("-")]
    )


class Table(Sweep):
    """Jobs are places of a table that all share."""

    def __init__(self, length, vm, **options):
        super().__init__(range(10), vm, **options)
        self.length, self.round = length, 0

    def shared(self):
        self.round += 1
        return {"table": np.arange(self.length) * self.round, "name": "table"}

    def process_job(self, job):
        table = self.shared["table"]
        return int(table[job + 7]), table.flags.writeable, self.shared["name"], mapped_bytes()

    def postprocess(self):
        mine = self.shared["table"]
        return self.results, int(mine[-1]), mine.flags.writeable


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("length", [SMALL, MIDDLE, LARGE])
def test_every_slave_has_it(comm, length, isolate):
    dispatcher = Table(length, comm, isolate=isolate)
    for turn in (1, 2, 3):  # a fresh one in every run
        results, last, writeable = value_of(dispatcher, comm)
        assert {index: result[0] for index, result in results.items()} == {n: (n + 7) * turn for n in range(10)}
        assert last == (length - 1) * turn
        assert writeable == (comm.size == 1)  # in a local run it is the object itself
        for _, slave_may_write, name, in_memory in results.values():
            assert (slave_may_write, name) == (comm.size == 1, "table")
            if not isolate:  # the child has memory of that kind for its jobs
                assert (in_memory > 8 * length) == (length == LARGE and comm.size > 1)
        with everywhere(comm):
            assert "shared" not in vars(dispatcher)
            assert callable(dispatcher.shared)
            assert mapped_bytes() == 0
    check_healthy(comm)


@pytest.mark.parametrize("spread", ["one each", "slaves together"])
@pytest.mark.parametrize("length", [MIDDLE, LARGE])
def test_other_hosts(comm, length, spread):
    """Where the master believes that they are: a slave of another host is sent the data, and the others there have it of it."""
    if comm.size == 1:
        return
    machine = MPIMachine(comm)
    apart = {str(rank): [rank] for rank in range(comm.size)}
    machine.channel().hosts = apart if spread == "one each" else {"here": [0], "there": list(range(1, comm.size))}
    results, *_ = value_of(Table(length, machine), comm)
    assert {index: result[0] for index, result in results.items()} == {n: n + 7 for n in range(10)}
    assert not any(result[1] for result in results.values())
    check_healthy(comm)


def test_what_cannot_be_opened_is_sent(comm, monkeypatch):
    def fail(address):
        raise OSError("no such process")

    if comm.rank % 2:
        monkeypatch.setattr(Memory, "open", fail)
    results, *_ = value_of(Table(LARGE, comm), comm)
    assert {index: result[0] for index, result in results.items()} == {n: n + 7 for n in range(10)}
    check_healthy(comm)


def test_set_on_the_instance(comm):
    dispatcher = Sweep(range(5), comm)
    dispatcher.shared = give = lambda: [10, 20]
    dispatcher.process_job = lambda job: dispatcher.shared[job % 2]
    assert value_of(dispatcher, comm)[0] == {0: 10, 1: 20, 2: 10, 3: 20, 4: 10}
    assert dispatcher.shared is give


def test_none_is_a_value(comm):
    dispatcher = Sweep(range(5), comm)
    dispatcher.shared = lambda: None
    dispatcher.process_job = lambda job: dispatcher.shared is None
    assert set(value_of(dispatcher, comm)[0].values()) == {True}


@pytest.mark.parametrize(
    ("give", "kind", "word"),
    [
        (lambda: 1 / 0, ZeroDivisionError, "division"),
        (lambda: (lambda: 1), PayloadError, r"what shared\(\) returned cannot be pickled"),
        (lambda: np.zeros(1000), PayloadError, r"what shared\(\) returned takes 8\d+ bytes, over payload_limit = 5000"),
    ],
)
def test_what_goes_wrong_ends_the_run(comm, give, kind, word):
    if comm.size == 1:
        return
    dispatcher = Sweep(range(5), comm)
    dispatcher.payload_limit = 5000
    dispatcher.shared = give
    error = error_of(dispatcher, comm)
    assert isinstance(error, kind)
    assert re.search(word, str(error))
    check_healthy(comm)


def test_an_attribute_of_that_name(comm):
    dispatcher = Sweep(range(5), comm)
    dispatcher.shared = {"my": "data"}
    outcomes = run(dispatcher, comm)
    for outcome in outcomes:
        assert isinstance(outcome.error, PayloadError)
        assert "give your attribute another name" in str(outcome.error)
    check_healthy(comm)


class Unreadable:
    """Cannot be rebuilt on a slave."""

    def __reduce__(self):
        return unreadable, ()


def unreadable():
    if MPI.COMM_WORLD.rank:
        raise ImportError("no such module on this host")


def test_a_slave_that_cannot_rebuild_it(comm):
    if comm.size == 1:
        return
    dispatcher = Sweep(range(5), comm)
    dispatcher.shared = Unreadable
    outcomes = run(dispatcher, comm)
    assert isinstance(outcomes[0].error, SlaveError)
    assert "ImportError: no such module on this host" in str(outcomes[0].error)
    check_healthy(comm)


@pytest.mark.parametrize("where", ["master", "slaves"])
def test_ranks_that_disagree(comm, where):
    if comm.size == 1:
        return
    dispatcher = Sweep(range(5), comm)
    if (comm.rank == 0) == (where == "master"):
        dispatcher.shared = lambda: 1
    error = error_of(dispatcher, comm)
    assert isinstance(error, RanksDisagreeError)
    assert "shared() overridden" in str(error)
    check_healthy(comm)


def test_slaves_that_are_not_used(comm):
    results, *_ = value_of(Table(LARGE, comm, max_slaves=1), comm)
    assert len(results) == 10
    results, *_ = value_of(Table(LARGE, comm, min_slaves=99), comm)
    assert len(results) == 10
    check_healthy(comm)


def test_it_may_be_kept(comm):
    """What a job keeps of it stays what it was, also when the next run has another one."""

    class Keeps(Table):
        kept = copy = None

        def process_job(self, job):
            if self.kept is None:
                Keeps.kept, Keeps.copy = self.shared["table"], self.shared["table"].copy()
            return super().process_job(job)

    dispatcher = Keeps(LARGE, comm)
    for _ in range(3):
        value_of(dispatcher, comm)
        with everywhere(comm):
            assert Keeps.kept is None or (Keeps.kept == Keeps.copy).all()

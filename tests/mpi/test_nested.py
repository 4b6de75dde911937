"""Runs inside runs, and runs in threads: they work, or are refused, and nothing hangs."""

from __future__ import annotations

import threading

import pytest
from mpi4py import MPI
from mpi_helpers import Sweep, Tolerant, check_healthy, error_of, everywhere, run, value_of

from jd_hpc import JobError, NestedRunError

pytestmark = pytest.mark.mpi


class Inside(Sweep):
    """Runs another one where it is told to: on `inner_vm`."""

    def __init__(self, where, inner_vm, vm, **options):
        super().__init__(range(6), vm, **options)
        self.where, self.inner_vm = where, inner_vm

    def inner(self, where):
        if where != self.where:
            return 0
        return sum(Sweep(range(4), self.inner_vm).run()[0].values())

    def on_startup(self):
        self.inner("on_startup")

    def next_job(self):
        self.inner("next_job")
        return super().next_job()

    def process_job(self, job):
        return job + self.inner("process_job")

    def process_result(self, index, job, result):
        self.inner("process_result")
        super().process_result(index, job, result)


@pytest.mark.parametrize("where", ["next_job", "process_result"])
def test_the_same_communicator_in_a_hook_of_the_master(comm, where):
    if comm.size == 1:
        assert len(value_of(Inside(where, comm, comm), comm)[0]) == 6  # a local run in a local run
        return
    error = error_of(Inside(where, comm, comm), comm)
    assert isinstance(error, NestedRunError)
    assert "in a run of this thread" in str(error)
    assert "Cure: inside a hook" in str(error)
    check_healthy(comm)


def test_the_same_communicator_in_a_job(comm):
    if comm.size == 1:
        return
    error = error_of(Inside("process_job", comm, comm), comm)
    assert isinstance(error, JobError)
    assert error.type_name == "NestedRunError"
    check_healthy(comm)


def test_the_same_communicator_in_a_hook_of_all_ranks(comm):
    if comm.size == 1:
        return
    outcomes = run(Inside("on_startup", comm, comm), comm)
    assert [type(outcome.error) for outcome in outcomes] == [NestedRunError] * comm.size
    check_healthy(comm)


def test_the_next_run_may_begin_in_the_last_hooks(comm):
    """Then the ranks have left the run."""

    class Twice(Sweep):
        def on_shutdown(self):
            self.second = Sweep(range(5), comm).run()

    dispatcher = Twice(range(6), comm)
    assert len(value_of(dispatcher, comm)[0]) == 6
    with everywhere(comm):
        assert (dispatcher.second is None) == (comm.rank > 0)


@pytest.mark.parametrize("where", ["on_startup", "next_job", "process_job", "process_result"])
def test_a_local_run_inside_anything(comm, where, monkeypatch, tmp_path_factory):
    """The journal and the history that the environment names are the outer run's."""
    folder = comm.bcast(tmp_path_factory.mktemp("nested") if comm.rank == 0 else None)
    monkeypatch.setenv("JD_HPC_JOURNAL", str(folder / "run.journal"))
    monkeypatch.setenv("JD_HPC_HISTORY", str(folder / "history"))
    results = value_of(Inside(where, None, comm), comm)[0]
    assert results == {n: n + (6 if where == "process_job" else 0) for n in range(6)}
    assert (folder / "history").read_text().count('"e":"begin"') == 1


def test_a_communicator_of_some_slaves_in_their_jobs(comm):
    """Two slaves have a job each, and these run jobs together."""
    if comm.size < 3:
        return
    some = comm.Split(0 if comm.rank in (1, 2) else MPI.UNDEFINED)

    class Together(Sweep):
        def process_job(self, job):
            value = Sweep([10, 20, 30], some).run()
            return None if value is None else value[0]

    results = value_of(Together(range(2), comm, max_slaves=2, credit=1), comm)[0]
    assert sorted(results.values(), key=str) == [None, {0: 10, 1: 20, 2: 30}]
    if some != MPI.COMM_NULL:
        some.Free()
    check_healthy(comm)


def test_ranks_of_mpi_in_a_process_of_its_own(comm):
    """With isolate a job is not in a rank."""
    if comm.size == 1:
        return
    dispatcher = Tolerant(range(4), comm, isolate=True)
    dispatcher.process_job = lambda job: Sweep(range(3), world if job % 2 else None).run()[0]
    world = MPI.COMM_WORLD
    results, failures = value_of(dispatcher, comm)
    if comm.rank == 0:
        assert results == {0: {0: 0, 1: 1, 2: 2}, 2: {0: 0, 1: 1, 2: 2}}
        assert {index: error.type_name for index, error in failures.items()} == {1: "NestedRunError", 3: "NestedRunError"}
        assert "forked" in str(failures[1])


# ---- threads ----------------------------------------------------------------------------------------------------------


def in_threads(*functions):
    """Call each in a thread of its own; return what they returned or raised."""
    ends = [None] * len(functions)

    def call(at):
        try:
            ends[at] = functions[at]()
        except BaseException as error:
            ends[at] = error

    threads = [threading.Thread(target=call, args=(at,)) for at in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def test_a_run_in_a_thread(comm):
    assert MPI.Query_thread() == MPI.THREAD_MULTIPLE
    for grain in (1, 4):
        (value,) = in_threads(Sweep(range(50), comm, grain=grain).run)
        with everywhere(comm):
            assert value == (({n: n for n in range(50)}, {}) if comm.rank == 0 else None)
    check_healthy(comm)


def test_two_threads_with_a_communicator_each(comm):
    others = [comm.Dup(), comm.Dup()]
    for _ in range(3):
        sweeps = [Sweep(range(100 + at), other) for at, other in enumerate(others)]
        values = in_threads(*(sweep.run for sweep in sweeps))
        with everywhere(comm):
            for at, value in enumerate(values):
                assert value == (({n: n for n in range(100 + at)}, {}) if comm.rank == 0 else None)
    for other in others:
        check_healthy(other)
        other.Free()


def test_a_thread_with_a_communicator_that_is_in_a_run(comm):
    if comm.size == 1:
        return

    class Asks(Sweep):
        def process_result(self, index, job, result):
            super().process_result(index, job, result)
            if index == 0:
                self.refused, self.alone = in_threads(Sweep([1], comm).run, Sweep([1]).run)

        def postprocess(self):
            return self.refused, self.alone

    refused, alone = value_of(Asks(range(5), comm), comm)
    if comm.rank == 0:
        assert isinstance(refused, NestedRunError)
        assert "another thread" in str(refused)
        assert alone == ({0: 1}, {})
    check_healthy(comm)

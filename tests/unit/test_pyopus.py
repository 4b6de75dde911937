"""cOS and MPI in one process. tests/launch/test_pyopus.py has them with slaves."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from jd_hpc import CallError, JobDispatcher, JobError, pyopus
from jd_hpc.pyopus import HostID, OpusOS, TaskID


class Boom(Exception):
    """Raised on purpose."""


def square(n):
    return n * n


def boom(n):
    raise Boom(n)


@pytest.fixture
def cos():
    return OpusOS()


def test_without_a_vm(cos):
    assert (cos.slots(), cos.freeSlots(), cos.finishedTasks()) == (-1, -1, -1)
    assert cos.dispatch([(square, [n]) for n in range(4)]) == [0, 1, 4, 9]
    assert cos.dispatchSingle(square, [3]) == 9
    assert cos.dispatchSingle(square, kwargs={"n": 3}, remote=False) == 9
    cos.finalize()


def test_tasks_are_joined_oldest_first(cos):
    tids = [cos.Spawn(square, args=[n], remote=True) for n in range(3)]
    assert tids == sorted(set(tids))
    assert cos.Join([tids[1]]) == {tids[1]: 1}
    assert cos.Join(block=False) == {tids[0]: 0}
    assert cos.Join({tids[2]}) == {tids[2]: 4}
    assert cos.Join() == cos.Join(block=False) == {}
    with pytest.raises(ValueError, match="are no tasks"):
        cos.Join([tids[0]])


def test_what_a_task_raises_comes_at_its_join(cos):
    bad, good = cos.Spawn(boom, [1]), cos.Spawn(square, [2])
    with pytest.raises(Boom):
        cos.Join([bad])
    assert cos.Join() == {good: 4}


def test_a_task_that_exits_does_not_end_the_script(cos):
    with pytest.raises(JobError, match="SystemExit: 0"):
        cos.dispatch([(sys.exit, [0])])


def test_a_task_joins_its_own_children_only(cos):
    def parent():
        tids = [cos.Spawn(square, [n]) for n in (2, 3)]
        assert cos.getTid() not in (1, *tids)
        first = cos.Join()
        assert first == {tids[0]: 4}
        return cos.getTid()

    other = cos.Spawn(square, [5])
    tid = cos.Spawn(parent)
    assert cos.Join([tid]) == {tid: tid}
    assert cos.getTid() == 1
    assert cos.Join() == {other: 25}
    assert cos.Join() == {}  # the other child of `parent` went with it


def test_results_with_hosts(cos):
    seen = []

    def collect():
        while True:
            seen.append((yield))

    jobs = [(square, [n], None, "extra") for n in range(2)]
    assert cos.dispatch(jobs, collect(), collectHostIDs=True, buildResultList=True) == [0, 1]
    assert seen == [(0, jobs[0], 0, None), (1, jobs[1], 1, None)]


def test_a_generator_may_go_by_what_the_collector_has_seen(cos):
    seen = []

    def collect():
        while True:
            seen.append((yield)[2])

    def jobs():
        while len(seen) < 5:
            yield square, [len(seen)]

    cos.dispatch(jobs(), collect())
    assert seen == [0, 1, 4, 9, 16]


def test_errors_of_dispatch(cos):
    ends = []

    def collect():
        try:
            while True:
                yield
        finally:
            ends.append(1)

    with pytest.raises(Boom) as caught:
        cos.dispatch([(square, [1]), (boom, [2])], collect())
    assert caught.value.__notes__ == ["This was job 1 of dispatch."]
    assert ends == [1]
    with pytest.raises(CallError, match="job 0 is 5"):
        cos.dispatch([5])
    with pytest.raises(CallError, match="no job is on its way"):
        cos.dispatch([(square, [1]), None])


def test_what_is_not_supported_says_so(cos):
    with pytest.raises(NotImplementedError, match="not mirrored"):
        pyopus.MPI(mirrorMap={"*": "."})
    with pytest.raises(NotImplementedError, match="targetHostID"):
        cos.Spawn(square, [1], targetHostID=HostID("a"))
    with pytest.raises(TypeError, match="MPI"):
        cos.setVM("localhost")
    assert cos.Spawn(square, [1], remote=True, extendedReturnValue=True) == (2, None, None)


def test_ids():
    assert HostID("a") == HostID("a") != HostID("b")
    assert TaskID(1, 2) == TaskID(1, 2) != TaskID(1, 3)
    assert len({HostID("a"), HostID("a"), TaskID(1, 2), TaskID(1, 2)}) == 2
    assert (str(HostID("a")), str(TaskID(1, 2))) == ("a", "1:2")
    assert pickle.loads(pickle.dumps([HostID("a"), TaskID(1, 2)])) == [HostID("a"), TaskID(1, 2)]


def test_it_is_one_everywhere():
    assert pickle.loads(pickle.dumps(pyopus.cOS)) is pyopus.cOS


def test_without_a_vm_no_mpi_is_imported():
    code = (
        "import sys; from jd_hpc.pyopus import cOS, MPI; print(cOS.dispatch([(abs, [-1])]), MPI.taskID(), bool(str(MPI.hostID())), "
        "'mpi4py.MPI' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[1] 0:0 True False\n"


class Sum(pyopus.JobDispatcher):
    def reset(self):
        self.jobs, self.total = iter(range(5)), 0

    def next_job(self):
        return next(self.jobs, None)

    def process_job(self, job):
        return job

    def process_result(self, index, job, result):
        self.total += result

    def postprocess(self):
        return self.total


def test_the_dispatcher():
    one = Sum(None, 3, 1, 7, grain=2)
    assert (one.max_slaves, one.min_slaves, one.debug, one.grain) == (3, 1, 2, 2)
    one = Sum(vm=None, maxSlaves=4, minSlaves=2, debug=0)
    assert (one.max_slaves, one.min_slaves) == (4, 2)
    assert isinstance(one, JobDispatcher)
    assert one.run() == 10

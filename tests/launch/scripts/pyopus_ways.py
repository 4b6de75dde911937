"""Use cOS, and end in the way that the argument names."""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from script_helpers import RANK, note, say

from jd_hpc import JobError, Unfinished
from jd_hpc.pyopus import MPI, JobDispatcher, cOS

way = sys.argv[1]


class Boom(Exception):
    """Raised on purpose."""


def square(n):
    return n * n


def fail_on(n, wrong):
    if n == wrong:
        raise Boom(f"{n} is wrong")
    return n * n


def slow(n):
    time.sleep(0.05)
    return n


def dies_once(n):
    """Kill the process that runs job 5, the first time."""
    if n == 5 and not Path("note.died").exists():
        note("died", "once")
        os.kill(os.getpid(), signal.SIGKILL)
    return n * n


def spawns(n):
    """On a slave everything is run there."""
    assert MPI.taskID().number > 1 or cOS.getTid() > 1
    tids = [cOS.Spawn(MPI.taskID, remote=True) for _ in range(n + 1)]
    here = {task.rank for tid in tids for task in cOS.Join([tid]).values()}
    assert cOS.dispatch([(square, [k]) for k in range(n)]) == [k * k for k in range(n)]
    assert here == {MPI.taskID().rank}
    return cOS.slots()


def to_the_end():
    """Everything that is promised, one after the other, while the slaves serve."""
    size = cOS.slots()
    assert cOS.freeSlots() == size - 1
    assert cOS.dispatch((square, [n]) for n in range(50)) == [n * n for n in range(50)]
    spawned = [cOS.Spawn(slow, [n], remote=True) for n in range(2 * size)]
    got = {}
    assert cOS.dispatch([(square, [n]) for n in range(5)]) == [n * n for n in range(5)]  # while others are under way
    while ended := cOS.Join():
        got.update(ended)
    assert got == dict(zip(spawned, range(2 * size), strict=True))
    assert (cOS.freeSlots(), cOS.finishedTasks()) == (size - 1, 0)
    hosts = []

    def collect():
        while True:
            index, job, result, host = yield
            assert (job[3], result) == (f"extra {index}", index * index)
            hosts.append(host)

    cOS.dispatch([(square, [n], {}, f"extra {n}") for n in range(9)], collect(), collectHostIDs=True)
    assert hosts == [MPI.hostID() if size > 1 else None] * 9
    assert cOS.dispatchSingle(MPI.taskID).rank in range(min(1, size - 1), size)
    if size > 1:
        waiting = [cOS.Spawn(slow, [n], remote=True, block=False) for n in range(2 * size)]
        assert cOS.freeSlots() == 0
        assert cOS.Spawn(slow, [1], remote=True, block=False, enqueue=False) == -1
        assert [cOS.Join([tid])[tid] for tid in reversed(waiting)] == [*reversed(range(2 * size))]
    for call in (
        lambda: cOS.dispatch([(fail_on, [n, 3]) for n in range(9)]),
        lambda: cOS.dispatchSingle(fail_on, [3], {"wrong": 3}),
    ):
        try:
            call()
        except Boom as error:
            assert size == 1 or isinstance(error.__cause__, JobError)
        else:
            raise AssertionError("nothing was raised")
    assert cOS.dispatch([(spawns, [n]) for n in range(4)]) == [1 if size == 1 else -1] * 4
    vm = MPI()
    cOS.setVM(None)
    assert (cOS.slots(), cOS.dispatchSingle(MPI.taskID).rank) == (-1, 0)
    cOS.setVM(vm)
    assert cOS.dispatch([(square, [2])] * 3) == [4, 4, 4]  # after all that


def go():
    if way in ("well", "no finalize"):
        to_the_end()
    elif way == "job raises":
        cOS.dispatch([(fail_on, [n, 10]) for n in range(1000)])
    elif way == "spawned raises":
        cOS.Join([cOS.Spawn(fail_on, [10, 10], remote=True)])
    elif way == "script raises":
        for n in range(2000):
            cOS.Spawn(slow, [n], remote=True, block=False)
        raise Boom("the script is wrong")
    elif way == "job exits":
        cOS.dispatch([(square, [n]) for n in range(3)] + [(sys.exit, [0])])
    elif way == "script exits":
        sys.exit(7)
    elif way == "not known there":
        exec("def unknown(): pass", globals())
        cOS.dispatch([(unknown,)])  # noqa: F821
    elif way == "cannot travel":
        cOS.dispatch([(square, [n]) for n in range(3)] + [(square, [threading.Lock()])])
    elif way == "collector raises":
        cOS.dispatch([(square, [n]) for n in range(100)], (Boom("never") for _ in [1]))
    elif way == "slave dies":
        assert cOS.dispatch([(dies_once, [n]) for n in range(30)]) == [n * n for n in range(30)]
    elif way == "time is over":
        try:
            cOS.dispatch((slow, [n]) for n in range(10**6))
        except Unfinished:
            assert cOS.freeSlots() == cOS.slots() - 1
            with contextlib.suppress(Unfinished):
                cOS.Spawn(slow, [1], remote=True, block=False)
            assert cOS.freeSlots() == cOS.slots() - 1, "what was refused is counted"
            raise
    elif way == "dispatcher":
        JobDispatcher(MPI()).run()
    elif way == "once more":
        cOS.finalize()
        cOS.setVM(MPI())


cOS.setVM(MPI())
assert RANK == 0, "a slave came back"
go()
if way != "no finalize":
    cOS.finalize()
say("all is well")

"""Three ways to give out work that PyOPUS users know. Only the first import differs from a script for PyOPUS.

python examples/from_pyopus.py                  # one process
mpiexec -n 4 python examples/from_pyopus.py     # one master, three slaves
"""

import math

from jd_hpc.pyopus import MPI, cOS

ENOUGH = 0.9999
MOST_TASKS = 8


def response(frequency, damping=0.1):
    """The gain of a resonator, relative to its peak."""
    peak = 1 / (2 * damping * math.sqrt(1 - damping**2))
    return 1 / math.hypot(1 - frequency**2, 2 * damping * frequency) / peak


def where(value):
    """A slave says who it is."""
    return value, str(MPI.hostID()), MPI.taskID().rank


# ---- 1: a list of jobs, a list of results ------------------------------------------------------------------------------


def sweep():
    jobs = ((response, [n / 50], {"damping": 0.2}) for n in range(100))
    gains = cOS.dispatch(jobList=jobs, remote=True)
    print(f"sweep: {len(gains)} gains, the largest at {gains.index(max(gains)) / 50:.2f}")


# ---- 2: jobs until a result is good enough -----------------------------------------------------------------------------


class Search:
    """The generator stops when the collector has seen enough."""

    def __init__(self):
        self.best = (0.0, None)
        self.collected = 0

    def jobs(self):
        n = 0
        while self.best[0] < ENOUGH:
            yield response, [math.modf(n * 0.6180339887)[0] * 2], {}, f"point {n}"
            n += 1

    def collector(self):
        try:
            while True:
                _, job, gain, _ = yield
                self.collected += 1
                self.best = max(self.best, (gain, job[1][0]))
        except GeneratorExit:
            print(f"search: {self.best[0]:.4f} at {self.best[1]:.2f}")


def search():
    one = Search()
    cOS.dispatch(one.jobs(), one.collector(), collectHostIDs=True)
    assert one.best[0] >= ENOUGH


# ---- 3: a loop of one's own --------------------------------------------------------------------------------------------


def climb():
    """Look left and right of the best point, in ever smaller steps, with as many points under way as there are slaves."""
    best, step, count, running = (response(0.5), 0.5), 0.25, 0, {}
    while running or step > 1e-3:
        while step > 1e-3 and (not running or (cOS.freeSlots() - cOS.finishedTasks() > 0 and len(running) < MOST_TASKS)):
            point = best[1] + (step, -step)[count % 2]
            running[cOS.Spawn(response, args=[point], remote=True, block=True)] = point
            count += 1
        tid, gain = cOS.Join(block=True).popitem()
        point = running.pop(tid)
        if gain > best[0]:
            best = gain, point
        else:
            step *= 0.8
    ranks = {cOS.dispatchSingle(where, [n])[2] for n in range(5)}
    print(f"climb: {best[0]:.2f} at {best[1]:.2f}; slaves were asked: {ranks != {0}}")


if __name__ == "__main__":
    cOS.setVM(MPI())  # the slaves stay in here
    sweep()
    search()
    climb()
    cOS.finalize()

"""Branch and bound on all ranks: slaves prune with the newest bound, whoever found it.

    python examples/knapsack.py                    one process, no MPI needed
    mpiexec -n 4 python examples/knapsack.py       one master and three slaves

The 0/1 knapsack problem: of items with a value and a weight, choose those that are worth most and weigh at most `capacity`. The
values are nearly proportional to the weights ("weakly correlated" instances, which are hard: the relaxation tells little).

A job is a part of the tree: which of the first few items are taken. A slave searches it depth first, and cuts off every branch
whose relaxation (fractions of items allowed) is not better than the best solution known. When it finds a better one, it tells
the master at once, from inside the job; the master broadcasts it, and all slaves cut off more. The script runs twice, without and
with that sharing, prints how many nodes were searched, and checks the optimum by dynamic programming.

With one process there is nobody to share with but oneself: what one job found, the next one knows at once.
"""
from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jd_hpc import JobDispatcher

Integers = NDArray[np.int64]
NODES_PER_POLL = 200


class Bound(NamedTuple):
    """What is told and broadcast: somebody has a solution of this value."""

    value: int


class Instance(NamedTuple):
    """Items, the ones that are worth most for their weight first."""

    values: Integers
    weights: Integers
    capacity: int


def make_instance(items: int, seed: int) -> Instance:
    """Draw a weakly correlated instance."""
    random = np.random.default_rng(seed)
    weights = random.integers(1, 1001, items)
    values = np.maximum(1, weights + random.integers(-100, 101, items))
    order = np.argsort(-values / weights, kind="stable")
    return Instance(values[order], weights[order], int(weights.sum() // 2))


def optimum(instance: Instance) -> int:
    """The best value, by dynamic programming over all capacities: exact, and knows nothing of trees."""
    best = np.zeros(instance.capacity + 1, np.int64)
    for value, weight in zip(instance.values, instance.weights, strict=True):
        best[weight:] = np.maximum(best[weight:], best[: best.size - weight] + value)
    return int(best[-1])


class Knapsack(JobDispatcher):
    """Branch and bound.

    Parameters
    ----------
    instance : Instance
        The problem; every rank has it.
    depth : int
        A job fixes the first `depth` items: there are up to 2**depth jobs.
    shares : bool
        Whether ranks tell each other what they have found.
    **run
        For `JobDispatcher`: `vm`, ...
    """

    job_dtype = np.dtype("i8")  # which of the first items are taken, as bits
    result_dtype = np.dtype([("value", "i8"), ("nodes", "i8")])  # the best of this part (0: none better), nodes searched

    def __init__(self, instance: Instance, depth: int, shares: bool, **run) -> None:
        super().__init__(credit=1, **run)
        self.instance, self.depth, self.shares = instance, depth, shares
        self.values, self.weights = instance.values.tolist(), instance.weights.tolist()
        self.bound = 0  # the best value that this rank knows of
        self.add_handler(Bound, self.on_bound)

    def reset(self) -> None:
        """Master, at the start of a run."""
        self.parts = iter(range(2**self.depth))
        self.bound = self.best = self.nodes = 0

    def next_job(self) -> int | None:
        """Master: the next part of the tree."""
        return next(self.parts, None)

    def on_slave_started(self, slave: int) -> None:
        """Master: a slave that starts late gets what was broadcast before."""
        if self.shares:
            self.tell(Bound(self.bound), slave)

    def on_bound(self, source: int, bound: Bound) -> None:
        """Any rank: somebody has found something. The master passes on what is new."""
        if bound.value > self.bound or source == 0:
            self.bound = max(self.bound, bound.value)
            if self.machine.is_master:
                self.broadcast(bound)

    def process_job(self, job: int) -> tuple[int, int]:
        """Slave: search one part of the tree."""
        taken = [bool(job >> item & 1) for item in range(self.depth)]
        value = sum(v for v, is_taken in zip(self.values, taken, strict=False) if is_taken)
        room = self.instance.capacity - sum(w for w, is_taken in zip(self.weights, taken, strict=False) if is_taken)
        self.found, self.searched = 0, 0
        if room >= 0:
            self.search(self.depth, value, room)
        return self.found, self.searched

    def search(self, first: int, value: int, room: int) -> None:
        """Search all ways to go on with the items from `first` on, depth first, with a stack of our own."""
        stack = [(first, value, room)]
        while stack:
            item, value, room = stack.pop()
            self.searched += 1
            if self.searched % NODES_PER_POLL == 0:
                self.poll()  # others may have found something better
            if value > self.bound:
                self.bound = self.found = value
                if self.shares:
                    self.tell(Bound(value))
            if item == len(self.values) or self.relaxed(item, value, room) <= self.bound:
                continue
            stack.append((item + 1, value, room))
            if self.weights[item] <= room:
                stack.append((item + 1, value + self.values[item], room - self.weights[item]))

    def relaxed(self, item: int, value: int, room: int) -> int:
        """The most that can still be reached if the last item may be cut: Dantzig's bound."""
        for at in range(item, len(self.values)):
            if self.weights[at] > room:
                return value + self.values[at] * room // self.weights[at]
            room -= self.weights[at]
            value += self.values[at]
        return value

    def process_result(self, index: int, job: int, result: np.void) -> None:
        """Master: a part is done."""
        self.best = max(self.best, int(result["value"]))
        self.nodes += int(result["nodes"])

    def postprocess(self) -> tuple[int, int]:
        """Master: the best value, and nodes searched."""
        return max(self.best, self.bound), self.nodes  # whoever found the bound may have died since


def main(arguments: list[str] | None = None) -> None:
    """Run on all ranks; the master prints."""
    parser = argparse.ArgumentParser(description="A knapsack by branch and bound, whose ranks share the newest bound.")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--depth", type=int, default=8, help="items that a job fixes")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        from mpi4py import MPI
        vm = MPI.COMM_WORLD
    except (ImportError, RuntimeError):  # no mpi4py, or no MPI
        vm = None
    instance = make_instance(options.items, options.seed)
    for shares in (False, True):
        answer = Knapsack(instance, options.depth, shares, vm=vm).run()
        if answer is None:
            continue  # a slave
        best, nodes = answer
        print(f"{'with' if shares else 'without'} shared bounds: best value {best}, {nodes} nodes")
        if best != optimum(instance):
            raise SystemExit(f"wrong: the optimum is {optimum(instance)}")
    if answer is not None:
        print("the optimum, as dynamic programming finds it too")


if __name__ == "__main__":
    main()

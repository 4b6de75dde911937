"""The examples with messages: the optimum is right, bounds are shared, a long job reports, on any number of ranks."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from mpi_helpers import value_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    """Import an example by its path: examples/ is no package."""
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # messages are pickled by the names of their classes
    spec.loader.exec_module(module)
    return module


knapsack, long_job = load("knapsack"), load("long_job")


@pytest.mark.mpi
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_knapsack_finds_the_optimum(comm, seed):
    instance = knapsack.make_instance(40, seed)
    nodes = {}
    for shares in (False, True):
        best, nodes[shares] = value_of(knapsack.Knapsack(instance, 5, shares, vm=comm), comm)
        assert best == knapsack.optimum(instance)
    # 40 items have 10^12 nodes
    assert 0 < nodes[True] < 1e5
    assert 0 < nodes[False] < 1e5


def test_dynamic_programming_finds_the_optimum():
    for seed in range(5):
        instance = knapsack.make_instance(10, seed)
        best = 0
        for taken in itertools.product([0, 1], repeat=10):
            if np.dot(taken, instance.weights) <= instance.capacity:
                best = max(best, int(np.dot(taken, instance.values)))
        assert best == knapsack.optimum(instance)


@pytest.mark.mpi
def test_knapsack_as_a_script(world, capsys):
    knapsack.main(["--items", "30", "--depth", "4"])
    lines = capsys.readouterr().out.splitlines()
    if world.rank > 0:
        assert lines == []
        return
    assert re.fullmatch(r"without shared bounds: best value (\d+), \d+ nodes", lines[0])
    assert re.fullmatch(r"with shared bounds: best value (\d+), \d+ nodes", lines[1])
    assert lines[2] == "the optimum, as dynamic programming finds it too"


@pytest.mark.mpi
def test_long_jobs_report_and_stop(world, capsys):
    long_job.main(["--jobs", "4", "--points", "2000000", "--enough", "3000000"])
    lines = capsys.readouterr().out.splitlines()
    if world.rank > 0:
        assert lines == []
        return
    reports = [line for line in lines if re.fullmatch(r"job \d at rank \d: [ \d]{3}%, pi is about 3\.\d+", line)]
    last = re.fullmatch(r"pi is about 3\.1[34]\d\d, from (\d+) points; jobs reported (\d+) times", lines[-1])
    assert last is not None, lines
    assert len(reports) == int(last[2]) == len(lines) - 1
    assert 3_000_000 <= int(last[1]) <= 8_000_000

"""JobDispatcher with PyOPUS's names of arguments. tests/launch/test_pyopus.py has cOS, whose slaves do not come back."""

from __future__ import annotations

import pytest
from mpi_helpers import value_of

from jd_hpc import pyopus

pytestmark = pytest.mark.mpi


class Ranks(pyopus.JobDispatcher):
    def reset(self):
        self.jobs, self.ranks = iter(range(50)), set()

    def next_job(self):
        return next(self.jobs, None)

    def process_job(self, job):
        return pyopus.MPI.taskID().rank

    def process_result(self, index, job, result):
        self.ranks.add(result)

    def postprocess(self):
        return self.ranks


@pytest.mark.parametrize("most", [None, 1, 2])
def test_a_dispatcher_on_the_ranks_of_the_world(world, most):
    ranks = value_of(Ranks(vm=pyopus.MPI(), maxSlaves=most), world)
    assert ranks <= set(range(min(1, world.size - 1), min(world.size, 1 + (most or world.size))))
    assert ranks


def test_min_slaves(world):
    assert value_of(Ranks(pyopus.MPI(), minSlaves=world.size), world) == {0}

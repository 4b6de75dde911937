"""Groups of ranks of which one fails while the others wait for it in MPI."""

from __future__ import annotations

import pytest
from launch_helpers import Launched

TOTAL = sum(n * n for n in range(20))


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_dies_costs_the_group_its_job(launch, which):
    """The job goes to the other group. In the next run there is only that one."""
    ended = launch(5, "groups_fail.py", which, "dies", kind=Launched).wait(60)
    assert ended.code == 0, ended
    lines = ended.out.splitlines()
    assert lines[0] in ("lost 1", "lost 2"), ended
    assert lines[1:] == [f"answer 20 {TOTAL} 1", f"again 20 {TOTAL}"], ended


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_raises_while_others_wait_for_it(launch, which):
    """The job has failed, and its group is given up; the other one does the rest."""
    ended = launch(5, "groups_fail.py", which, "raises, and nobody minds the job", kind=Launched).wait(60)
    assert ended.code == 0, ended
    lines = sorted(ended.out.splitlines())
    assert lines[0] == f"answer 19 {TOTAL - 25} 1", ended
    assert lines[1] == f"failed 5 ValueError five is too much (rank {which} of 2 of the group) True", ended
    assert lines[2] in ("lost 1", "lost 2"), ended


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_raises_ends_the_run_by_default(launch, which):
    ended = launch(5, "groups_fail.py", which, "raises", kind=Launched).wait(60)
    assert ended.code != 0
    assert "JobError: job 5 failed on slave" in ended.err, ended
    assert "ValueError: five is too much" in ended.err
    assert "answer" not in ended.out

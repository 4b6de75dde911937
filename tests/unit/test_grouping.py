"""How ranks make groups."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jd_hpc import GroupError
from jd_hpc.groups import arrange, check, count_groups


def test_ranks_left_over():
    assert count_groups(1, 4, False) == 0
    assert count_groups(9, 4, False) == 2
    assert count_groups(12, 4, True) == 2
    with pytest.raises(GroupError, match=r"11 others; these make 2 groups of 4 and leave 3\. Cure: start 9 or 13"):
        count_groups(12, 4, False)


def test_groups_lie_on_one_host_where_that_can_be():
    assert arrange(["a", "a", "a", "b", "b", "b"], 2) == [[1, 2], [3, 4]]  # and rank 5 is left
    assert arrange(["a", "b", "a", "b", "a"], 2) == [[1, 3], [2, 4]]
    assert arrange(["a", "a", "b", "c", "c"], 2) == [[3, 4], [1, 2]]


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 5))
def test_every_rank_is_in_one_group_at_most(hosts, ranks_per_slave):
    groups = arrange(hosts, ranks_per_slave)
    ranks = [rank for group in groups for rank in group]
    assert len(groups) == count_groups(len(hosts), ranks_per_slave, True)
    assert all(len(group) == ranks_per_slave for group in groups)
    assert len(set(ranks)) == len(ranks)
    assert 0 not in ranks
    split = [group for group in groups if len({hosts[rank] for rank in group}) > 1]
    assert len(split) < 3  # at most what is left on the hosts


@pytest.mark.parametrize(
    ("options", "word"),
    [({"isolate": True}, "isolate"), ({"kernel": 1}, "kernel"), ({"process_jobs": 1}, "process_jobs"), ({"grain": 2}, "grain")],
)
def test_what_groups_cannot_do(options, word):
    plan = SimpleNamespace(isolate=False, kernel=None, process_jobs=None, grain=1, credit=2)
    check(plan)
    assert plan.credit == 1
    with pytest.raises(GroupError, match=word):
        check(SimpleNamespace(**vars(plan) | options))

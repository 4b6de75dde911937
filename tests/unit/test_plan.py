"""A run's hooks and options, resolved once."""

from __future__ import annotations

import numpy as np
import pytest

from jd_hpc import JobDispatcher, PayloadError
from jd_hpc.plan import READ_AHEAD_BATCHES, READ_AHEAD_BYTES, Plan


class Rows(JobDispatcher):
    job_dtype = ("f8", 2)
    result_dtype = "i4"

    def next_jobs(self, count):
        return None


def plan_of(dispatcher):
    return Plan(dispatcher, dispatcher._overrides)


def test_only_the_users_own_hooks_count():
    plan = plan_of(JobDispatcher())
    optional = (
        "next_jobs",
        "process_jobs",
        "process_results",
        "on_slave_started",
        "on_slave_idle",
        "on_job_sent",
        "on_result",
    )
    assert [getattr(plan, name) for name in optional] == [None] * len(optional)
    dispatcher = Rows()
    dispatcher.on_result = print
    plan = plan_of(dispatcher)
    assert plan.next_jobs == dispatcher.next_jobs
    assert plan.on_result is print
    assert plan.process_jobs is None


def test_rows():
    plan = plan_of(Rows())
    assert (plan.job_rows.row_bytes, plan.result_rows.row_bytes) == (16, 4)
    assert plan.job_rows.shape == (2,)
    plan = plan_of(JobDispatcher())
    assert (plan.job_rows, plan.result_rows) == (None, None)


@pytest.mark.parametrize("grain", [1, 100, 1024, 5000, 1 << 20])
def test_read_ahead_is_bounded(grain):
    plan = plan_of(Rows(grain=grain))
    assert 1 <= plan.read_ahead <= READ_AHEAD_BATCHES
    assert plan.read_ahead == 1 or plan.read_ahead * grain * 16 <= READ_AHEAD_BYTES


@pytest.mark.parametrize("name", ["job_dtype", "result_dtype"])
def test_a_batch_over_the_limit_is_refused_at_once(name):
    kind = type("Limited", (Rows,), {"job_dtype": "i1", "result_dtype": "i1", name: ("f8", 2), "payload_limit": 160})
    assert plan_of(kind(grain=10)).grain == 10
    with pytest.raises(PayloadError, match=f"{name}: .* payload_limit = 160; lower grain, or raise payload_limit"):
        plan_of(kind(grain=11))


def test_nothing_is_asked_ahead_of_next_job_or_of_objects():
    assert plan_of(type("Single", (Rows,), {"next_jobs": JobDispatcher.next_jobs})()).read_ahead == 0
    assert plan_of(type("Objects", (Rows,), {"job_dtype": None})()).read_ahead == 0


def test_ranks_agree_or_the_difference_is_named():
    mine, same = plan_of(Rows(grain=3)), plan_of(Rows(grain=3))
    assert mine.differences(same.facts()) == ""
    theirs = plan_of(type("Other", (Rows,), {"job_dtype": "f8"})(grain=4)).facts()
    assert mine.differences(theirs) == "grain is 4 there and 3 here; job_dtype is float64 there and ('<f8', (2,)) here"
    assert mine.differences({}).count(" is None there and ") == len(mine.facts())
    assert mine.differences(same.facts() | {"new": "1"}) == "new is 1 there and None here"


def test_the_limit_of_axes_is_said():
    kind = type("Deep", (Rows,), {"job_dtype": ("f8", (1,) * 17)})
    with pytest.raises(ValueError, match="has 17 axes; more than 16 are not supported"):
        plan_of(kind())
    assert (
        plan_of(type("Deep", (Rows,), {"job_dtype": ("f8", (1,) * 16)})()).job_rows.row_bytes == np.dtype("f8").itemsize
    )

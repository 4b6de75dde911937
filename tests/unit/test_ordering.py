"""What comes in before its turn is held back: the order alone, and in runs without MPI."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jd_hpc import JobDispatcher, JobError, Unfinished
from jd_hpc.check import check_file
from jd_hpc.errors import Failure
from jd_hpc.ordering import BLOCK_BYTES, BLOCK_JOBS, Order


class Taker:
    """The user's hooks, and the dispatcher: notes what it gets."""

    def __init__(self, in_blocks=False, window=1000):
        self.from_journal = False
        self.got, self.calls = [], []
        blocks = self.process_results if in_blocks else None
        self.order = Order(self.process_result, blocks, self.process_failure, self, window)

    def process_result(self, index, job, result):
        self.calls.append(1)
        self.got.append((index, job, result, self.from_journal))

    def process_results(self, indices, jobs, results):
        assert len(indices) == len(jobs) == len(results)
        self.calls.append(len(indices))
        if isinstance(jobs, np.ndarray):
            assert not (indices.flags.writeable or jobs.flags.writeable or results.flags.writeable)
        stored = [self.from_journal] * len(indices)
        self.got += list(zip(indices.tolist(), jobs, results, stored, strict=True))

    def process_failure(self, index, job, error):
        assert error.index == index
        self.got.append((index, job, "failed", self.from_journal))


def error_of(index):
    return JobError(index, 1, Failure("ValueError", "bad", "", None))


@st.composite
def arrivals(draw):
    """Jobs 0 .. n - 1 in parts, in any order: (kind, indices, stored)."""
    count = draw(st.integers(0, 60))
    indices = draw(st.permutations(range(count)))
    parts = []
    while indices:
        size = draw(st.integers(1, 7))
        parts.append((draw(st.sampled_from(["good", "good", "failed"])), indices[:size], draw(st.booleans())))
        indices = indices[size:]
    return count, parts


@given(arrivals(), st.sampled_from(["single", "rows", "objects"]))
def test_any_order_becomes_that_of_the_jobs(given_parts, form):
    count, parts = given_parts
    taker = Taker(form != "single")
    came, expected = set(), {}
    for kind, indices, stored in parts:
        stored = stored and kind == "good"
        taker.from_journal = stored
        if kind == "failed":
            for index in indices:
                taker.order.take_failure(index, -index, error_of(index))
        elif form == "single":
            for index in indices:
                taker.order.take_result(index, -index, 10 * index)
        else:
            rows = np.array(indices)
            jobs, results = (-rows, 10 * rows) if form == "rows" else ([-i for i in indices], [10 * i for i in indices])
            if form == "rows":
                jobs.flags.writeable = results.flags.writeable = False
            taker.order.take_results(rows, jobs, results)
        assert taker.from_journal == stored
        came.update(indices)
        expected |= {i: (i, -i, "failed" if kind == "failed" else 10 * i, stored) for i in indices}
        oldest = next(i for i in range(count + 1) if i not in came)
        assert taker.got == [expected[i] for i in range(oldest)]
        held = [i for i in came if i > oldest]
        assert (taker.order.next_index, taker.order.held) == (oldest, len(held))
        assert taker.order.held_stored == sum(expected[i][3] for i in held)
        assert taker.order.window_end == oldest + 1000
    assert len(taker.got) == count


def test_blocks_stay_blocks():
    taker = Taker(True)
    rows = np.arange(100.0)
    rows.flags.writeable = False
    numbers = np.arange(100)
    taker.order.take_results(numbers[:40], rows[:40], rows[:40])
    for begin in range(90, 40, -10):
        taker.order.take_results(numbers[begin : begin + 10], rows[begin : begin + 10], rows[begin : begin + 10])
    assert taker.calls == [40]
    taker.order.take_results(numbers[40:50], rows[40:50], rows[40:50])
    assert taker.calls == [40, 60]


def test_what_is_in_order_is_not_copied():
    taker = Taker(True)
    rows = np.arange(5.0)
    rows.flags.writeable = False
    kept = []
    taker.order._process_results = lambda *block: kept.extend(block)
    taker.order.take_results(np.arange(5), rows, rows)
    assert np.shares_memory(kept[1], rows)


def test_a_held_row_does_not_keep_its_message():
    taker = Taker(True)
    message = np.zeros(10_000)
    message.flags.writeable = False
    taker.order.take_results(np.array([3, 1]), message[:2], message[:2])
    assert all(not np.shares_memory(piece.jobs, message) for piece in taker.order._pieces.values())
    large = np.zeros((2, BLOCK_BYTES // 8))
    large.flags.writeable = False
    taker.order.take_results(np.array([7, 8]), large, large)
    assert np.shares_memory(taker.order._pieces[7].results, large)


def test_joined_blocks_are_bounded():
    taker = Taker(True)
    for index in range(3 * BLOCK_JOBS, 0, -1):
        taker.order.take_results(np.array([index]), [index], [index])
    taker.order.take_results(np.array([0]), [0], [0])
    assert max(taker.calls) == BLOCK_JOBS
    assert [index for index, *_ in taker.got] == list(range(3 * BLOCK_JOBS + 1))


def test_the_history_is_told_when_a_hook_gets_it():
    taker = Taker()
    told = []
    lines = SimpleNamespace(delivered=lambda first, count: told.append(("delivered", first, count)))
    taker.order.history = SimpleNamespace(
        lines=lines,
        failed=lambda error: told.append(("failed", error.index)),
        event=lambda name, jobs: told.append((name, jobs)),
    )
    taker.order.take_failure(2, 0, error_of(2))
    taker.from_journal = True
    taker.order.take_result(1, 0, 0)
    taker.from_journal = False
    assert told == []
    taker.order.take_result(0, 0, 0)
    assert told == [("delivered", 0, 1), ("stored", [(1, 1)]), ("failed", 2)]


# ---- runs without MPI ------------------------------------------------------------------------------------------------

COUNT = 40


class InOrder(JobDispatcher):
    """Looks at the order itself."""

    bad = (3, 4, 17, 39)

    def reset(self):
        self.at = 0
        self.got, self.failed, self.stored = [], [], []

    def next_job(self):
        self.at += 1
        return float(self.at - 1) if self.at <= COUNT else None

    def process_job(self, job):
        if job in self.bad:
            raise ValueError("bad")
        return 2 * job

    def process_result(self, index, job, result):
        assert (index, job, result) == (len(self.got), index, 2 * index)
        self.got.append(index)
        if self.from_journal:
            self.stored.append(index)

    def process_failure(self, index, job, error):
        assert index == len(self.got)
        self.got.append(index)
        self.failed.append(index)

    def postprocess(self):
        return self.got, self.failed


class Numbers(InOrder):
    job_dtype = result_dtype = "f8"


class InBlocks(Numbers):
    def process_results(self, indices, jobs, results):
        for index, job, result in zip(indices.tolist(), jobs, results, strict=True):
            self.process_result(index, job, result)


KINDS = [InOrder, Numbers, InBlocks]


@pytest.mark.parametrize("options", [{}, {"isolate": True}], ids=["plain", "isolate"])
@pytest.mark.parametrize("grain", [1, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_failures_come_in_their_turn(kind, grain, options, tmp_path):
    history = tmp_path / "h.jsonl"
    dispatcher = kind(ordered=True, grain=grain, history=history, **options)
    assert dispatcher.run() == (list(range(COUNT)), [3, 4, 17, 39])
    (run,) = check_file(str(history))
    assert run.violations == []
    assert (run.counts["delivered"], run.counts["failed"]) == (36, 4)


def test_without_it_blocks_come_before_failures(tmp_path):
    """What is tested here would show."""
    with pytest.raises(AssertionError):
        InBlocks(grain=6).run()


@pytest.mark.parametrize("grain", [1, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_goes_in_order_over_what_is_missing(kind, grain, tmp_path):
    path, history = tmp_path / "a.journal", tmp_path / "h.jsonl"
    kind(ordered=True, grain=grain).run(journal=path)
    healed = type("Healed", (kind,), {"bad": (4,)})
    again = healed(ordered=True, grain=grain, history=history)
    assert again.run(journal=path) == (list(range(COUNT)), [4])
    assert again.stored == [i for i in range(COUNT) if i not in kind.bad]
    assert again.stats["from journal"] == 36
    (run,) = check_file(str(history))
    assert run.violations == []
    assert (run.counts["stored"], run.counts["delivered"], run.counts["failed"]) == (36, 3, 1)


class Drained(Numbers):
    """The time is over at job 4, which the journal lacks."""

    bad = ()

    def process_job(self, job):
        os.kill(os.getpid(), signal.SIGUSR2)
        return 2 * job


def test_a_drained_resume_counts_what_was_handed_over(tmp_path):
    path, history = tmp_path / "a.journal", tmp_path / "h.jsonl"
    type("First", (Numbers,), {"process_failure": lambda self, index, job, error: self.got.append(index)})(
        ordered=True, grain=20
    ).run(journal=path)
    drained = Drained(ordered=True, grain=20, history=history)
    with pytest.raises(Unfinished) as caught:
        drained.run(journal=path)
    # jobs 0 to 19 were asked for; 3 ran, and 4 did not: 5 to 17 were stored, and wait for it in vain
    assert drained.got == [0, 1, 2, 3]
    assert (caught.value.ended, caught.value.put_back) == (4, 16)
    assert drained.stats["from journal"] == 3
    (run,) = check_file(str(history))
    assert run.violations == []
    rest = type("Rest", (Numbers,), {"bad": ()})(ordered=True, grain=20)
    assert rest.run(journal=path)[0] == list(range(COUNT))
    assert len(rest.stored) == 37


def test_the_checker_knows_the_order(tmp_path):
    history = tmp_path / "h.jsonl"
    Numbers(ordered=True, history=history, grain=6).run()
    lines = history.read_text().splitlines(keepends=True)
    (failed,) = (at for at, line in enumerate(lines) if '"failed","index":3,' in line)
    lines[failed], lines[failed + 1] = lines[failed + 1], lines[failed]
    history.write_text("".join(lines))
    (run,) = check_file(str(history))
    assert "the run is ordered, and job 3 is the next one" in run.violations[0].facts


def test_a_window_needs_an_order():
    with pytest.raises(ValueError, match="window needs ordered=True"):
        InOrder(window=5)
    with pytest.raises(ValueError, match="window = 0 is out of range"):
        InOrder(ordered=True, window=0)

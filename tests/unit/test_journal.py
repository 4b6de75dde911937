"""Runs with a journal, without MPI: what is stored comes first, whatever it is made of, and the rest is computed."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from journal_helpers import Counted, block_bounds, contents, names, same, squares

import jd_hpc
from jd_hpc import (
    JobDispatcher,
    JobError,
    JournalError,
    JournalFormatError,
    JournalMismatchError,
    JournalWriteError,
    PayloadError,
    journal,
    journal_writer,
)

RECORD = np.dtype([("x", "f8"), ("n", ">i4"), ("v", "f4", (2,))])
PADDED = np.dtype([("c", "i1"), ("x", "f8")], align=True)


@pytest.fixture
def path(tmp_path):
    yield tmp_path / "a.journal"
    assert names(tmp_path) in ([], ["a.journal"])


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "jd_hpc journal"] == []


def test_a_second_run_computes_only_the_rest(path):
    first = squares(100)
    first.run(journal=path)
    assert (first.evaluated, first.stored) == (100, [])
    assert first.stats == {"jobs": 100, "from journal": 0}
    second = squares(150)
    second.run(journal=path)
    assert second.evaluated == 50
    assert second.stored == list(range(100))
    assert list(second.results) == list(range(150))
    assert second.results == {i: float(i * i) for i in range(150)}
    assert second.stats == {"jobs": 150, "from journal": 100}
    assert not second.from_journal
    fewer = squares(30)
    fewer.run(journal=path)
    assert (fewer.evaluated, fewer.stored) == (0, list(range(30)))


def objects(count):
    return Counted([{"at": i, "array": np.arange(i)} for i in range(count)], lambda job: (job["at"], job["array"].sum(), "text"))


KINDS = {
    "numbers": ("f8", "f8", [0.5, -0.0, np.nan, np.inf, 1e300], lambda job: np.float64(job) * 2),
    "arrays": (("i8", (2, 3)), ("f4", 4), [np.full((2, 3), i) for i in range(9)], lambda job: np.full(4, job[0, 0], "f4")),
    "records": (RECORD, RECORD, [(float(i), i, (i, -i)) for i in range(9)], lambda job: (job["x"] / 3, 7, (np.nan, 1))),
    "padded": (PADDED, PADDED, [(i, float(i)) for i in range(9)], lambda job: job),
    "big endian": (">f8", ">i2", [float(i) for i in range(9)], lambda job: int(job) * 3),
    "times": ("M8[ns]", "U7", [np.datetime64(i, "ns") for i in range(9)], lambda job: f"{job.astype(int)} ns"),
    "large": ("i8", ("f8", 1 << 20), [1, 2, 3], lambda job: np.arange(1 << 20) * float(job)),
    "objects": (None, None, [{"i": i, "text": "x" * i} for i in range(9)], lambda job: (job["i"], {"a": [None, job["text"]]})),
    "objects to numbers": (None, ("f8", 2), [("a", i) for i in range(9)], lambda job: np.array([job[1], np.nan])),
    "numbers to objects": ("i4", None, list(range(9)), lambda job: None if job == 3 else str(job)),
    "large objects": (None, None, [np.arange(300_000.0) + i for i in range(3)], lambda job: [job * 2] * 4),
}


@pytest.mark.parametrize("grain", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_results_of_every_kind_come_back_to_the_bit(path, kind, grain):
    job_dtype, result_dtype, jobs, process = KINDS[kind]

    def sweep(count):
        return Counted(jobs[:count], process, job_dtype, result_dtype, grain=grain)

    alone = sweep(len(jobs))
    alone.run()
    sweep(len(jobs) - 2).run(journal=path)
    second = sweep(len(jobs))
    second.run(journal=path)
    assert (second.evaluated, len(second.stored)) == (2, len(jobs) - 2)
    assert second.results.keys() == alone.results.keys()
    for index, result in alone.results.items():
        if isinstance(result, tuple | list | dict):
            assert pickle.dumps(second.results[index]) == pickle.dumps(result)
        else:
            assert same(second.results[index], result)


def test_padding_in_records_does_not_count(path):
    """It is whatever was in the memory before."""

    def rows(filler):
        block = np.full(8 * PADDED.itemsize, filler, "u1").view(PADDED)
        block["c"], block["x"] = np.arange(8), np.arange(8) / 3
        return block

    class Blocks(Counted):
        def next_jobs(self, count):
            block = self.job_list[self.at : self.at + count]
            self.at += len(block)
            return block if len(block) else None

    for filler in (1, 2):
        sweep = Blocks(rows(filler), lambda job: job["x"], PADDED, "f8")
        sweep.run(journal=path)
        assert sweep.evaluated == (8 if filler == 1 else 0)


def test_a_mask_of_what_pads():
    nested = np.dtype([("a", PADDED, (2,)), ("b", "i2")], align=True)
    mask = journal.byte_mask(nested)
    assert mask.tolist() == 2 * ([True] + 7 * [False] + 8 * [True]) + [True, True] + 6 * [False]
    assert journal.byte_mask(np.dtype((PADDED, (3,)))).sum() == 27
    assert journal.byte_mask(np.dtype(("f8", (3, 2)))).all()


class InBlocks(Counted):
    def next_jobs(self, count):
        self.at, begin = min(self.at + count, len(self.job_list)), self.at
        block = self.job_list[begin : self.at]
        return (block if self.job_dtype is None else np.array(block, self.job_dtype)) if block else None

    def process_jobs(self, jobs, results):
        for at, job in enumerate(jobs):
            results[at] = self.process_job(job)

    def process_results(self, indices, jobs, results):
        assert len(indices) == len(jobs) == len(results) > 0
        for array in (indices, jobs, results):
            assert isinstance(array, list) or not array.flags.writeable
        for index, job, result in zip(indices.tolist(), jobs, results, strict=True):
            self.process_result(index, job, result)


@pytest.mark.parametrize("dtype", ["f8", None])
def test_block_hooks(path, dtype):
    def sweep(count):
        return InBlocks([float(i) for i in range(count)], lambda job: job * 3, dtype, dtype, grain=7)

    sweep(100).run(journal=path)
    second = sweep(120)
    second.run(journal=path)
    assert second.evaluated == 20
    assert second.stored == list(range(100))
    assert second.results == {i: 3.0 * i for i in range(120)}


@pytest.mark.parametrize("dtype", ["f8", None])
@pytest.mark.parametrize("kind", [Counted, InBlocks])
def test_failures_have_another_try(path, kind, dtype):
    jobs = [float(i) for i in range(40)]
    first = kind(jobs, lambda job: -job, dtype, dtype)
    first.bad = (5, 6, 30, 40)
    first.run(journal=path)
    assert first.failures == [4, 5, 29, 39]
    second = kind(jobs, lambda job: -job, dtype, dtype)
    second.bad = (1,)
    second.run(journal=path)
    assert (second.evaluated, second.failures) == (4, [4])
    assert len(second.stored) == 36
    third = kind(jobs, lambda job: -job, dtype, dtype)
    third.run(journal=path)
    assert (third.evaluated, third.stored) == (1, [i for i in range(40) if i != 4])
    assert third.results == {i: -float(i) for i in range(40)}


def test_a_failure_that_ends_the_run_loses_nothing(path):
    first = squares(20)
    first.bad, first.process_failure = (12,), JobDispatcher.process_failure.__get__(first)
    with pytest.raises(JobError):
        first.run(journal=path)
    second = squares(20)
    second.run(journal=path)
    assert (second.evaluated, len(second.stored)) == (9, 11)


def test_a_hook_that_raises_loses_no_result(path):
    """A result is laid down before the hook gets it; so are those that were computed with it."""
    first = squares(20, grain=4)

    def full(index, job, result):
        if index == 9:
            raise OSError("disk full")

    first.process_result = full
    with pytest.raises(OSError, match="disk full"):
        first.run(journal=path)
    second = squares(20, grain=4)
    second.run(journal=path)
    assert second.stored == list(range(12))


def test_ctrl_c_loses_no_result(path):
    first = squares(20)

    def stopped(index, job, result):
        if index == 9:
            os.kill(os.getpid(), signal.SIGINT)

    first.process_result = stopped
    with pytest.raises(KeyboardInterrupt):
        first.run(journal=path)
    second = squares(20)
    second.run(journal=path)
    assert second.stored == list(range(10))


# ---- which jobs ----------------------------------------------------------------------------------------------------


def test_another_job_set_is_refused(path):
    squares(50).run(journal=path)
    other = squares(50)
    other.job_list[17] += 1e-12
    told = r"a\.journal belongs to another set of jobs: job 17 .* by Counted\)\. For new jobs"
    with pytest.raises(JournalMismatchError, match=told) as caught:
        other.run(journal=path)
    assert "job_key" not in str(caught.value)
    assert len(contents(path)[0]) == 50
    with pytest.raises(JournalMismatchError, match=r"its results are \('<f8', \(\)\)"):
        objects(3).run(journal=path)


def test_another_set_of_objects_is_refused(path):
    objects(8).run(journal=path)
    other = objects(8)
    other.job_list[3]["array"][1] = 9
    with pytest.raises(JournalMismatchError, match=r"job 3 .*job_key can say"):
        other.run(journal=path)


SETS = """
import sys
from jd_hpc import JobDispatcher

class Sets(JobDispatcher):
    def reset(self):
        self.todo, self.stored = [{word + str(i) for word in ("a", "b", "c", "d")} for i in range(20)], 0
    def next_job(self):
        return self.todo.pop() if self.todo else None
    def process_job(self, job):
        return len(job)
    def process_result(self, index, job, result):
        self.stored += self.from_journal
    if sys.argv[2] == "key":
        def job_key(self, job):
            return sorted(job)
    elif sys.argv[2] == "bytes":
        def job_key(self, job):
            return "".join(sorted(job)).encode()

sets = Sets()
sets.run(journal=sys.argv[1])
print(sets.stored)
"""


@pytest.mark.parametrize("how", ["plain", "key", "bytes"])
def test_sets_pickle_differently_in_every_process(path, how):
    """Which is why there is job_key."""
    ends = []
    for seed in "12":
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(jd_hpc.__file__).parent.parent)}
        command = [sys.executable, "-c", SETS, str(path), how]
        ends.append(subprocess.run(command, capture_output=True, text=True, timeout=60, env=env))
    assert ends[0].stdout == "0\n", ends[0].stderr
    if how == "plain":
        assert "JournalMismatchError" in ends[1].stderr
    else:
        assert ends[1].stdout == "20\n", ends[1].stderr


def test_jobs_that_are_changed_by_who_runs_them(path):
    """Without MPI process_job gets the very object that next_job returned."""

    def eat(job):
        return job.pop()

    for evaluated in (6, 0):
        sweep = Counted([[i, i + 1] for i in range(6)], eat)
        sweep.run(journal=path)
        assert sweep.evaluated == evaluated


def test_one_array_for_all_jobs(path):
    class Reused(Counted):
        array = np.zeros(3)

        def next_job(self):
            value = super().next_job()
            if value is not None:
                self.array[:] = value
            return None if value is None else self.array

    for evaluated in (30, 0):
        sweep = Reused(list(range(30)), lambda job: job[0], ("f8", 3), "f8", grain=8)
        sweep.run(journal=path)
        assert sweep.evaluated == evaluated
        assert sweep.results == {i: float(i) for i in range(30)}


class Tree(JobDispatcher):
    """Each result makes two new jobs: next_job says None in between, also while stored results come."""

    job_dtype = "i8"
    result_dtype = ("i8", 2)

    def __init__(self, depth, **options):
        super().__init__(**options)
        self.depth = depth

    def reset(self):
        self.todo, self.seen, self.evaluated = [1], [], 0

    def next_job(self):
        return self.todo.pop(0) if self.todo else None

    def process_job(self, job):
        self.evaluated += 1
        return [2 * job, 2 * job + 1]

    def process_result(self, index, job, result):
        self.seen.append(int(job))
        self.todo += [int(child) for child in result if child < 2**self.depth]


@pytest.mark.parametrize("grain", [1, 5])
def test_results_that_make_jobs(path, grain):
    for depth, evaluated in ((4, 15), (6, 48), (6, 0), (3, 0)):
        tree = Tree(depth, grain=grain)
        tree.run(journal=path)
        assert tree.evaluated == evaluated
        assert sorted(tree.seen) == list(range(1, 2**depth))


def test_bad_jobs_are_named_while_stored_results_come(path):
    squares(10).run(journal=path)
    sweep = squares(10)
    sweep.job_list[7] = "seven"
    with pytest.raises(PayloadError, match="what next_job returned") as caught:
        sweep.run(journal=path)
    assert caught.value.__notes__ == ["This was job 7."]
    sweep = squares(10)
    sweep.allow_nan, sweep.job_list[7] = False, np.nan
    with pytest.raises(PayloadError, match="contains NaN"):
        sweep.run(journal=path)


def test_what_cannot_be_pickled(path):
    with pytest.raises(PayloadError, match="job 0, or its job_key, cannot be pickled"):
        Counted([lambda: 1], lambda job: 1).run(journal=path)
    with pytest.raises(PayloadError, match="the result of job 1 cannot be pickled, and so not be written to the journal"):
        Counted([0, 1], lambda job: (lambda: 1) if job else 1).run(journal=path)


class Vanishing:
    pass


def test_a_result_whose_class_is_gone(path, monkeypatch):
    Counted([0], lambda job: Vanishing()).run(journal=path)
    monkeypatch.delattr(f"{__name__}.Vanishing")
    with pytest.raises(JournalFormatError, match=r"the result of job 0 .* cannot be rebuilt .*importable"):
        Counted([0], lambda job: 1).run(journal=path)


# ---- the file --------------------------------------------------------------------------------------------------------


def test_the_environment_names_a_journal(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JD_HPC_JOURNAL", str(path))
    monkeypatch.setattr(journal, "_named_by_environment", iter([1, 2]))
    squares(5).run()
    squares(7).run(journal=tmp_path / "own")
    other = squares(3)
    other.job_list[0] = 9.0
    other.run()
    assert [len(contents(tmp_path / name)[0]) for name in ("a.journal", "own", "a.journal.2")] == [5, 7, 3]
    for name in ("own", "a.journal.2"):
        (tmp_path / name).unlink()
    monkeypatch.setenv("JD_HPC_JOURNAL", "")
    squares(3).run()
    assert names(tmp_path) == ["a.journal"]


def test_what_is_no_plain_file_stays_as_it_is(path):
    os.mkfifo(path)  # as empty as /dev/null is
    with pytest.raises(JournalWriteError, match="is no plain file, and left as it is"):
        squares(3).run(journal=path)
    assert path.is_fifo()
    assert list(path.parent.iterdir()) == [path]


def test_one_file_has_one_lock_whatever_it_is_called(path, tmp_path):
    (tmp_path / "link").symlink_to(path)

    def nested(index, job, result):
        if index == 0:
            with pytest.raises(JournalError, match="is held by"):
                squares(1).run(journal=tmp_path / "link")

    sweep = squares(2)
    sweep.process_result = nested
    sweep.run(journal=path)
    (tmp_path / "link").unlink()


def test_it_can_be_read_while_a_run_writes_it(path, monkeypatch):
    monkeypatch.setattr(journal_writer, "FLUSH_S", 0.02)
    seen = []

    def look(index, job, result):
        time.sleep(0.002)
        found, damage = contents(path)
        assert damage == [] or damage[0].until is None
        assert sorted(found) == list(range(len(found)))
        seen.append(len(found))

    sweep = squares(200)
    sweep.process_result = look
    sweep.run(journal=path)
    assert seen == sorted(seen)
    assert 0 < seen[100] <= 101
    assert len(contents(path)[0]) == 200


def test_a_long_hook_delays_nothing(path):
    """What was delivered before is on the disk while the hook still runs."""
    sweep = squares(5)

    def long(index, job, result):
        if index == 2:
            end = time.monotonic() + 30
            while not path.exists() or len(contents(path)[0]) < 3:
                assert time.monotonic() < end
                time.sleep(0.05)

    sweep.process_result = long
    sweep.run(journal=path)


def test_at_full_rate_blocks_are_large(path):
    count = 200_000

    class Fast(InBlocks):
        def next_jobs(self, most):
            rows = np.arange(self.at, min(self.at + most, count), dtype="f8")
            self.at += len(rows)
            return rows if len(rows) else None

        def process_jobs(self, jobs, results):
            results[:] = jobs

        def process_results(self, indices, jobs, results):
            self.results[len(self.results)] = (len(indices), float(results.sum()), self.from_journal)

    for from_journal in (False, True):
        sweep = Fast([], None, "f8", "f8", grain=1000)
        sweep.run(journal=path)
        assert sum(n for n, _, _ in sweep.results.values()) == count
        assert sum(total for _, total, _ in sweep.results.values()) == count * (count - 1) / 2
        assert all(mark is from_journal for _, _, mark in sweep.results.values())
    assert len(block_bounds(path)) < 30


def test_results_waiting_for_the_disk_are_bounded(path, monkeypatch):
    monkeypatch.setattr(journal_writer, "WAITING_MOST_BYTES", 1 << 16)
    monkeypatch.setattr(journal_writer, "FLUSH_BYTES", 1 << 14)
    sweep = Counted(list(range(60)), lambda job: np.full(4096, job), "i8", ("f8", 4096))
    sweep.run(journal=path)
    assert len(contents(path)[0]) == 60
    assert len(block_bounds(path)) == 60


@pytest.mark.parametrize(("result_dtype", "room_bytes"), [("f8", 200_000), (("f8", 5000), 1_500_000)])
def test_a_full_disk(path, result_dtype, room_bytes):
    """RLIMIT_FSIZE stands for it: a write of which a part, or nothing, is taken."""
    jobs = [float(i) for i in range(10_000)]
    sweep = Counted(jobs, lambda job: np.full(np.dtype(result_dtype).shape, job)[()], "f8", result_dtype, grain=5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, hard))
    try:
        told = rf"cannot be written any more: {os.strerror(errno.EFBIG)}\. The \d+ bytes that are there are kept"
        with pytest.raises(JournalWriteError, match=told):
            sweep.run(journal=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    found, damage = contents(path)
    assert len(found) >= (20 if room_bytes > 200_000 else 0)  # what was to be one block is not there in part
    assert damage == []
    again = Counted(sweep.job_list[: len(found) + 10], sweep.process, "f8", result_dtype)
    again.run(journal=path)
    assert (again.evaluated, len(again.stored)) == (10, len(found))


def test_a_disk_that_is_full_from_the_start(path, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1100):  # no room for the lock, none for the journal
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(JournalWriteError, match=os.strerror(errno.EFBIG)):
                squares(5 if limit == 0 else 5000).run(journal=path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_users_keep_is_theirs(path):
    """A small stored result does not keep the others that were read with it, and may be written to."""
    squares(2000).run(journal=path)
    arrays = Counted(list(range(3)), lambda job: np.zeros(4), "i8", ("f8", 4))
    arrays.run(journal=path.with_name("arrays"))
    again = Counted(list(range(3)), None, "i8", ("f8", 4))
    again.run(journal=path.with_name("arrays"))
    path.with_name("arrays").unlink()
    again.results[0][:] = 1
    assert again.results[1].tolist() == [0, 0, 0, 0]
    assert again.results[0].base is None


def test_stored_results_are_not_collected(path):
    living = weakref.WeakSet()

    class Token:
        def __init__(self):
            living.add(self)

        def __reduce__(self):
            return Token, ()

    globals()["Token"] = Token
    Token.__qualname__ = "Token"
    try:
        most = 0
        for _ in range(2):
            sweep = Counted(list(range(500)), lambda job: Token())
            living.clear()

            def process_result(index, job, result):
                nonlocal most
                most = max(most, len(living))

            sweep.process_result = process_result
            sweep.run(journal=path)
        assert most <= 4
    finally:
        del globals()["Token"]


def test_isolated_jobs(path):
    """The process that runs them is a child of the one that writes."""

    def sweep(count):
        return Counted(list(range(count)), lambda job: os._exit(3) if job == 5 else job, grain=2, isolate=True, max_attempts=1)

    first = sweep(10)
    first.run(journal=path)
    assert first.failures == [5]
    second = sweep(12)
    second.run(journal=path)
    assert len(second.stored) == 9
    assert second.failures == [5]


def test_without_a_journal_there_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = squares(5)
    sweep.run()
    assert names(tmp_path) == []
    assert sweep.stats == {"jobs": 5, "from journal": 0}

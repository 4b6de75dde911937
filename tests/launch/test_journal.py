"""A master that is killed at any moment: the same script goes on, whatever the number of ranks, and computes nothing twice."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

import numpy as np
import pytest

from jd_hpc.journal_file import JournalReader

KILLS = 200
COUNT = 4000
SEED = random.randrange(1 << 30)


@pytest.fixture
def files(tmp_path):
    return tmp_path / "a.journal", tmp_path / "evaluations"


def stored(journal):
    if not journal.exists():
        return set()
    with JournalReader(str(journal)) as reader:
        found = {index for block in reader.blocks() for index in block.indices.tolist()}
        assert all(damage.until is None for damage in reader.damage)
        return found


def evaluated(evaluations):
    return [int(line) for line in evaluations.read_text().split()] if evaluations.exists() else []


def answer_of(count):
    """What an uninterrupted run prints: the hash of all results."""
    results = np.zeros(count, [("sum", "f8"), ("n", "i4")])
    results["n"] = np.arange(count)
    results["sum"] = np.arange(count) * np.pi
    return hashlib.sha256(results.tobytes()).hexdigest()


def test_masters_killed_at_random_moments(launch, tmp_path):
    print("seed", SEED)
    ended = launch(0, "journal_kills.py", tmp_path, KILLS, SEED).wait(120)
    assert ended.code == 0, ended
    killed = [int(line.split()[1]) for line in ended.out.splitlines()]
    assert len(killed) == 2, ended
    assert sum(killed) > 0.9 * KILLS, "nearly all were to be killed in the middle of a run"


@pytest.mark.parametrize("sizes", [(2, 4, 3), (0, 3, 2)], ids=lambda sizes: "-".join(map(str, sizes)))
def test_a_killed_run_goes_on_with_another_number_of_ranks(launch, files, sizes):
    journal, evaluations = files
    print("seed", SEED)
    chance = random.Random(SEED)
    for size in sizes:
        before = stored(journal)
        evaluations.unlink(missing_ok=True)
        kill_after_s = chance.uniform(1.3, 2.0)  # more than one second, after which all is written
        mpi = ["mpi"] if size else []
        ended = launch(size, "journaled.py", journal, evaluations, COUNT, kill_after_s, 0.004, *mpi).wait(60)
        assert "answer" not in ended.out, ended
        assert before.isdisjoint(evaluated(evaluations)), "a stored result was computed again"
        assert before <= stored(journal)
        assert evaluated(evaluations)
    before = stored(journal)
    assert before
    evaluations.unlink()
    last = launch(4, "journaled.py", journal, evaluations, COUNT, 0, 0, "mpi").wait(60)
    assert last.code == 0, last
    assert "is taken over" in last.err
    assert last.out.split() == ["answer", str(COUNT), str(len(before)), answer_of(COUNT)]
    assert sorted(evaluated(evaluations)) == sorted(set(range(COUNT)) - before)


def test_a_crash_loses_one_second(launch, files):
    """What was computed long enough before the end is on the disk."""
    journal, evaluations = files
    ended = launch(2, "journaled.py", journal, evaluations, 10_000, 3.0, 0.01, "mpi").wait(60)
    assert "answer" not in ended.out, ended
    there, done = stored(journal), evaluated(evaluations)
    assert len(done) > 60
    assert set(done[: len(done) // 3]) <= there, "what was done in the first of three seconds was lost"


def test_a_second_writer_is_refused(launch, files):
    journal, evaluations = files
    first = launch(2, "journaled.py", journal, evaluations, 100_000, 0, 0.01, "mpi")
    end = time.monotonic() + 30
    while not journal.exists() or not stored(journal):
        assert time.monotonic() < end, "nothing is written"
        time.sleep(0.05)
    second = launch(3, "journaled.py", journal, evaluations, 100_000, 0, 0.01, "mpi").wait(30)
    assert second.code != 0
    assert "JournalHeldError: the journal" in second.err
    holder = next(word for word in second.err.split("is held by process ")[1].split())
    assert int(holder) in first.pids()
    third = launch(0, "journaled.py", journal, evaluations, 100_000, 0, 0.01).wait(30)
    assert f"is held by process {holder} on " in third.err
    assert first.process.poll() is None, "the first one is not disturbed"
    first.kill()
    before = stored(journal)
    there = Path(f"{journal}.lock").exists()
    assert there, "it was killed"
    count = max(before) + 1
    last = launch(0, "journaled.py", journal, evaluations, count, 0, 0).wait(30)
    assert last.out.split() == ["answer", str(count), str(len(before)), answer_of(count)], last

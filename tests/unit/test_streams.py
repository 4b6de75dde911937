"""Random streams: one for every job, the same wherever and however often it runs."""

from __future__ import annotations

import os
import pickle
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jd_hpc import JobDispatcher, JobError, JournalMismatchError, KernelError
from jd_hpc.dispatcher import INDEX_MOST
from jd_hpc.journal_file import JournalReader
from jd_hpc.journal_tools import merge
from jd_hpc.kernel import CFUNCTYPE
from jd_hpc.streams import SEED_MOST, stream

COUNT = 23
NUMBERS = [
    [1476086326634632317, 3288605326491853766],
    [3650948999893336939, 5477120532830486109],
    [7410529751722547032, 4671287652612380891],
]
SEEDS = st.integers(0, SEED_MOST)
INDICES = st.integers(0, INDEX_MOST)


class Drawn(JobDispatcher):
    """Every job draws what its stream gives."""

    job_dtype = "f8"
    result_dtype = ("f8", 3)

    def __init__(self, count=COUNT, **options):
        super().__init__(**options)
        self.count = count

    def reset(self):
        self.at = 0
        self.out = np.full((self.count, 3), np.nan)
        self.stored = 0

    def next_job(self):
        self.at += 1
        return float(self.at - 1) if self.at <= self.count else None

    def process_job(self, job, rng):
        return rng.random(3) + job

    def process_result(self, index, job, result):
        self.out[index] = result
        self.stored += self.from_journal

    def postprocess(self):
        return self.out


class DrawnObjects(Drawn):
    job_dtype = result_dtype = None


class DrawnBlocks(Drawn):
    def process_jobs(self, jobs, results):
        for at, job in enumerate(jobs):
            results[at] = self.process_job(job, self.rng(self.first_index + at))


class DrawnObjectBlocks(DrawnBlocks):
    job_dtype = result_dtype = None


KINDS = [Drawn, DrawnObjects, DrawnBlocks, DrawnObjectBlocks]


def expected(seed, count=COUNT):
    return np.array([stream(seed, index).random(3) + index for index in range(count)])


@given(SEEDS, INDICES)
def test_a_stream_is_known_by_seed_and_number(seed, index):
    one, other = stream(seed, index), stream(seed, index)
    assert np.array_equal(one.random(5), other.random(5))
    assert np.array_equal(one.integers(1 << 60, size=5), other.integers(1 << 60, size=5))


@given(st.lists(st.tuples(SEEDS, INDICES), min_size=2, max_size=2, unique=True))
def test_no_two_streams_share_key_and_counter(pairs):
    """Philox gives each (key, counter) a block of its own: streams that differ in the key or in the highest word never meet."""
    states = [stream(*pair).bit_generator.state["state"] for pair in pairs]
    assert len({(tuple(state["key"].tolist()), int(state["counter"][3])) for state in states}) == 2
    assert all(state["counter"][:3].tolist() == [0, 0, 0] for state in states)
    draws = [stream(*pair).bytes(32) for pair in pairs]
    assert draws[0] != draws[1]


def test_the_numbers_are_those_of_always():
    """They are in people's results: they must not change with a version."""
    assert stream(0, 0).integers(1 << 63, size=2).tolist() == NUMBERS[0]
    assert stream(12345, 678).integers(1 << 63, size=2).tolist() == NUMBERS[1]
    assert stream(12345, 678).spawn(2)[1].integers(1 << 63, size=2).tolist() == NUMBERS[2]


def test_jumps_stay_in_the_stream():
    far = stream(3, 4).bit_generator.jumped(1 << 40).state["state"]["counter"]
    assert (int(far[3]), int(far[2])) == (4, 1 << 40)


def test_children_are_reproducible_and_different():
    first, again = stream(1, 2), stream(1, 2)
    children = [*first.spawn(2), *first.spawn(1)]
    draws = [child.bytes(16) for child in children]
    assert draws == [child.bytes(16) for child in [*again.spawn(2), *again.spawn(1)]]
    assert len({*draws, *(child.bytes(16) for child in stream(1, 3).spawn(3)), first.bytes(16)}) == 7


def test_a_stream_can_be_pickled():
    one = stream(5, 6)
    one.random()
    other = pickle.loads(pickle.dumps(one))
    assert one.random() == other.random()
    assert one.spawn(1)[0].random() == other.spawn(1)[0].random()


def test_streams_look_independent():
    """Neighbours in number and in seed: correlations as small as chance has it."""
    draws = np.array([stream(seed, index).standard_normal(4000) for seed in range(8) for index in range(8)])
    correlations = np.corrcoef(draws)[np.triu_indices(64, 1)]
    assert np.abs(correlations).max() < 6 / np.sqrt(4000)
    firsts = np.array([stream(9, index).random() for index in range(20_000)])  # the first numbers, across streams
    assert abs(firsts.mean() - 0.5) < 6 / np.sqrt(12 * 20_000)
    assert abs(np.corrcoef(firsts[1:], firsts[:-1])[0, 1]) < 6 / np.sqrt(20_000)


@pytest.mark.parametrize("options", [{}, {"isolate": True}], ids=["plain", "isolate"])
@pytest.mark.parametrize("grain", [1, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_draws_the_same(kind, grain, options):
    assert np.array_equal(kind(rng=True, seed=11, grain=grain, **options).run(), expected(11))


def test_another_seed_is_another_result():
    assert not np.isin(Drawn(rng=True, seed=1).run(), Drawn(rng=True, seed=2).run()).any()


class DiesOnce(Drawn):
    """The process of its own dies at some jobs, after it has drawn: the next one draws the same."""

    folder = ""

    def process_job(self, job, rng):
        result = super().process_job(job, rng)
        if job in (0, 5, 6, 22):
            try:
                os.close(os.open(f"{self.folder}/{job}", os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
            except FileExistsError:
                pass
        return result


@pytest.mark.parametrize("grain", [1, 7])
def test_a_process_that_died_changes_nothing(tmp_path, grain):
    DiesOnce.folder = str(tmp_path)
    assert np.array_equal(DiesOnce(rng=True, seed=3, grain=grain, isolate=True).run(), expected(3))
    assert len(list(tmp_path.iterdir())) == 4


def test_without_rng_there_is_no_second_argument():
    with pytest.raises(JobError, match="missing 1 required positional argument: 'rng'"):
        Drawn().run()


def test_a_kernel_cannot_draw():
    kernel = CFUNCTYPE(lambda job, result, data: 0)
    with pytest.raises(KernelError, match="rng=True: a compiled kernel cannot draw"):
        type("Compiled", (Drawn,), {"kernel": kernel})(rng=True).run()


@pytest.mark.parametrize("options", [{"seed": -1}, {"seed": 1 << 64}])
def test_seeds_out_of_range(options):
    with pytest.raises(ValueError, match=r"seed = .* is out of range"):
        Drawn(**options)


@pytest.mark.parametrize(("index", "kind"), [(-1, ValueError), (1 << 63, ValueError), (0.5, TypeError)])
def test_no_number_of_a_job(index, kind):
    with pytest.raises(kind, match="index = "):
        Drawn().rng(index)


def test_a_resume_draws_the_same(tmp_path):
    path = tmp_path / "a.journal"
    Drawn(9, rng=True, seed=5).run(journal=path)
    second = Drawn(rng=True, seed=5, grain=4)
    assert np.array_equal(second.run(journal=path), expected(5))
    assert second.stored == 9


def test_a_journal_belongs_to_a_seed(tmp_path):
    path = tmp_path / "a.journal"
    Drawn(rng=True, seed=5).run(journal=path)
    with JournalReader(str(path)) as reader:
        assert reader.facts.seed == 5
    with pytest.raises(JournalMismatchError, match=r"holds results of seed 5 .* this run has seed 6: other numbers"):
        Drawn(rng=True, seed=6).run(journal=path)
    with pytest.raises(JournalMismatchError, match=r"this run has no seed \(no rng=True"):
        DrawnBlocks(seed=5).run(journal=path)


def test_merging_minds_the_seed(tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for seed, path in enumerate(paths):
        Drawn(rng=True, seed=seed).run(journal=path)
    with pytest.raises(JournalMismatchError, match="different seeds"):
        merge(str(tmp_path / "same"), paths, "same")
    merge(str(tmp_path / "copy"), paths[1:], "same")
    copied = Drawn(rng=True, seed=1)
    assert np.array_equal(copied.run(journal=tmp_path / "copy"), expected(1))
    assert copied.stored == COUNT
    merge(str(tmp_path / "both"), paths, "append")
    with JournalReader(str(tmp_path / "both")) as reader:
        assert reader.facts.seed is None

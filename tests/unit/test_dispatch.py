"""dispatch() with no MPI: jobs in, results out, collectors, errors. tests/mpi/test_dispatch.py does the same with slaves."""

from __future__ import annotations

import itertools
import threading
import tracemalloc

import pytest

from jd_hpc import CallError, CollectorError, Executor, JobError, Pool, dispatch
from jd_hpc.dispatch import parts_of


class Boom(Exception):
    """Raised on purpose."""


def square(n):
    return n * n


def fail_on(n, wrong):
    if n == wrong:
        raise Boom("three")
    return n * n


made = []
"""The jobs of noted_fail_on."""


def noted_fail_on(n, wrong):
    made.append(n)
    return fail_on(n, wrong)


def collect(seen, ends=None):
    """A collector that notes what it gets."""
    try:
        while True:
            seen.append((yield))
    except GeneratorExit:
        if ends is not None:
            ends.append("closed")


def until_seen(seen, enough):
    """Jobs until a result is large enough."""
    for n in itertools.count():
        if any(result >= enough for _, _, result in seen):
            return
        yield square, [n]


def test_results_come_in_the_order_of_the_jobs():
    assert dispatch([(square, [n]) for n in range(10)]) == [n * n for n in range(10)]
    assert dispatch((square, [n]) for n in range(10)) == [n * n for n in range(10)]
    assert dispatch([]) == []


def test_results_go_to_a_collector():
    seen, ends = [], []
    jobs = [(square, [n], None, f"extra {n}") for n in range(5)]
    assert dispatch(jobs, collect(seen, ends)) is None
    assert seen == [(n, jobs[n], n * n) for n in range(5)]
    assert seen[3][1] is jobs[3]
    assert ends == ["closed"]


@pytest.mark.parametrize(("wanted", "result"), [(None, None), (False, None), (True, [0, 1, 4])])
def test_both(wanted, result):
    seen = []
    assert dispatch([(square, [n]) for n in range(3)], collect(seen), build_result_list=wanted) == result
    assert len(seen) == 3


def test_neither():
    assert dispatch([(square, [2])], build_result_list=False) is None


def test_lambdas_and_closures_need_no_pickle_here():
    lock = []
    assert dispatch([(lambda: lock.append(1),)] * 2, remote=False) == [None, None]
    assert lock == [1, 1]


@pytest.mark.parametrize("grain", [1, 4])
def test_a_generator_may_go_by_what_the_collector_has_seen(grain):
    seen = []
    dispatch(until_seen(seen, 100), collect(seen), grain=grain)
    results = [result for _, _, result in seen]
    assert any(result >= 100 for result in results)
    assert len(results) <= 10 + grain


def test_a_generator_may_wait_for_results():
    seen = []

    def rounds():
        for size in (3, 2, 4):
            before = len(seen)
            for n in range(size):
                yield square, [n]
            while len(seen) < before + size:
                yield None

    dispatch(rounds(), collect(seen), grain=5)
    assert [result for _, _, result in seen] == [0, 1, 4, 0, 1, 0, 1, 4, 9]


def test_a_generator_that_waits_for_nothing():
    with pytest.raises(CallError, match=r"None in place of job 1, .* no job is on its way. Return from the generator"):
        dispatch([(square, [1]), None, (square, [2])])


def test_a_failing_job_ends_the_run():
    seen, ends = [], []
    with pytest.raises(JobError, match=r"job 3 failed .*Boom: three") as caught:
        dispatch([(fail_on, [n, 3]) for n in range(10)], collect(seen, ends))
    assert caught.value.index == 3
    assert isinstance(caught.value.__cause__, Boom)
    assert len(seen) == 3
    assert ends == ["closed"]


def test_a_failing_job_in_the_place_of_its_result():
    results = dispatch([(fail_on, [n, 3]) for n in range(5)], on_error="return")
    assert results[:3] + results[4:] == [0, 1, 4, 16]
    assert isinstance(results[3], JobError)
    assert isinstance(results[3].__cause__, Boom)
    with pytest.raises(ValueError, match="on_error = 'ignore' is unknown"):
        dispatch([], on_error="ignore")


def test_a_generator_that_raises():
    def jobs():
        yield square, [1]
        raise Boom("no more")

    seen, ends = [], []
    with pytest.raises(Boom) as caught:
        dispatch(jobs(), collect(seen, ends))
    assert caught.value.__notes__ == ["jobs raised this when it was asked for job 1."]
    assert (len(seen), ends) == (1, ["closed"])


def test_what_is_no_iterable():
    with pytest.raises(CallError, match="jobs is 5; give a list or a generator"):
        dispatch(5)


def test_a_collector_that_raises():
    ends = []

    def strict():
        try:
            while True:
                index, _job, _result = yield
                if index == 2:
                    raise Boom("I do not like it")
        finally:
            ends.append("closed")

    with pytest.raises(Boom) as caught:
        dispatch([(square, [n]) for n in range(5)], strict())
    assert caught.value.__notes__ == ["The collector raised this when it was given the result of job 2."]
    assert ends == ["closed"]


def test_a_collector_that_raises_when_it_is_closed():
    def late():
        try:
            while True:
                yield
        except GeneratorExit:
            raise Boom("cannot write the report") from None

    with pytest.raises(Boom):
        dispatch([(square, [1])], late())


def test_a_collector_that_ends_early():
    def two():
        yield
        yield

    with pytest.raises(CollectorError, match=r"ended when it was given the result of job 1.*while True"):
        dispatch([(square, [n]) for n in range(5)], two())


def test_what_is_no_collector():
    def none_at_all():
        return
        yield

    started = collect([])
    next(started)
    for given, words in [(collect, "is no coroutine; call a"), ([], "is no coroutine"), (none_at_all(), "ended before it came"),
                         (started, "was started before")]:  # fmt: skip
        with pytest.raises(CollectorError, match=words):
            dispatch([(square, [1])], given)


def test_a_collector_may_be_any_object_with_these_methods():
    class Sum:
        total = 0

        def __next__(self):
            self.is_open = True

        def send(self, given):
            self.total += given[2]

        def close(self):
            self.is_open = False

    total = Sum()
    dispatch([(square, [n]) for n in range(4)], total)
    assert (total.total, total.is_open) == (14, False)


def test_a_journal_remembers(tmp_path):
    made.clear()
    jobs = [(noted_fail_on, [n, 3], None, n) for n in range(6)]
    with pytest.raises(JobError):
        dispatch(jobs, journal=tmp_path / "journal")
    seen = []
    dispatch(jobs, collect(seen), journal=tmp_path / "journal", on_error="return")
    assert made == [0, 1, 2, 3, 3, 4, 5]
    assert [index for index, _, _ in seen] == list(range(6))
    assert all(job is jobs[index] for index, job, _ in seen)
    assert [result for index, _, result in seen if index != 3] == [0, 1, 4, 16, 25]


def test_memory_does_not_grow_with_the_number_of_jobs():
    def many(count):
        sums = []
        dispatch(((square, [n]) for n in range(count)), keep_sum(sums))
        return sums

    def keep_sum(sums):
        total = 0
        try:
            while True:
                total += (yield)[2]
        except GeneratorExit:
            sums.append(total)

    many(100)
    tracemalloc.start()
    peaks = []
    for count in (1_000, 30_000):
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        assert many(count) == [sum(n * n for n in range(count))]
        peaks.append(tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    assert peaks[1] < peaks[0] + 50_000, peaks


def test_an_endless_generator_is_asked_no_further_than_needed():
    asked = itertools.count()

    def endless():
        while True:
            yield fail_on, [next(asked), 20]

    with pytest.raises(JobError):
        dispatch(endless())
    assert next(asked) == 21


def power(a, b=2):
    return a**b


@pytest.mark.parametrize(
    ("job", "parts"),
    [
        ((power,), (power, (), {})),
        ([power, [1]], (power, (1,), {})),
        ((power, None, {"b": 2}), (power, (), {"b": 2})),
        ((power, range(2), None), (power, (0, 1), {})),
        ((power, (1, 2), {}, "extra", threading.Lock()), (power, (1, 2), {})),
    ],
)
def test_what_may_be_missing(job, parts):
    assert parts_of(job, 0) == parts


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (5, ["job 7 is 5", "(callable, args, kwargs)"]),
        ((), ["job 7 is ()"]),
        (power, ["job 7 is <function power", "did you mean (power,)?"]),
        ("abc", ["job 7 is 'abc'"]),
        ((5, [1]), ["job 7: 5 cannot be called"]),
        ((power, 5), ["job 7: args is 5", "a single one as [x]"]),
        ((power, "ab"), ["args is 'ab'"]),
        ((power, {"a": 1}), ["args is {'a': 1}"]),
        ((power, [1], [2]), ["kwargs is [2]", "a dict"]),
        ((power, [1], {1: 2}), ["kwargs is {1: 2}"]),
    ],
)
def test_what_is_no_job(job, words):
    with pytest.raises(CallError) as caught:
        parts_of(job, 7)
    for word in words:
        assert word in str(caught.value)
    with pytest.raises(CallError):
        dispatch([(square, [1]), job])


@pytest.mark.parametrize("face", [lambda: dispatch([], rng=True), lambda: Executor(rng=True), lambda: Pool(rng=True)])
def test_calls_get_no_random_streams(face):
    with pytest.raises(TypeError, match=r"a call gets no random stream. Cure: "):
        face()

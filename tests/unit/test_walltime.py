"""When jobs no longer go out: formats, the estimate, the decision; all in virtual time."""

from __future__ import annotations

import math
import signal
import time

import numpy as np
import pytest

from jd_hpc import JobDispatcher, Unfinished, WalltimeError, allocation, ending
from jd_hpc.signals import AGAIN_S, Asked, Drains, asked, pass_on
from jd_hpc.walltime import ASK_EVERY_S, LOOK_EVERY_S, TERM_LIMIT_S, Drain, Pace, Walltime, parse


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("0.5", 0.5), ("2:30", 150), ("3:50:00", 13800), ("1-0", 86400), ("2-03:04", 183840), ("1-02:03:04\n", 93784)],
)
def test_formats(text, seconds):
    assert parse(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "-5", "1:2:3:4", "1-2:3:4:5", "UNLIMITED", "1:", "nan"])
def test_what_is_no_time(text):
    with pytest.raises(WalltimeError, match=r"is no time\. Cure: seconds, MM:SS"):
        parse(text)


# ---- the estimate --------------------------------------------------------------------------------------------------------


def test_jobs_that_take_the_same():
    pace = Pace()
    assert pace.high_s == 0
    highs = []
    for _ in range(200):
        pace.learn(2.0)
        highs.append(pace.high_s)
    assert highs[0] == 6  # one job says little
    assert highs == sorted(highs, reverse=True)
    assert highs[-1] == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_few_jobs_take_longer_than_expected(seed):
    draw = np.random.default_rng(seed)
    for take in (lambda: draw.uniform(1, 3), lambda: draw.exponential(), lambda: draw.lognormal(0, 0.5)):
        pace = Pace()
        over = 0
        for count in range(3000):
            job_s = take()
            over += count >= 20 and job_s > pace.high_s
            pace.learn(job_s)
        assert over < 0.05 * 3000


def test_one_that_takes_very_long_is_forgotten():
    pace = Pace()
    for job_s in [*[1.0] * 50, 600.0]:
        pace.learn(job_s)
    assert pace.high_s > 100
    for _ in range(200):
        pace.learn(1.0)
    assert pace.high_s < 2


# ---- the end -------------------------------------------------------------------------------------------------------------


def drain_for(left_s, margin_s=0.0, grain=1, credit=2):
    """A drain with an end that time runs to, from 0."""
    return Drain(grain, credit, Walltime(lambda: left_s - clock["now"], margin_s))


clock = {"now": 0.0}


def tick(drain, now, job_s=()):
    clock["now"] = now
    return drain.tick(now, job_s)


def test_until_something_is_learned_jobs_go_out():
    drain = drain_for(100, margin_s=10)
    assert [tick(drain, now) for now in (0, 50, 89.9)] == [2, 2, 2]
    assert not drain.cut_off
    assert tick(drain, 90) == 0
    assert (drain.cut_off, drain.reason) == (True, "the time is over")


def test_the_end_comes_near():
    """A second batch is run after the first: it goes first."""
    drain = drain_for(100, margin_s=10)
    seconds = [4.0] * 400
    assert tick(drain, 0, seconds) == 2
    assert drain.pace.high_s == pytest.approx(4)
    assert [tick(drain, now) for now in (81.9, 82.1, 85.9, 86.1, 89.9)] == [2, 1, 1, 0, 0]
    assert drain.reason == "0.1 s are left, and a job may take 4 s"
    assert not drain.cut_off


def test_a_batch_takes_as_long_as_its_jobs():
    drain = drain_for(100, grain=5, credit=4)
    assert [tick(drain, now, [2.0] * 300) for now in (0, 60.1, 80.1, 90.1)] == [4, 3, 1, 0]
    assert drain.reason == "9.9 s are left, and 5 jobs may take 10 s"


def test_jobs_that_become_shorter_go_out_again():
    drain = drain_for(100)
    assert tick(drain, 95, [10.0] * 100) == 0
    assert tick(drain, 96, [0.1] * 300) == 2


def test_the_function_is_asked_now_and_then():
    asked_at = []

    def left():
        asked_at.append(clock["now"])
        return 50.0 if len(asked_at) < 3 else math.inf

    drain = Drain(1, 2, Walltime(left, 0.0))
    for now in np.arange(0, 3 * ASK_EVERY_S, LOOK_EVERY_S):
        assert tick(drain, now) == 2
    assert asked_at == pytest.approx([0, ASK_EVERY_S, 2 * ASK_EVERY_S], abs=2 * LOOK_EVERY_S)
    assert tick(drain, 1e6) == 2


@pytest.mark.parametrize("answer", [None, "60", math.nan])
def test_a_function_that_returns_nonsense(answer):
    with pytest.raises(WalltimeError, match=r"returned .* Cure: return the seconds"):
        Drain(1, 2, Walltime(lambda: answer, 0.0)).tick(0)


@pytest.mark.parametrize("answer", [np.int64(50), np.float32(50), 50, True, -math.inf])
def test_any_number_is_one(answer):
    drain = Drain(1, 2, Walltime(lambda: answer, 0.0))
    assert tick(drain, 0) == (2 if answer > 0 else 0)


def test_a_function_that_fails():
    with pytest.raises(WalltimeError, match="the walltime function failed: ZeroDivisionError"):
        Drain(1, 2, Walltime(lambda: 1 / 0, 0.0)).tick(0)


# ---- signals -------------------------------------------------------------------------------------------------------------


def test_usr2_drains_without_a_limit():
    drain = Drain(1, 2, None)
    pass_on(drain, 5.0, 1, signal.SIGUSR2, 3)
    assert (drain.tick(5.0), drain.reason, drain.cut_off) == (0, "SIGUSR2 at rank 3", False)
    assert drain.tick(1e6) == 0
    assert not drain.cut_off
    assert drain.stop_by_s(10.0, 1.0) == math.inf


def test_after_term_what_runs_has_little_time():
    drain = drain_for(1000)
    assert tick(drain, 0) == 2
    pass_on(drain, 1.0, 2, signal.SIGTERM, 0)
    assert tick(drain, 1.0) == 0
    assert not drain.cut_off
    assert drain.stop_by_s(1.0, 1.0) == 1.0 + TERM_LIMIT_S + 1.0
    tick(drain, 1.1 + TERM_LIMIT_S)
    assert drain.cut_off
    assert drain.stop_by_s(30.0, 1.0) == 31.0


def test_a_second_term_is_at_once():
    drain = Drain(1, 2, None)
    pass_on(drain, 1.0, 2, signal.SIGTERM, 0)
    pass_on(drain, 3.0, 3, signal.SIGTERM, 2)
    assert drain.tick(3.0) == 0
    assert (drain.cut_off, drain.reason) == (True, "SIGTERM at rank 0")


def test_one_term_may_come_twice():
    heard = Asked()
    heard.hear(signal.SIGUSR2, 0.0)
    assert (heard.level, heard.number) == (1, signal.SIGUSR2)
    heard.hear(signal.SIGTERM, 1.0)
    heard.hear(signal.SIGTERM, 1.0 + AGAIN_S)
    assert (heard.level, heard.number) == (2, signal.SIGTERM)
    heard.hear(signal.SIGTERM, 1.1 + AGAIN_S)
    heard.hear(signal.SIGUSR2, 9.0)
    assert (heard.level, heard.number) == (3, signal.SIGTERM)
    heard.forget()
    heard.hear(signal.SIGTERM, 10.0)
    assert heard.level == 2


def test_handlers_are_there_during_a_run_only():
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append(1))  # the user's own
    try:
        with Drains() as heard:
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGTERM)
            assert heard is asked
            assert (asked.level, got) == (1, [1])
            with Drains() as inner:  # of a run inside a job
                assert inner is None
            signal.raise_signal(signal.SIGUSR2)
    finally:
        asked.forget()
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


# ---- who knows the end -----------------------------------------------------------------------------------------------------


def left(given, **environ):
    function = allocation.left_of(given, environ)
    return None if function is None else function()


def test_sources():
    now = time.time()
    assert left(None) is None
    assert left(None, JD_HPC_WALLTIME=f"{now + 50}") == pytest.approx(50, abs=5)
    assert left(None, JD_HPC_WALLTIME=f"{now + 50}", SLURM_JOB_END_TIME=f"{now + 20:.0f}") == pytest.approx(20, abs=5)
    assert left(lambda: 7, JD_HPC_WALLTIME=f"{now + 50}") == 7
    assert left(10_000.0) == pytest.approx(10_000 - allocation.process_age_s(), abs=5)
    assert left(math.inf, JD_HPC_WALLTIME=f"{now + 50}") == math.inf
    assert float(allocation.variable_for("1:00")) == pytest.approx(now + 60, abs=5)


@pytest.mark.parametrize("value", ["3600", "1:00:00", "nan"])
def test_a_duration_in_the_environment_is_refused(value):
    with pytest.raises(WalltimeError, match=r"JD_HPC_WALLTIME is .* seconds since 1970\. Cure: "):
        left(None, JD_HPC_WALLTIME=value)


def test_squeue_is_asked_once_where_the_environment_does_not_tell(monkeypatch, tmp_path):
    calls = tmp_path / "calls"
    (tmp_path / "squeue").write_text(f'#!/bin/sh\necho "$@" >> {calls}\necho "1-02:00:10"\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for _ in range(2):
        assert left(None, SLURM_JOB_ID="4711") == pytest.approx(93610, abs=5)
    assert left(None, SLURM_JOB_ID="4711", SLURM_JOB_END_TIME=f"{time.time() + 9}") == pytest.approx(9, abs=5)
    assert calls.read_text() == "--noheader --jobs=4711 --format=%L\n"
    (tmp_path / "squeue").write_text("#!/bin/sh\necho UNLIMITED\n")
    assert left(None, SLURM_JOB_ID="4712") is None


# ---- runs without a vm -----------------------------------------------------------------------------------------------------


class Counting(JobDispatcher):
    count = 10
    job_s = 0.0
    at_result = staticmethod(lambda index: None)

    def reset(self):
        self.todo = iter(range(self.count))
        self.done = []

    def next_job(self):
        return next(self.todo, None)

    def process_job(self, job):
        time.sleep(self.job_s)
        return job

    def process_result(self, index, job, result):
        self.done.append(index)
        self.at_result(index)

    def postprocess(self):
        return len(self.done)


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch):
    monkeypatch.setattr(ending._Ending, "code", None)
    yield
    asked.forget()


def unfinished(dispatcher):
    with pytest.raises(Unfinished) as caught:
        dispatcher.run()
    assert caught.value.code == ending.UNFINISHED == 85
    return caught.value


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_drains_a_local_run(number, capfd):
    one = Counting()
    one.at_result = lambda index: signal.raise_signal(number) if index == 3 else None
    error = unfinished(one)
    assert one.done == [0, 1, 2, 3]
    assert (error.ended, error.put_back, error.cut_off) == (4, 1, 0)
    assert capfd.readouterr().err == f"jd_hpc: drained ({number.name} at rank 0): 4 jobs ended, 1 were put back; exit code 85\n"
    one.at_result = lambda index: None
    assert one.run() == 10  # it was answered


def test_a_signal_with_nothing_left_to_do():
    one = Counting()
    one.at_result = lambda index: signal.raise_signal(signal.SIGUSR2) if index == 9 else None
    assert one.run() == 10
    assert unfinished(one).ended == 0  # it still holds


def test_a_run_inside_a_job_goes_on():
    class Outer(Counting):
        count = 2

        def process_job(self, job):
            signal.raise_signal(signal.SIGUSR2)
            return Counting(walltime=lambda: 0.0).run()

    outer = Outer()
    assert unfinished(outer).ended == 1
    assert outer.done == [0]


def test_nothing_goes_out_when_the_time_is_over(capfd):
    one = Counting(walltime=lambda: 20.0)  # less than the margin
    assert unfinished(one).ended == 0
    assert "drained (the time is over): 0 jobs ended, 1 were put back" in capfd.readouterr().err
    one.count = 0
    assert one.run() == 0


def test_what_would_not_end_does_not_begin():
    begun = time.monotonic()
    one = Counting(walltime=lambda: begun + 2 - time.monotonic(), walltime_margin_s=0)
    one.job_s, one.count = 0.4, 100
    error = unfinished(one)
    assert time.monotonic() - begun < 1.9
    assert 1 <= error.ended < 5
    assert "are left, and a job may take" in error.reason


@pytest.mark.parametrize("walltime", [0, -1, "3:50:00", math.nan])
def test_options_that_are_no_times(walltime):
    with pytest.raises((ValueError, TypeError), match="walltime"):
        Counting(walltime=walltime)

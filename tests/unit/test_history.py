"""What writes a history: the file, its lines, and what may go wrong with it. Local runs, which write one too."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jd_hpc import HistoryError, JobDispatcher, JobError, check
from jd_hpc.history import VARIABLE, History


class Counts(JobDispatcher):
    """Runs the numbers below `count`; one of them fails."""

    count = 10
    wrong = -1

    def reset(self):
        self.numbers = iter(range(self.count))
        self.got = []

    def next_job(self):
        return next(self.numbers, None)

    def process_job(self, job):
        if job == self.wrong:
            raise ValueError("wrong")
        return -job

    def process_result(self, index, job, result):
        self.got.append(index)

    def postprocess(self):
        return self.got


class Blocks(Counts):
    job_dtype = result_dtype = "i8"

    def next_jobs(self, count):
        rows = [number for _, number in zip(range(count), self.numbers, strict=False)]
        return np.array(rows, "i8") if rows else None

    def process_jobs(self, jobs, results):
        results[:] = -jobs

    def process_results(self, indices, jobs, results):
        self.got.extend(indices.tolist())


class Tolerant(Counts):
    wrong = 4

    def process_failure(self, index, job, error):
        self.got.append(index)


class Crashes(Tolerant):
    """Some jobs end their process: one always, one the first time."""

    def process_job(self, job):
        if job == 4 or (job == 6 and not self.once.exists()):
            if job == 6:
                self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return -job


def events_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def kinds_of(path):
    return [event["e"] for event in events_of(path)]


def checked(path):
    runs = check.check_file(str(path))
    assert [run.violations for run in runs] == [[]] * len(runs)
    return runs


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history.jsonl"


# ---- what is in it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Counts, Blocks])
@pytest.mark.parametrize("grain", [1, 3, 100])
def test_a_local_run(path, kind, grain):
    assert kind(grain=grain, history=path).run() == list(range(10))
    (run,) = checked(path)
    messages = -(-10 // grain)
    assert (run.how, run.sent_jobs, run.counts["delivered"], run.counts["sent"]) == ("ok", 10, 10, messages)
    first, *_, last = events_of(path)
    assert (first["class"], first["slaves"], first["pid"], first["program"]) == (kind.__name__, 0, os.getpid(), sys.argv[0])
    assert first["options"]["grain"] == grain
    assert last["counters"] == {"jobs": 10, "from journal": 0}
    times = [event["t"] for event in events_of(path)]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < 60


@pytest.mark.parametrize("grain", [1, 4])
def test_failures(path, grain):
    assert sorted(Tolerant(grain=grain, history=path).run()) == list(range(10))
    (run,) = checked(path)
    assert (run.counts["delivered"], run.counts["failed"]) == (9, 1)
    (failed,) = [event for event in events_of(path) if event["e"] == "failed"]
    assert (failed["index"], failed["error"], failed["attempts"]) == (4, "ValueError", [])


@pytest.mark.parametrize("grain", [1, 5])
def test_processes_that_die(path, tmp_path, grain):
    run = Crashes(grain=grain, history=path, isolate=True)
    run.once = tmp_path / "once"
    assert sorted(run.run()) == list(range(10))
    (verdict,) = checked(path)
    assert (verdict.counts["delivered"], verdict.counts["failed"]) == (9, 1)
    events = events_of(path)
    assert [(event["index"], event["strikes"]) for event in events if event["e"] == "again"] == [(4, 1), (4, 2), (6, 1)]
    (failed,) = [event for event in events if event["e"] == "failed"]
    assert (failed["index"], len(failed["attempts"]), failed["died"]) == (4, 3, "killed by SIGKILL")


def test_a_run_that_ends_by_an_exception(path):
    run = Counts(grain=2, history=path)
    run.wrong = 5
    with pytest.raises(JobError):
        run.run()
    (verdict,) = checked(path)
    assert verdict.how.startswith("JobError: job 5 failed on the master: ValueError: wrong")
    assert "\n" not in verdict.how
    assert (verdict.counts["delivered"], verdict.counts["failed"], verdict.left_jobs) == (5, 1, 0)


def test_runs_are_added_to_the_file(path):
    for _ in range(2):
        run = Counts(history=path)
        run.run()
        run.run()
    assert [run.how for run in checked(path)] == ["ok"] * 4


def test_the_environment_names_it(path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(path.with_name("{pid}.jsonl")))
    Counts().run()
    assert len(checked(path.with_name(f"{os.getpid()}.jsonl"))) == 1
    Counts(history=path).run()  # the option comes first
    assert len(checked(path)) == 1
    Counts(history="").run()  # and this is none
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([f"{os.getpid()}.jsonl", path.name])


def test_long_lines_and_odd_texts(path):
    with History(str(path)) as history:
        history.begin({"slaves": 0, "options": {"grain": 1, "credit": 1, "max_attempts": 1, "min_slaves": 0, "isolate": False}})
        for size in (0, 10, 4090, 4096, 4097, 5000, 70000, 300000):
            history.event("odd", text='ä\n"\\' * size, object=path)
            history.lines.delivered(size, 1)
    events = events_of(path)
    assert [len(event["text"]) // 4 for event in events if event["e"] == "odd"] == [0, 10, 4090, 4096, 4097, 5000, 70000, 300000]
    assert [event["jobs"] for event in events if event["e"] == "delivered"][-1] == [[300000, 1]]
    assert events[1]["object"] == str(path)


def test_the_largest_numbers(path):
    most = (1 << 63) - 1
    with History(str(path)) as history:
        history.begin({})
        history.lines.sent(1 << 30, 1 << 30, most, 1 << 30, 255)
        history.lines.result(2, -1, -1, -most, -1, -1)
        for number in range(2000):
            history.lines.delivered(most - 10 * number, 1)
    _, sent, refused, *delivered, _ = events_of(path)
    assert [sent[name] for name in ("slave", "slot", "first", "count", "attempt")] == [1 << 30, 1 << 30, most, 1 << 30, 255]
    assert [refused[name] for name in ("slave", "slot", "first", "count", "attempt")] == [-1, -1, -most, -1, -1]
    spans = [span for event in delivered for span in event["jobs"]]
    assert spans == [[most - 10 * number, 1] for number in range(2000)]
    assert max(map(len, path.read_bytes().splitlines())) <= 4096


def test_deliveries_that_follow_each_other_are_one_span(path):
    with History(str(path)) as history:
        history.begin({})
        for first in (0, 1, 2, 7, 8, 3, 0):
            history.lines.delivered(first, 1)
        history.lines.delivered(1, 100)
    assert events_of(path)[1]["jobs"] == [[0, 3], [7, 2], [3, 1], [0, 101]]


def test_lines_are_written_after_a_second(path):
    class Waits(Counts):
        count = 3
        seen = ()

        def process_job(self, job):
            if job == 1:
                assert kinds_of(path) == ["begin"]
                time.sleep(1.1)
            return job

        def process_result(self, index, job, result):
            self.seen = kinds_of(path)

    run = Waits(history=path)
    run.run()
    assert run.seen[:4] == ["begin", "sent", "accepted", "delivered"]


# ---- what may go wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "why"),
    [("no/such/folder/file", "No such file or directory"), (".", "Is a directory"), ("/dev/full", "No space left on device")],
)
def test_a_path_that_cannot_be_written(tmp_path, where, why):
    class Never(Counts):
        def on_startup(self):
            pytest.fail("the run has begun")

    with pytest.raises(
        HistoryError, match=f"the history .* cannot be written: ({why}).*Cure: name a file that can be, by history="
    ):
        Never(history=tmp_path / where).run()


LIMITED = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from test_history import Counts
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
Counts.count = 10_000
print(len(Counts(history=sys.argv[1]).run()))
"""


def test_a_disk_that_is_full_later(path):
    """The run goes on, half a line remains, and the next run begins on a line of its own."""
    words = [sys.executable, "-c", LIMITED, str(path), str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "10000\n"), done.stderr
    assert done.stderr.count("ends here, and the run goes on: it cannot be written: File too large") == 1
    assert path.stat().st_size == 30_000
    (run,) = checked(path)
    assert run.how is None
    assert run.cut_line > 200
    Counts(history=path).run()
    assert [run.how for run in checked(path)] == [None, "ok"]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_history import Counts
class Dies(Counts):
    count = 20_000
    def process_job(self, job):
        if job == 15_000:
            os.kill(os.getpid(), signal.SIGKILL)
        return job
Dies(history=sys.argv[1]).run()
"""


def test_a_master_that_is_killed_leaves_what_was_written(path):
    words = [sys.executable, "-c", KILLED, str(path), str(Path(__file__).parent)]
    assert subprocess.run(words, timeout=60).returncode == -signal.SIGKILL
    (run,) = checked(path)
    assert run.how is None
    assert 1000 < run.sent_jobs <= 15_001
    assert "was interrupted" in run.report()[0]


def test_one_run_at_a_time(path):
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(HistoryError, match=r"another run writes to the history .* now. Cure: a file for each: \{pid\}"):
            Counts(history=path).run()
    Counts(history=path).run()
    assert len(checked(path)) == 1


def test_without_one_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    Counts().run()
    assert list(tmp_path.iterdir()) == []


def test_a_user_may_have_a_history_of_their_own(path):
    class Remembers(Counts):
        def reset(self):
            super().reset()
            self.history = []

    run = Remembers(history=path)
    run.run()
    run.run()
    assert len(checked(path)) == 2

"""The progress bar on a real terminal (a pty), and the lines where there is none."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from screens import File, Screen

import jd_hpc.progress
from jd_hpc import JobDispatcher, JobError, Unfinished
from jd_hpc.progress import Progress, wanted


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(jd_hpc.progress, "LINE_EVERY_S", 0.05)


class Sleepy(JobDispatcher):
    count, sleep_s = 20, 0.03

    def reset(self):
        self.at = 0

    def next_job(self):
        self.at += 1
        return self.at - 1 if self.at <= self.count else None

    def process_job(self, job):
        time.sleep(self.sleep_s)
        if job == 3:
            raise ValueError("three")
        return job

    def process_failure(self, index, job, error):
        pass


def test_a_bar_shows_all_there_is_to_see():
    with Screen() as screen:
        Sleepy(progress=20).run()
    text = screen.text
    assert " 20/20 " in text
    assert "1 failed" in text
    assert "1/1 busy" in text
    assert re.search(r"\[00:\d\d<00:\d\d, +[\d.]+ jobs/s", text), text  # time left, and rate
    assert text.endswith("\r\n")  # closed


def test_the_total_comes_from_the_class():
    class Known(Sleepy):
        job_count = 20

    with Screen() as screen:
        Known(progress=True).run()
    assert " 20/20 " in screen.text


def test_the_total_may_be_one_of_numpys_numbers(often):
    class Known(Sleepy):
        job_count = np.prod((4, 5))

    with File() as file:
        Known(progress=True).run()
    assert " of 20 jobs done" in file.text


def test_nobody_knows_the_total():
    with Screen() as screen:
        Sleepy(progress=True).run()
    assert "20 jobs [" in screen.text


def test_a_journal_counts(tmp_path):
    class Half(Sleepy):
        sleep_s = 0.0

    Half().run(journal=tmp_path / "journal")
    with Screen() as screen:
        Half(progress=20).run(journal=tmp_path / "journal")
    assert " 20/20 " in screen.text


def test_log_lines_stay_whole():
    logger = logging.getLogger("jd_hpc")

    class Logs(Sleepy):
        def process_result(self, index, job, result):
            logger.warning("line %d is whole", index)

    with Screen() as screen:
        handler = logging.StreamHandler(sys.stderr)
        logger.addHandler(handler)
        try:
            Logs(progress=20).run()
        finally:
            logger.removeHandler(handler)
        assert handler.filters == []  # nothing is left behind
    for index in set(range(20)) - {3}:
        assert re.search(rf"(^|[\r\n])line {index} is whole\r\n", screen.text), screen.text
    assert "20/20" in screen.text


@pytest.mark.parametrize("way", ["error", "drain", "hook"])
def test_the_bar_is_closed_on_every_way_out(way):
    class Ends(Sleepy):
        def process_failure(self, index, job, error):
            if way == "error":
                raise error
            if way == "drain":
                os.kill(os.getpid(), signal.SIGUSR2)
            else:
                raise OSError("disk full")

    kind = {"error": JobError, "drain": Unfinished, "hook": OSError}[way]
    with Screen() as screen, pytest.raises(kind):
        Ends(progress=20).run()
    text = screen.text
    assert "20/20" not in text
    assert re.search(r"/20 .*\r\n", text), text
    assert logging.lastResort.filters == []


CTRL_C = """
import sys, time
sys.path[:0] = [{folder!r}, {folder!r} + "/.."]
from test_progress import Sleepy
class Long(Sleepy):
    count = 1000
Long(progress=1000).run()
"""


def test_ctrl_c_closes_the_bar():
    screen = Screen()
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    script = CTRL_C.format(folder=str(Path(__file__).parent))
    with subprocess.Popen([sys.executable, "-c", script], stderr=screen.theirs, env=env) as process:
        try:
            end = time.monotonic() + 20
            while "/1000" not in screen.text or " 0/1000" in screen.text[-100:]:
                assert time.monotonic() < end, screen.text
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == -signal.SIGINT
        finally:
            process.kill()
    screen.close()
    assert re.search(r"/1000 [^\r\n]*\r\nTraceback", screen.text), screen.text
    assert screen.text.endswith("KeyboardInterrupt\r\n")


def test_lines_where_there_is_no_terminal(often):
    with File() as file:
        Sleepy(progress=20).run()
    told = file.text.splitlines()
    assert 2 <= len(told) <= 20
    pattern = r"jd_hpc: \d+ of 20 jobs done, [\d.e+]+ jobs/s, 1 of 1 slaves busy, [01] failed, 0:00:\d\d left"
    assert all(re.fullmatch(pattern, line) for line in told), told


def test_silence_for_the_first_minute():
    with File() as file:
        Sleepy(progress=True).run()
    assert file.text == ""


def test_a_line_per_minute():
    told = []
    progress = Progress(lambda: 1000)
    read, write = os.pipe()
    with os.fdopen(read) as lines, os.fdopen(write, "w") as file, contextlib.redirect_stderr(file), progress:
        for second in range(601):
            progress.tick(1000.0 + second, lambda second=second: (second, 2, 3, 4))
        file.flush()
        os.set_blocking(read, False)
        told = lines.read().splitlines()
    assert len(told) == 10
    assert told[0] == "jd_hpc: 60 of 1000 jobs done, 1 jobs/s, 3 of 4 slaves busy, 2 failed, 0:15:40 left"
    assert told[-1] == "jd_hpc: 600 of 1000 jobs done, 1 jobs/s, 3 of 4 slaves busy, 2 failed, 0:06:40 left"


def test_a_terminal_that_goes_away_does_not_end_the_run():
    class Closes(Sleepy):
        def process_result(self, index, job, result):
            self.last = index
            if index == 5:
                screen.file.close()

    with Screen() as screen:
        sweep = Closes(progress=20)
        sweep.run()
    assert sweep.last == 19


class Bare:
    """A stderr that a program has made: it is not all that a file is."""

    def __init__(self, **more):
        self.text = ""
        vars(self).update(more)

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def no_answer():
    raise OSError("no answer")


@pytest.mark.parametrize("more", [{}, {"isatty": no_answer}], ids=["cannot be asked", "does not answer"])
def test_a_stderr_that_is_no_file_gets_lines(often, more):
    with contextlib.redirect_stderr(Bare(**more)) as stderr:
        Sleepy(progress=20).run()
    assert " of 20 jobs done" in stderr.text


@pytest.mark.parametrize("more", [{}, {"fileno": no_answer}], ids=["cannot be asked", "does not answer"])
def test_a_terminal_that_is_no_file_gets_a_bar(more):
    with contextlib.redirect_stderr(Bare(isatty=lambda: True, **more)) as stderr:
        Sleepy(progress=20).run()
    assert " 20/20 " in stderr.text


def test_without_a_stderr_there_is_silence(often, capsys):
    with contextlib.redirect_stderr(None):
        Sleepy(progress=20).run()
    assert capsys.readouterr() == ("", "")


def test_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with Screen(), pytest.raises(jd_hpc.ProgressError, match=r"pip install tqdm"):
        Sleepy(progress=True).run()


def test_without_tqdm_lines_will_do(often, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with File() as file:
        Sleepy(progress=True).run()
    assert "jobs done" in file.text


@pytest.mark.parametrize(
    ("text", "means"), [("", False), ("0", False), ("1", True), ("250", 250), (None, False)],
)
def test_the_environment(monkeypatch, text, means):
    monkeypatch.delenv("JD_HPC_PROGRESS", raising=False)
    if text is not None:
        monkeypatch.setenv("JD_HPC_PROGRESS", text)
    assert wanted(None) is means or wanted(None) == means
    assert wanted(False) is False
    assert wanted(True) is True
    assert wanted(17) == 17


def test_the_environment_is_for_the_outer_run(monkeypatch):
    class Outer(Sleepy):
        count = 3

        def process_job(self, job):
            Sleepy().run()

    monkeypatch.setenv("JD_HPC_PROGRESS", "3")
    with Screen() as screen:
        Outer().run()
    assert " 3/3 " in screen.text
    assert screen.text.count("\r\n") == 1  # one bar


def test_bad_values(monkeypatch):
    for value in ("many", 2.5, [1]):
        with pytest.raises(TypeError, match="progress = "):
            JobDispatcher(progress=value)
    with pytest.raises(ValueError, match="out of range"):
        JobDispatcher(progress=-1)
    monkeypatch.setenv("JD_HPC_PROGRESS", "yes")
    with pytest.raises(ValueError, match="JD_HPC_PROGRESS=yes is no number"):
        JobDispatcher()

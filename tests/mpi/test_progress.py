"""The progress bar of a run on all ranks: on the master only, on a real terminal (a pty), and closed at the end."""

from __future__ import annotations

import re
import time

import pytest
from mpi_helpers import Sweep, Tolerant, check_healthy, error_of, value_of
from screens import File, Screen

import jd_hpc.progress

pytestmark = pytest.mark.mpi


class Slow(Tolerant):
    def process_job(self, job):
        time.sleep(0.02)
        if job == 3:
            raise ValueError("three")
        return job


@pytest.mark.parametrize("options", [{}, {"grain": 4}, {"max_slaves": 0}, {"isolate": True}])
def test_the_master_shows_a_bar(comm, options):
    with Screen() as screen:
        value_of(Slow(range(40), comm, progress=40, **options), comm)
    seen = comm.allgather(screen.text)
    assert " 40/40 " in seen[0]
    assert re.search(r"\d/\d busy, 1 failed", seen[0]), seen[0]
    assert seen[0].endswith("\r\n")
    assert seen[1:] == [""] * (comm.size - 1)


def test_rows_in_blocks_are_counted(comm):
    class Rows(Slow):
        job_dtype = result_dtype = "i8"

        def process_job(self, job):
            return job

    with Screen() as screen:
        value_of(Rows(range(5_000), comm, progress=5_000), comm)
    assert " 5000/5000 " in comm.bcast(screen.text)


def test_it_is_closed_after_an_error(comm):
    class Fails(Sweep):
        def process_job(self, job):
            time.sleep(0.3 if job else 0)
            if job == 1:
                raise ValueError("one")

    with Screen() as screen:
        error_of(Fails(range(10), comm, progress=True), comm)
    text = comm.bcast(screen.text)
    assert "jobs [" in text
    assert text.endswith("\r\n")
    check_healthy(comm)


def test_lines_where_there_is_no_terminal(comm, monkeypatch):
    monkeypatch.setattr(jd_hpc.progress, "LINE_EVERY_S", 0.1)
    with File() as file:
        value_of(Slow(range(60), comm, progress=60), comm)
    lines = comm.bcast(file.text).splitlines()
    assert lines
    pattern = r"jd_hpc: \d+ of 60 jobs done, [\d.e+]+ jobs/s, \d of \d slaves busy, [01] failed(, 0:00:\d\d left)?"
    assert all(re.fullmatch(pattern, line) for line in lines), lines


def test_what_waits_for_its_turn_is_not_done(comm, monkeypatch):
    class First(Tolerant):
        """Job 0 ends when all others have."""

        go, came_in = False, 0

        def on_startup(self):
            self.add_handler(str, self.hear)

        def hear(self, source, message):
            self.go = True

        def process_job(self, job):
            end = time.monotonic() + (30 if job == 0 else 0)
            while time.monotonic() < end and not self.go:
                self.poll()
            time.sleep(0.3 if job == 0 else 0)

        def on_result(self, slave, index):
            self.came_in += 1
            if self.came_in == 29:
                self.broadcast("go")

    if comm.size > 2:
        monkeypatch.setattr(jd_hpc.progress, "LINE_EVERY_S", 0.1)
        with File() as file:
            results, _ = value_of(First(range(30), comm, progress=30, ordered=True, window=30, credit=1), comm)
        assert len(results) == 30
        lines = comm.bcast(file.text).splitlines()
        assert lines
        assert {int(line.split()[1]) for line in lines} <= {0, 30}

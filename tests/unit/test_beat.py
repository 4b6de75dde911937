"""The thread that beats: in time, without the GIL, and gone at once."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from beats_helpers import threads, until

from jd_hpc._beat import BEAT, Beat

pytestmark = pytest.mark.usefixtures("watchdog")


def test_beats_come_at_their_time_and_stop_at_once():
    ours, its = socket.socketpair()
    with ours, its:
        before = threads()
        beat = Beat(its.fileno(), 0.01)
        assert threads() == before + 1
        time.sleep(0.5)
        assert beat.alive
        beat.stop()
        assert not beat.alive
        assert threads() == before
        beat.stop()
        count = len(ours.recv(1000))
        assert 10 <= count <= 50  # delays do not add up to more beats, and a noisy machine swallows some
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)


def test_a_limit_silences_it_until_it_is_lifted():
    ours, its = socket.socketpair()
    with ours, its:
        ours.settimeout(20)
        beat = Beat(its.fileno(), 0.01)
        beat.limit(0.05)
        time.sleep(0.5)
        ours.recv(1000)  # what came before
        ours.setblocking(False)
        time.sleep(0.1)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
        assert beat.alive
        beat.limit(0)
        ours.settimeout(20)
        assert ours.recv(1) == BEAT
        beat.stop()
        beat.limit(1)  # nothing to limit


def test_a_limit_is_checked():
    ours, its = socket.socketpair()
    with ours, its:
        beat = Beat(its.fileno(), 1)
        for wrong in (-1, float("nan")):
            with pytest.raises(ValueError, match="must be at least 0"):
                beat.limit(wrong)
        beat.stop()


def test_stop_does_not_wait_for_the_period():
    ours, its = socket.socketpair()
    with ours, its:
        beat = Beat(its.fileno(), 3600)
        start = time.monotonic()
        beat.stop()
        assert time.monotonic() - start < 5


def test_a_forgotten_beat_stops():
    ours, its = socket.socketpair()
    with ours, its:
        before = threads()
        beat = Beat(its.fileno(), 3600)
        assert threads() == before + 1
        del beat
        assert threads() == before


def test_no_room_is_no_error():
    ours, its = socket.socketpair()
    with ours, its:
        its.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                its.send(b"x" * 4096)
        beat = Beat(its.fileno(), 0.001)
        time.sleep(0.1)
        assert beat.alive
        while len(ours.recv(1 << 20)) and ours.recv(1, socket.MSG_PEEK) != BEAT:
            pass
        beat.stop()


def test_a_broken_connection_ends_the_thread_without_a_signal():
    ours, its = socket.socketpair()
    with its:
        before = threads()
        beat = Beat(its.fileno(), 0.005)
        ours.close()
        until(lambda: not beat.alive)
        until(lambda: threads() == before)
        beat.stop()


def test_signals_are_blocked_in_the_thread_and_named_it_is():
    ours, its = socket.socketpair()
    with ours, its:
        before = set(Path("/proc/self/task").iterdir())
        beat = Beat(its.fileno(), 3600)
        (thread,) = set(Path("/proc/self/task").iterdir()) - before
        until(lambda: (thread / "comm").read_text() == "jd_hpc beat\n")
        status = dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines())
        blocked = int(status["SigBlk"], 16)
        assert all(blocked >> number - 1 & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM))
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()  # ours is as before
        beat.stop()


@pytest.mark.parametrize(("fd", "period_s"), [(-1, 1), (0, 0), (0, -1), (0, float("nan")), (0, float("inf")), (0, 1e-9), (0, 1e9)])
def test_a_beat_that_cannot_be(fd, period_s):
    with pytest.raises(ValueError, match="period_s"):
        Beat(fd, period_s)


def test_threads_that_stop_the_same_beat():
    ours, its = socket.socketpair()
    with ours, its:
        for _ in range(50):
            beat = Beat(its.fileno(), 0.001)
            helpers = [threading.Thread(target=beat.stop) for _ in range(4)]
            for helper in helpers:
                helper.start()
            for helper in helpers:
                helper.join(20)
            assert not beat.alive


FORK = """
import os, signal, socket, sys, time
signal.alarm(60)
from jd_hpc._beat import Beat

def drain():
    time.sleep(0.2)
    try:
        return len(ours.recv(1000, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return 0

ours, its = socket.socketpair()
beat = Beat(its.fileno(), 0.01)
for way in ("stop", "del", "exit", "keep"):
    pid = os.fork()
    if pid == 0:
        assert not beat.alive
        if way == "stop":
            beat.stop(); beat.stop(); os._exit(7)
        elif way == "del":
            del beat; os._exit(7)
        elif way == "exit":
            sys.exit(7)
        time.sleep(1.0); os._exit(7)
    assert beat.alive and drain()
    if way == "keep":  # the child still holds the other end
        beat.stop()
        drain()
        assert drain() == 0
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7, way
print("done")
"""


def test_in_a_forked_child_there_is_no_beat():
    said = subprocess.run([sys.executable, "-c", FORK], timeout=60, capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("done\n", "")

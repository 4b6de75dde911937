"""Fixtures of the unit tests."""

from __future__ import annotations

import gc
import logging
import signal
import subprocess
import sys

import pytest
from beats_helpers import PERIOD_S, REST, SIZE, SLAVE, WATCHDOG_S, Master, descriptors, threads, until
from scheduler_driver import Driver

from jd_hpc.beats import Listener


@pytest.fixture
def watchdog():
    """Ends a test that hangs, and finds what it left behind."""

    def bite(number, frame):
        raise TimeoutError(f"no end within {WATCHDOG_S} s")

    gc.collect()
    before = descriptors(), threads()
    old = signal.signal(signal.SIGALRM, bite)
    signal.alarm(WATCHDOG_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)
    gc.collect()
    until(lambda: (descriptors(), threads()) <= before)


@pytest.fixture
def listener():
    listener = Listener(SIZE, PERIOD_S)
    yield listener
    listener.close()


@pytest.fixture
def opened():
    """A list: what is put into it is closed at the end."""
    things = []
    yield things
    for thing in things:
        thing.close()


@pytest.fixture
def master(listener):
    return Master(listener)


@pytest.fixture
def slave(listener):
    """Starts a process that connects as a rank and then does some work."""
    processes = []

    def start(rank, work=REST):
        command = [sys.executable, "-c", SLAVE, str(listener.addresses[0][1]), listener.token.hex(), str(rank), work]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=20)


@pytest.fixture
def said(caplog):
    """The lines in the log."""
    caplog.set_level(logging.WARNING, "jd_hpc")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def drive(scheduler_module):
    def make(**options):
        return Driver(scheduler_module, **options)

    return make

"""Ctrl-C reaches the user's code, but waits while ranks part."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from jd_hpc.signals import GIVE_UP_AFTER, Interrupts


@pytest.fixture(autouse=True)
def pythons_own_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def link():
    """What stands for the core's master or slave."""
    return SimpleNamespace(parting=False)


def interrupt():
    signal.raise_signal(signal.SIGINT)


def is_restored():
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_comes_at_once(link):
    reached = []
    with pytest.raises(KeyboardInterrupt), Interrupts(link):
        interrupt()
        reached.append("behind it")
    assert reached == []
    assert is_restored()


def test_an_interrupt_waits_while_ranks_part(link):
    reached = []
    with pytest.raises(KeyboardInterrupt), Interrupts(link):
        link.parting = True
        interrupt()
        reached.append("behind it")
    assert reached == ["behind it"]
    assert is_restored()


def test_one_that_waited_does_not_hide_another_error(link):
    with pytest.raises(KeyboardInterrupt) as caught, Interrupts(link):
        link.parting = True
        interrupt()
        raise ZeroDivisionError
    assert isinstance(caught.value.__context__, ZeroDivisionError)
    assert is_restored()


def test_somebody_who_insists_gets_out(link):
    count = 0
    with pytest.raises(KeyboardInterrupt), Interrupts(link):
        link.parting = True
        for _ in range(GIVE_UP_AFTER):
            interrupt()
            count += 1
    assert count == GIVE_UP_AFTER - 1
    assert is_restored()


def test_without_an_interrupt_nothing_happens(link):
    with Interrupts(link):
        assert not is_restored()
        link.parting = True
    assert is_restored()


def test_a_users_own_handler_is_left_alone(link):
    got = []

    def own(number, frame):
        got.append(number)

    signal.signal(signal.SIGINT, own)
    with Interrupts(link):
        assert signal.getsignal(signal.SIGINT) is own
        link.parting = True
        interrupt()
    assert got == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is own


def test_outside_the_main_thread_nothing_is_changed(link):
    seen = []

    def run():
        with Interrupts(link):
            seen.append(is_restored())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=30)
    assert seen == [True]


def test_a_signal_while_mpi_is_finalized_does_not_kill():
    program = (
        "import atexit, ctypes\n"
        # called where mpi4py finalizes MPI: when Python is gone
        "ctypes.pythonapi.Py_AtExit(ctypes.cast(ctypes.CDLL(None).getchar, ctypes.c_void_p))\n"
        "atexit.register(print, 'ends', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "jd_hpc", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ends\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGUSR2)
        process.communicate("\n", timeout=30)
    assert process.returncode == 0

"""What the tests of the side channel share: the master's loop, slaves as processes, strangers as sockets."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from jd_hpc.beats import HELLO, MAGIC, Connection

WATCHDOG_S = 60
PERIOD_S = 0.05
SIZE = 9
HERE = "127.0.0.1"

SLAVE = f"""
import ctypes, os, signal, sys, time
signal.alarm({WATCHDOG_S})
from jd_hpc.beats import Connection
port, token, rank, work = int(sys.argv[1]), bytes.fromhex(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
connection = Connection.connect([("{HERE}", port)], token, rank, {PERIOD_S}, 20)
exec(work)
"""
REST = "print('up', flush=True); time.sleep(60)"


def threads():
    return len(list(Path("/proc/self/task").iterdir()))


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def until(condition, timeout_s=20.0):
    """Wait for it; it is asked every few ms, as the master's loop would."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.003)


class Master:
    """The master's loop: polls, and remembers what happened."""

    def __init__(self, listener):
        self.listener, self.events = listener, []

    def poll(self):
        now = time.monotonic()
        self.events += self.listener.poll(now)
        return now

    def until(self, condition):
        until(lambda: self.poll() and condition())

    def kinds(self, rank):
        return [event.kind for event in self.events if event.rank == rank]


def connect(listener, rank, period_s=PERIOD_S):
    return Connection.connect(listener.addresses, listener.token, rank, period_s, 10)


def stranger(listener, said=b""):
    sock = socket.create_connection((HERE, listener.addresses[0][1]), 10)
    sock.sendall(said)
    return sock


def hello(listener, rank, token=None, magic=MAGIC):
    return HELLO.pack(magic, listener.token if token is None else token, rank)


def hung_up(sock):
    """Whether the other end has closed it; what it sent before is read."""
    sock.settimeout(0.01)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True

"""Whoever else connects to the port for the beats: dropped, counted, and no burden."""

from __future__ import annotations

import sys
import time
from collections import Counter
from contextlib import contextmanager

import pytest
from beats_helpers import HERE, PERIOD_S, SIZE, connect, descriptors, hello, hung_up, stranger, threads, until

from jd_hpc import beats
from jd_hpc._beat import BEAT
from jd_hpc.beats import HELLO, MAGIC, MOST_ACCEPTS, MOST_READY, MOST_STRANGERS, Event, Listener

pytestmark = pytest.mark.usefixtures("watchdog")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (lambda listener: hello(listener, 1, token=bytes(16)), "no slave of this run"),
        (lambda listener: hello(listener, 1, magic=b"jd_beat0"), "no slave of this run"),
        (lambda listener: b"GET / HTTP/1.0\r\nHost: somebody\r\n\r\n", "no slave of this run"),
        (lambda listener: b"\0" * 10_000, "no slave of this run"),
        (lambda listener: hello(listener, 0), "says to be slave 0, but there are only 1 to 8"),
        (lambda listener: hello(listener, SIZE), "says to be slave 9, but"),
        (lambda listener: hello(listener, (1 << 32) - 1), "says to be slave 4294967295, but"),
    ],
)
def test_who_is_no_slave_is_dropped(master, listener, opened, said, words, reason):
    sock = stranger(listener, words(listener))
    opened.append(sock)
    until(lambda: master.poll() and hung_up(sock))
    assert listener.connected == set()
    assert master.events == []
    (line,) = said()
    assert reason in line
    assert HERE in line


@pytest.mark.parametrize("part", [b"", MAGIC, b"x" * (HELLO.size - 1)])
def test_who_does_not_finish_the_hello_is_dropped_in_time(listener, opened, said, part):
    sock = stranger(listener, part)
    opened.append(sock)
    until(lambda: listener.poll(100.0) or listener._strangers)
    listener.poll(100.0 + beats.HELLO_LIMIT_S - 0.1)
    assert not hung_up(sock)
    listener.poll(100.0 + beats.HELLO_LIMIT_S + 0.1)
    assert hung_up(sock)
    assert "no hello within 5 s" in said()[0]


def test_who_leaves_in_the_middle_of_the_hello_is_dropped(master, listener, said):
    stranger(listener, MAGIC).close()
    master.until(said)
    assert "gone before its hello was complete" in said()[0]
    assert listener._strangers == {}


def test_a_byte_at_a_time_is_too_slow(listener, opened, said):
    sock = stranger(listener)
    opened.append(sock)
    for second in range(20):
        try:
            sock.sendall(hello(listener, 1)[second : second + 1])
        except OSError:
            break
        time.sleep(0.02)
        assert listener.poll(float(second)) == []
    assert 5 <= second <= 8
    assert "no hello within 5 s" in said()[0]


def test_a_hello_in_pieces_is_a_hello(master, listener, opened):
    sock = stranger(listener)
    opened.append(sock)
    for byte in hello(listener, 3):
        sock.sendall(bytes([byte]))
        time.sleep(0.002)
        master.poll()
    master.until(lambda: listener.connected == {3})


def test_a_hello_that_lay_unread_while_the_master_was_away_counts(listener, opened):
    sock = stranger(listener)
    opened.append(sock)
    until(lambda: listener.poll(0.0) or listener._strangers)
    sock.sendall(hello(listener, 3))
    time.sleep(0.05)
    stranger_events = []
    listener._drop_overdue(1000.0, stranger_events)
    assert stranger_events == [Event(3, "connected")]


def test_the_first_of_two_with_one_rank_stays(master, listener, opened, said):
    opened.append(connect(listener, 1))
    master.until(lambda: listener.connected)
    opened.append(connect(listener, 1))
    until(lambda: master.poll() and not opened[1].alive)
    assert opened[0].alive
    assert master.events == [Event(1, "connected")]
    assert "says to be slave 1, who is connected" in said()[0]
    heard = listener.last_heard(1)
    master.until(lambda: listener.last_heard(1) > heard)


def test_500_strangers_do_not_keep_slaves_out(master, listener, opened, slave, said):
    begun = [slave(rank) for rank in (1, 2, 3)]
    for number in range(500):
        opened.append(stranger(listener, [b"", MAGIC, b"x" * 100, hello(listener, 1, token=bytes(16))][number % 4]))
        if number % 10 == 0:
            master.poll()
        assert len(listener._strangers) <= MOST_STRANGERS
        assert len(listener._peers) <= MOST_STRANGERS + 3
    master.until(lambda: listener.connected == {1, 2, 3})
    late = connect(listener, 4)
    opened.append(late)
    master.until(lambda: listener.connected == {1, 2, 3, 4})
    assert [event.kind for event in master.events] == ["connected"] * 4
    assert all(process.poll() is None for process in begun)
    assert 1 <= len(said()) <= 3  # one per ten seconds, and the machine may be slow


def test_the_log_counts_what_it_does_not_say(listener, said):
    complaints = beats._Complaints()
    for _ in range(1000):
        complaints.add("somebody knocked", 5.0)
    complaints.add("somebody knocked", 5.0 + beats.COMPLAIN_EVERY_S)
    complaints.flush(17.0)
    complaints.add("somebody knocked", 17.0)
    complaints.flush(24.0)
    complaints.flush(25.5)
    complaints.flush(100.0)
    assert [line.partition(": ")[2] for line in said()] == [
        "somebody knocked.",
        "somebody knocked (and 999 more since the last such line).",
        "1 more connections were dropped.",
    ]


# ---- bounds


@contextmanager
def system_calls():
    """Count the calls of C functions by name: what a poll does, however fast the machine is."""
    counts = Counter()

    def note(frame, event, function):
        if event == "c_call":
            counts[function.__name__] += 1

    sys.setprofile(note)
    try:
        yield counts
    finally:
        sys.setprofile(None)


def test_a_poll_does_a_bounded_amount_of_work(opened):
    size = 3 * MOST_READY + 1
    listener = Listener(size, PERIOD_S)
    opened.append(listener)
    ranks = [stranger(listener, hello(listener, rank)) for rank in range(1, size)]
    opened += ranks
    until(lambda: (listener.poll(0.0), len(listener.connected))[1] == size - 1)
    with system_calls() as idle:
        listener.poll(0.0)
    assert idle["recv"] == idle["recv_into"] == idle["_accept"] == 0
    assert sum(idle.values()) <= 8
    opened += [stranger(listener, b"x" * 10_000) for _ in range(200)]
    for rank in ranks:
        rank.sendall(BEAT * 20_000)
    time.sleep(0.2)
    for _ in range(30):
        with system_calls() as busy:
            listener.poll(1.0)
        assert busy["recv_into"] <= MOST_READY
        assert busy["_accept"] <= MOST_ACCEPTS
        assert busy["recv"] <= 2 * MOST_ACCEPTS + MOST_STRANGERS
        assert sum(busy.values()) <= 40 * MOST_READY


def test_ready_connections_take_turns_and_nobody_is_silent_meanwhile(opened):
    size = 3 * MOST_READY + 1
    listener = Listener(size, PERIOD_S)
    opened.append(listener)
    ranks = [stranger(listener, hello(listener, rank)) for rank in range(1, size)]
    opened += ranks
    until(lambda: (listener.poll(0.0), len(listener.connected))[1] == size - 1)
    for rank in ranks:
        rank.sendall(BEAT * 40_000)  # more than one poll reads: all stay ready
    time.sleep(0.2)
    heard = lambda now: sum(listener.last_heard(rank) == now for rank in range(1, size))  # noqa: E731
    for turn in range(3):
        listener.poll(50.0)
        assert heard(50.0) == (turn + 1) * MOST_READY
        assert listener.silent(50.0, 20.0) == []
    for _ in range(10):  # still all of them ready: by the turns it is known who is silent
        listener.poll(51.0)
    assert listener.silent(51.0, 0.5) == []
    assert listener._swept >= 50.0


def test_200_cycles_leave_nothing_behind():
    before = descriptors(), threads()
    for cycle in range(200):
        listener = Listener(3, PERIOD_S)
        connection = connect(listener, 1)
        other = stranger(listener, MAGIC)
        if cycle % 2:
            listener.poll(0.0)
        for thing in (connection, listener, other) if cycle % 3 else (listener, connection, other):
            thing.close()
        listener.close()
    assert (descriptors(), threads()) == before

"""The side channel between slaves and master: real sockets, real processes, real deaths."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from beats_helpers import HERE, PERIOD_S, SIZE, connect, descriptors, hello, hung_up, stranger, threads, until

from jd_hpc import addresses, beats
from jd_hpc._beat import BEAT
from jd_hpc.beats import Connection, Event, Listener
from jd_hpc.errors import BeatError, JdError

pytestmark = pytest.mark.usefixtures("watchdog")


# ---- a slave and the master


def test_a_slave_connects_beats_and_leaves(master, listener, opened):
    assert listener.connected == set()
    assert listener.last_heard(1) is None
    connection = connect(listener, 1)
    opened.append(connection)
    master.until(lambda: listener.connected)
    assert master.events == [Event(1, "connected")]
    assert listener.connected == {1}
    first = listener.last_heard(1)
    master.until(lambda: listener.last_heard(1) > first)
    assert connection.alive
    assert not os.get_inheritable(connection.fileno())
    assert listener.silent(time.monotonic(), 20) == []
    connection.close()
    connection.close()
    assert not connection.alive
    assert connection.fileno() == -1
    master.until(lambda: not listener.connected)
    assert master.events[1:] == [Event(1, "closed")]
    assert listener.last_heard(1) > first


def test_a_slave_that_is_forgotten_hangs_up(master, listener):
    connection = connect(listener, 1)
    master.until(lambda: listener.connected)
    before = threads()
    del connection
    assert threads() == before - 1
    master.until(lambda: not listener.connected)


def test_a_rank_may_come_back(master, listener, opened):
    for _ in range(3):
        opened.append(connect(listener, 2))
        master.until(lambda: listener.connected == {2})
        opened[-1].close()
        opened.append(connect(listener, 2))  # the master has not seen the end of the first one yet
        time.sleep(0.02)
        master.poll()
        master.until(lambda: listener.connected == {2})
        opened[-1].close()
        master.until(lambda: not listener.connected)
    assert master.kinds(2) == ["connected", "closed"] * 6


def test_a_rank_comes_back_before_its_end_was_seen(listener, opened):
    first, second = stranger(listener, hello(listener, 2)), stranger(listener)
    opened += [first, second]
    until(lambda: listener.poll(0.0) or listener.connected)
    until(lambda: listener.poll(0.0) or listener._strangers)
    second.sendall(hello(listener, 2))  # the kernel reports it before the end that comes next
    time.sleep(0.05)
    first.close()
    time.sleep(0.05)
    assert listener.poll(1.0) == [Event(2, "closed"), Event(2, "connected")]
    assert listener.poll(1.0) == []
    assert listener.connected == {2}


def largest_gap(master, listener, rank, while_true):
    """The longest time, in seconds, without a beat of the rank, as the master sees it."""
    longest, last = 0.0, listener.last_heard(rank)
    while while_true():
        now = master.poll()
        longest = max(longest, now - last)
        last = listener.last_heard(rank)
        time.sleep(0.002)
    return longest


def test_beats_come_while_a_job_holds_the_gil(master, listener, slave):
    # PyDLL calls keep the GIL: no other Python thread runs in these two seconds.
    work = "input(); start = time.monotonic(); ctypes.PyDLL(None).sleep(2); print(time.monotonic() - start, flush=True); input()"
    gaps = []
    for rank in (1, 2, 3):  # the machine may be busy with something else: one good try of three shows that it can be done
        process = slave(rank, work)
        master.until(lambda rank=rank: rank in listener.connected)
        end = time.monotonic() + 2.0
        process.stdin.write("\n")
        process.stdin.flush()
        gaps.append(largest_gap(master, listener, rank, lambda end=end: time.monotonic() < end))
        held_s = float(process.stdout.readline())
        assert held_s >= 2.0
        if gaps[-1] < 0.3:
            return
    pytest.fail(f"the gaps were {gaps} s")


def test_a_stopped_process_is_silent_until_it_goes_on(master, listener, slave):
    stopped, other = slave(1), slave(2)
    master.until(lambda: listener.connected == {1, 2})
    stopped.send_signal(signal.SIGSTOP)
    master.until(lambda: listener.silent(time.monotonic(), 1.0) == [1])
    assert listener.connected == {1, 2}
    stopped.send_signal(signal.SIGCONT)
    master.until(lambda: listener.silent(time.monotonic(), 1.0) == [])
    assert [event.kind for event in master.events] == ["connected", "connected"]
    assert other.poll() is None


def test_a_killed_process_is_closed_at_once(master, listener, slave):
    process = slave(1)
    master.until(lambda: listener.connected)
    process.kill()
    process.wait(20)
    time.sleep(0.05)
    master.poll()
    assert master.kinds(1) == ["connected", "closed"]


def test_a_forked_child_that_lives_on_does_not_hold_the_connection(master, listener, slave):
    process = slave(1, "pid = os.fork()\nif pid: print(pid, flush=True)\nelse: assert not connection.alive\ntime.sleep(60)")
    master.until(lambda: listener.connected)
    child = int(process.stdout.readline())
    try:
        time.sleep(0.2)
        master.poll()
        assert listener.connected == {1}  # the child closed a copy only
        process.kill()
        process.wait(20)
        master.until(lambda: master.kinds(1) == ["connected", "closed"])
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_of_the_master_changes_nothing(master, listener, opened):
    opened.append(connect(listener, 1))
    master.until(lambda: listener.connected)
    before = descriptors()
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if not listener.connected and descriptors() <= before - 4 else 1)  # port, epoll, both ends of slave 1
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    opened.append(connect(listener, 2))
    master.until(lambda: listener.connected == {1, 2})
    heard = listener.last_heard(1)
    master.until(lambda: listener.last_heard(1) > heard)


def test_a_master_that_was_away_calls_nobody_silent(master, listener, opened):
    opened += [connect(listener, rank, 0.005) for rank in range(1, SIZE)]
    master.until(lambda: len(listener.connected) == SIZE - 1)
    time.sleep(0.3)
    now = time.monotonic()
    assert listener.silent(now, 0.25) == []  # it has not listened either
    listener.poll(now)
    assert listener.silent(now, 0.25) == []


# ---- ranks that misbehave


def test_a_flood_ends_its_sender_only(master, listener, opened):
    opened.append(connect(listener, 1))
    flooder = stranger(listener, hello(listener, 2))
    opened.append(flooder)
    flooder.setblocking(False)

    def pour():
        try:
            return flooder.send(BEAT * 65536) < 0
        except BlockingIOError:
            return False
        except OSError:
            return True

    master.until(lambda: listener.connected == {1, 2})
    polls = 0
    while not pour() and master.poll() and 2 in listener.connected:
        polls += 1
        assert polls < 100_000
    assert master.kinds(2) == ["connected", "flood"]
    assert polls >= beats.FLOOD_BURST_BYTES // beats.READ_BYTES - 1  # generous
    heard = listener.last_heard(1)
    master.until(lambda: listener.last_heard(1) > heard)
    assert listener.connected == {1}
    until(lambda: hung_up(flooder))


def test_garbage_ends_its_sender_only(master, listener, opened):
    opened += [connect(listener, 1), stranger(listener, hello(listener, 2) + BEAT * 3 + b"!")]
    master.until(lambda: listener.connected and len(master.events) == 3)
    assert master.kinds(2) == ["connected", "garbage"]
    assert listener.connected == {1}
    opened.append(connect(listener, 2))
    master.until(lambda: listener.connected == {1, 2})


def test_a_reset_is_an_end(master, listener):
    sock = stranger(listener, hello(listener, 2))
    master.until(lambda: listener.connected)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    master.until(lambda: master.kinds(2) == ["connected", "closed"])


def test_an_end_shows_before_the_beats_that_lie_unread(master, listener):
    sock = stranger(listener, hello(listener, 2))
    master.until(lambda: listener.connected)
    sock.sendall(BEAT * 50_000)
    sock.close()
    time.sleep(0.1)
    master.poll()
    assert master.kinds(2) == ["connected", "closed"]


def test_the_credit_grows_with_time(listener, opened):
    sock = stranger(listener, hello(listener, 1))
    opened.append(sock)
    until(lambda: listener.poll(0.0))
    share = beats.FLOOD_BURST_BYTES // 4
    for hour in range(1, 9):  # twice the burst in all
        sender = threading.Thread(target=sock.sendall, args=(BEAT * share,))
        sender.start()
        while sender.is_alive() or listener._epoll.poll(0.02):
            assert listener.poll(hour * 3600.0) == []
        sender.join(20)
    assert listener.connected == {1}


def test_an_end_is_reported_once_even_if_somebody_else_holds_a_copy(listener, opened):
    sock = stranger(listener, hello(listener, 1))
    until(lambda: listener.poll(0.0))
    opened.append(socket.socket(fileno=os.dup(listener._ranks[1].fd)))  # as a child would that was forked by a C library
    sock.close()
    until(lambda: listener.poll(0.0))
    assert listener._epoll.poll(0.05) == []


def test_what_came_while_the_master_was_away_is_no_flood(listener, opened):
    opened.append(connect(listener, 1, 3600.0))
    until(lambda: listener.poll(0.0))
    copy = socket.socket(fileno=os.dup(opened[0].fileno()))
    opened.append(copy)
    sent, rest_s = 0, 0.0
    while rest_s < 0.2:  # until both kernels hold as much as they want to
        try:
            sent += copy.send(BEAT * 100)
            rest_s = 0.0
        except BlockingIOError:
            time.sleep(0.02)
            rest_s += 0.02
    assert 10_000 < sent < beats.FLOOD_BURST_BYTES
    away_s = sent * PERIOD_S  # so long did they take
    peer = listener._ranks[1]
    until(lambda: listener.poll(away_s) or beats.FLOOD_BURST_BYTES - peer.credit_bytes >= sent)
    assert listener.connected == {1}


# ---- where the listener can be found


def test_nobody_there_is_a_clear_error():
    with socket.create_server((HERE, 0)) as gone:
        port = gone.getsockname()[1]
    with pytest.raises(BeatError, match=rf"slave 3 .*{HERE} port {port}: .*refused.*Cure:") as caught:
        Connection.connect([(HERE, port), ("::1", port)], bytes(16), 3, 1, 5)
    assert "::1" in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, JdError)


def test_the_next_address_is_tried(master, listener, opened):
    with socket.create_server((HERE, 0)) as gone:
        closed_port = gone.getsockname()[1]
    opened.append(Connection.connect([(HERE, closed_port), *listener.addresses], listener.token, 1, PERIOD_S, 20))
    master.until(lambda: listener.connected == {1})


def test_an_address_that_does_not_answer_costs_its_share_only():
    with socket.socket() as full:  # a queue of one that nobody empties: further callers hear nothing
        full.bind((HERE, 0))
        full.listen(0)
        fillers = []
        try:
            for _ in range(4):
                fillers.append(socket.socket())
                fillers[-1].setblocking(False)
                fillers[-1].connect_ex(full.getsockname())
            start = time.monotonic()
            with pytest.raises(BeatError, match="timed out"):
                Connection.connect([full.getsockname()], bytes(16), 1, 1, 0.5)
            assert 0.4 < time.monotonic() - start < 20
        finally:
            for filler in fillers:
                filler.close()


@pytest.mark.parametrize(
    ("change", "value"),
    [("addresses", []), ("token", b"short"), ("rank", -1), ("rank", 1 << 32), ("timeout_s", 0), ("timeout_s", float("nan"))],
)
def test_a_connection_that_cannot_be(change, value):
    given = {"addresses": [(HERE, 1)], "token": bytes(16), "rank": 1, "period_s": 1.0, "timeout_s": 1.0}
    with pytest.raises(ValueError, match="token"):
        Connection.connect(**{**given, change: value})


def test_a_period_that_cannot_be_leaves_no_socket(listener):
    with pytest.raises(ValueError, match="period_s"):
        connect(listener, 1, -1.0)


def test_no_thread_is_a_clear_error(listener, monkeypatch):
    def refuse(fd, period_s):
        raise OSError(11, "no thread for the beats: try again")

    monkeypatch.setattr(beats, "Beat", refuse)
    with pytest.raises(BeatError, match=r"no thread.*ulimit -u"):
        connect(listener, 1)


def test_a_slave_on_this_host_tries_loopback_first(listener):
    port = listener.addresses[0][1]
    name = socket.gethostname()
    assert listener.addresses_for(name)[0] == (HERE, port)
    assert listener.addresses_for(name.upper() + ".some.domain") == listener.addresses
    elsewhere = listener.addresses_for("surely-not-" + name)
    assert (HERE, port) not in elsewhere or listener.addresses == [(HERE, port)]


def test_every_address_that_was_found_can_be_reached(master, listener, opened):
    ranks = range(1, min(SIZE, len(listener.addresses) + 1))
    for rank, address in zip(ranks, listener.addresses, strict=False):
        opened.append(Connection.connect([address], listener.token, rank, PERIOD_S, 10))
    master.until(lambda: listener.connected == set(ranks))


def test_without_ipv6_it_is_ipv4(monkeypatch, opened):
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    listener = Listener(2, PERIOD_S)
    opened.append(listener)
    opened.append(connect(listener, 1))
    until(lambda: listener.poll(0.0))
    assert all(":" not in host for host, _ in listener.addresses)


def test_ipv6_that_is_there_but_forbidden_is_no_error(monkeypatch, opened):
    create = socket.create_server

    def only_ipv4(address, **options):
        if options.get("family") == socket.AF_INET6:
            raise OSError(99, "Cannot assign requested address")
        return create(address, **options)

    monkeypatch.setattr(socket, "create_server", only_ipv4)
    monkeypatch.setattr(addresses, "IPV6_TABLE", Path("/proc/there/is/none"))
    opened.append(Listener(2, PERIOD_S))
    opened.append(connect(opened[0], 1))
    assert all(":" not in host for host in addresses.find_addresses())


def test_no_port_is_a_clear_error(monkeypatch):
    def refuse(*given, **options):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(BeatError, match=r"Too many open files.*ulimit -n"):
        Listener(2, PERIOD_S)


@pytest.mark.parametrize(("size", "period_s"), [(0, 1), (-1, 1), (2, 0), (2, float("nan")), (2, float("inf"))])
def test_a_listener_that_cannot_be(size, period_s):
    with pytest.raises(ValueError, match="size"):
        Listener(size, period_s)


def test_no_descriptors_left_is_said_in_the_log_and_passes(listener, opened, said, monkeypatch):
    class Full:
        def accept(self):
            raise OSError(24, "Too many open files")

    opened.append(connect(listener, 1))
    events = []
    with monkeypatch.context() as patch:
        patch.setattr(listener, "_socket", Full())
        until(lambda: listener.poll(0.0) or said())
    assert "Too many open files" in said()[0]
    until(lambda: (events.extend(listener.poll(1.0)), listener.connected)[1] == {1})

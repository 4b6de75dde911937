"""The side channel by which the master knows which slave is alive, whatever the slave's Python and MPI are doing. No MPI.

The rules it keeps:

- Each slave holds one TCP connection to the master, and a C thread beats on it (_beat.pyx). Its end is the slave's end: no forked
  child keeps it open.
- `Listener.poll` never blocks and does a bounded amount of work, whoever connects and whatever they send.
- Nobody is a rank before the token was shown. Who does not show it is a stranger, and dropped; few strangers are kept at a time.
- Whatever else than beats a rank sends is a failure of that rank, and of nobody else.
- The master's clock is passed in.

The token keeps out strangers and other runs' slaves; it crosses the network in clear text, and nothing secret depends on it.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import math
import os
import secrets
import select
import socket
import struct
import time
import weakref
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, Literal, NamedTuple

from jd_hpc._beat import BEAT, Beat
from jd_hpc.addresses import LOOPBACK, find_addresses
from jd_hpc.errors import BeatError

FAREWELL: Final = b"\x04"
"""Instead of a beat: this rank ends in order."""
MAGIC: Final = b"jd_beat1"
"""First bytes of a connection. The digit is raised whenever the layout of the hello changes."""
TOKEN_BYTES: Final = 16
HELLO: Final = struct.Struct(f"!{len(MAGIC)}s{TOKEN_BYTES}sI")
"""What a slave says once, before its beats: the magic bytes, the token, its rank."""

MOST_ACCEPTS: Final = 16
"""Connections accepted in one poll: some 20 us each, so that a flood of them delays the master by less than half a millisecond."""
MOST_READY: Final = 64
"""Connections looked at in one poll, some 2 us each; the kernel hands them out in turn."""
READ_BYTES: Final = 4096
"""Bytes read from one connection in one poll: more beats than come in minutes, and still copied in no time."""
MOST_STRANGERS: Final = 64
"""Connections that have not shown the token yet: what a flood of strangers can cost in file descriptors."""
HELLO_LIMIT_S: Final = 5.0
"""A slave's hello follows its connection at once; this is ample even where packets get lost."""
LISTEN_BACKLOG: Final = 1024
"""Connections the kernel holds for the next poll: all slaves of a large run connect in the same moment."""
FLOOD_FACTOR: Final = 100
"""A rank may beat so many times as often as agreed on. A bug that floods sends a thousand times more."""
FLOOD_BURST_BYTES: Final = 1 << 18
"""What a rank may send at once besides: more than the buffers of both kernels hold, if the master was away for hours."""
COMPLAIN_EVERY_S: Final = 10.0
"""Between two lines about strangers in the log: a port scan must not fill a disk."""
SOCKET_OPTIONS: Final = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1))
"""Options of both ends: the kernel finds out that the other host is gone, and no beat waits for the one before it."""

SEND_BUFFER_BYTES: Final = 8192
RECEIVE_BUFFER_BYTES: Final = 65536
"""Small ones, so that few beats wait for a master that is away: with the systems' own sizes it was 4 MB of them."""
GONE_MASK: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
"""The peer's end is closed; this shows even while beats that came before are still unread."""

LOGGER = logging.getLogger("jd_hpc")

_open_ends: weakref.WeakSet[Connection | Listener] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child lets go of its copies: the master must see the end of a rank whose child lives on."""
    for end in list(_open_ends):
        end._let_go()


os.register_at_fork(after_in_child=_close_in_child)


class Connection:
    """A slave's end: while the process lives, a byte goes to the master every period.

    Made by `connect`. Threads of the process, and a forked child, need not care: the child's copy is closed.
    """

    def __init__(self, sock: socket.socket, period_s: float) -> None:
        self._socket: socket.socket | None = sock
        self._period_s = period_s
        self._beat = Beat(sock.fileno(), period_s)
        _open_ends.add(self)

    @classmethod
    def connect(
        cls, addresses: Sequence[tuple[str, int]], token: bytes, rank: int, period_s: float, timeout_s: float
    ) -> Connection:
        """Connect to the master, say which rank this is, and start to beat.

        Returns as soon as the hello is on its way: the master need not be polling. Whether it accepted the hello shows there.

        Parameters
        ----------
        addresses : sequence of (str, int)
            Where to try, in this order: what `Listener.addresses_for` gave for this host.
        token : bytes
            `Listener.token`.
        rank : int
            This slave's.
        period_s : float
            From beat to beat, in seconds: what the listener was told.
        timeout_s : float
            For all addresses together, in seconds; each gets an equal share of what is left.

        Raises
        ------
        BeatError
            If none of the addresses answers, with what each of them said; or if the system gives no further thread. It is an
            OSError.
        ValueError
            If there is no address, or token, rank or a time is out of range.
        """
        if not addresses or len(token) != TOKEN_BYTES or not 0 <= rank < 1 << 32 or not timeout_s > 0:
            raise ValueError(
                f"addresses must not be empty, the token {TOKEN_BYTES} bytes long, the rank 32 bits, timeout_s above 0; "
                f"they are {addresses!r}, {len(token)} bytes, {rank} and {timeout_s}"
            )
        end_s = time.monotonic() + timeout_s  # it blocks: here nobody can pass a clock in
        failures = []
        for number, address in enumerate(addresses):
            share_s = max(end_s - time.monotonic(), 0.001) / (len(addresses) - number)
            try:
                sock = _say_hello(address, HELLO.pack(MAGIC, token, rank), share_s)
            except OSError as error:
                failures.append(f"{address[0]} port {address[1]}: {error}")
                continue
            try:
                return cls(sock, period_s)
            except OSError as error:
                sock.close()
                raise BeatError(f"slave {rank}: {error}. Cure: raise the limit of processes (ulimit -u).") from error
            except BaseException:
                sock.close()
                raise
        raise BeatError(
            f"slave {rank} cannot reach the master within {timeout_s:g} s; it tried {'; '.join(failures)}. "
            f"Cause: a firewall between the hosts, no common network, or a master that has ended. "
            f"Cure: let the hosts of a run connect to each other by TCP."
        )

    @property
    def alive(self) -> bool:
        """Whether beats are being sent. False after `close`, and when the master has hung up."""
        return self._beat.alive

    def farewell(self) -> None:
        """Say that this process leaves in order. No beat comes after it; the socket stays open until the process is gone."""
        if self._socket is not None:
            self._beat.stop()
            with contextlib.suppress(OSError):  # the master has left before us
                self._socket.send(FAREWELL, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def beat_every(self, period_s: float) -> None:
        """Beat so often from now on; 0: not at all, while the connection stays."""
        if self._socket is None or period_s == self._period_s:  # a run like the last one needs no other thread
            return
        self._period_s = period_s
        self._beat.stop()
        if period_s:
            self._beat = Beat(self._socket.fileno(), period_s)

    @contextlib.contextmanager
    def limited(self, seconds: float | None) -> Iterator[None]:
        """Context: what takes longer than so many seconds falls silent, although the process lives. None: no limit."""
        self._beat.limit(seconds or 0)
        try:
            yield
        finally:
            self._beat.limit(0)

    def fileno(self) -> int:
        """Return the socket's file descriptor, or -1 after `close`."""
        return -1 if self._socket is None else self._socket.fileno()

    def close(self) -> None:
        """Stop the beats and hang up. A second call does nothing."""
        self._let_go()

    def _let_go(self) -> None:
        """In a forked child too: there is no thread to stop, and the connection stays the parent's."""
        sock, self._socket = self._socket, None
        if sock is not None:
            self._beat.stop()  # first: the number of a closed descriptor may soon be somebody else's
            sock.close()

    def __del__(self) -> None:
        if hasattr(self, "_beat"):
            self.close()


def _say_hello(address: tuple[str, int], hello: bytes, timeout_s: float) -> socket.socket:
    """Connect and send the hello; the socket that is returned does not block."""
    sock = socket.create_connection(address, timeout_s)
    try:
        # Where nobody listens the kernel may give the caller that very port, and then it has called itself.
        if sock.getsockname() == sock.getpeername():
            raise ConnectionRefusedError("nobody listens there")
        for option in SOCKET_OPTIONS:
            sock.setsockopt(*option)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        sock.sendall(hello)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class Event(NamedTuple):
    """What happened to a rank's connection. After any kind but "connected" it is closed.

    Attributes
    ----------
    rank : int
        Whose.
    kind : str
        "connected"; "left": it said farewell; "closed": end of file or reset without that; "flood": far more beats than agreed on;
        "garbage": something that is no beat.
    """

    rank: int
    kind: Literal["connected", "left", "closed", "flood", "garbage"]


class _Peer:
    """One accepted connection: a stranger's as long as `rank` is None."""

    __slots__ = ("credit_at", "credit_bytes", "fd", "hello", "rank", "since", "sock", "where")

    def __init__(self, sock: socket.socket, where: str, now: float) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.where = where
        self.since = now
        self.hello = b""
        self.rank: int | None = None
        self.credit_bytes = float(FLOOD_BURST_BYTES)  # what it may send before that is a flood
        self.credit_at = now


class _Complaints:
    """Log lines about strangers, few enough for any log."""

    def __init__(self) -> None:
        self._said_at = -math.inf
        self._unsaid = 0

    def add(self, text: str, now: float) -> None:
        """Log a line, or count it if there was one lately."""
        self._unsaid += 1
        if now - self._said_at >= COMPLAIN_EVERY_S:
            more = f" (and {self._unsaid - 1} more since the last such line)" if self._unsaid > 1 else ""
            LOGGER.warning("The port for the slaves' beats: %s%s.", text, more)
            self._said_at, self._unsaid = now, 0

    def flush(self, now: float) -> None:
        """Log how many were only counted, if it is time for a line."""
        if self._unsaid and now - self._said_at >= COMPLAIN_EVERY_S:
            LOGGER.warning("The port for the slaves' beats: %d more connections were dropped.", self._unsaid)
            self._said_at, self._unsaid = now, 0


class Listener:
    """The master's end: hears the beats of all slaves.

    Parameters
    ----------
    size : int
        Ranks of the run; the slaves are 1 to `size` - 1.
    period_s : float
        From beat to beat, in seconds: what the slaves are told. Who beats FLOOD_FACTOR times as often is thrown out.

    Raises
    ------
    BeatError
        If no port can be opened. It is an OSError.
    ValueError
        If a number is out of range.

    Attributes
    ----------
    token : bytes
        What a slave must show: 16 random bytes, for this listener only.
    addresses : list of (str, int)
        Where it can be reached: loopback first, then every other address of this machine that was found.
    left : set of int
        The ranks that have said farewell.
    """

    def __init__(self, size: int, period_s: float) -> None:
        if size < 1 or not (math.isfinite(period_s) and period_s > 0):
            raise ValueError(f"size must be at least 1 and period_s above 0; they are {size} and {period_s}")
        self._size = size
        self._beats_per_s = 1.0 / period_s
        self._peers: dict[int, _Peer] = {}  # by file descriptor
        self._strangers: dict[int, _Peer] = {}  # those without a rank, the oldest first
        self._ranks: dict[int, _Peer] = {}  # the others, by rank
        self._heard: list[float | None] = [None] * size
        self.left: set[int] = set()
        self._swept = -math.inf  # when everything that had come was read
        self._sweep_began = -math.inf
        self._sweep_count = 0
        self._complaints = _Complaints()
        self._buffer = bytearray(READ_BYTES)
        self.token: bytes = secrets.token_bytes(TOKEN_BYTES)
        self._socket, self._epoll, hosts = _listen()
        self._fd = self._socket.fileno()
        port = self._socket.getsockname()[1]
        self.addresses: list[tuple[str, int]] = [(host, port) for host in hosts]
        _open_ends.add(self)

    def addresses_for(self, host_name: str) -> list[tuple[str, int]]:
        """Return what a slave on that host should try, best first.

        On this host that is loopback and then all others; elsewhere loopback is somebody else's, and left out, unless there is
        nothing else.
        """
        if _short(host_name) == _short(socket.gethostname()):
            return list(self.addresses)
        return self.addresses[1:] or list(self.addresses)

    @property
    def connected(self) -> AbstractSet[int]:
        """The ranks that are connected: a live view, not to be iterated over while polling."""
        return self._ranks.keys()

    def last_heard(self, rank: int) -> float | None:
        """Return the time of the poll that read the rank's last byte, None if there was none. It outlives the connection."""
        return self._heard[rank]

    def silent(self, now: float, timeout_s: float) -> list[int]:
        """Return the connected ranks that were not heard for longer than `timeout_s` seconds.

        Nobody is called silent whose beats may lie unread: time counts up to the last poll that had read everything. So a master
        that was away for minutes may ask at once.
        """
        limit = min(now, self._swept) - timeout_s
        heard = self._heard
        return [rank for rank in self._ranks if heard[rank] < limit]  # type: ignore[operator]  # a connected one was heard

    def poll(self, now: float) -> list[Event]:
        """Read what has come, let in who has the token, drop who has not; never block.

        Parameters
        ----------
        now : float
            Seconds on a clock that never goes back.

        Returns
        -------
        list of Event
            In the order in which they were found.

        Raises
        ------
        ValueError
            After `close`, and in a forked child.
        """
        events: list[Event] = []
        knocks = False
        ready = self._epoll.poll(0, MOST_READY)
        for fd, mask in ready:
            peer = self._peers.get(fd)
            if fd == self._fd:
                knocks = True  # last: a descriptor that is closed on the way must not be given out again before the end
            elif peer is None:
                continue  # closed on the way
            elif peer.rank is None:
                self._read_hello(peer, now, events)
            else:
                self._read_beats(peer, peer.rank, mask, now, events)
        self._note_sweep(len(ready), now)
        if knocks:
            self._accept(now, events)
        if self._strangers:
            self._drop_overdue(now, events)
        self._complaints.flush(now)
        return events

    def close(self) -> None:
        """Hang up on everybody and free the port. A second call does nothing."""
        self._let_go()
        self._complaints.flush(math.inf)

    def _let_go(self) -> None:
        """In a forked child too, and so nothing is unregistered or shut down, which the parent would feel."""
        self._epoll.close()
        self._socket.close()
        for peer in self._peers.values():
            peer.sock.close()
        for table in (self._peers, self._strangers, self._ranks):
            table.clear()

    def _note_sweep(self, ready: int, now: float) -> None:
        """Find out since when nothing lies unread: after a poll that was not full, or full ones enough for everybody's turn."""
        if self._sweep_count == 0:
            self._sweep_began = now
        self._sweep_count += ready
        if ready < MOST_READY:
            self._swept, self._sweep_count = now, 0
        elif self._sweep_count > len(self._peers) + MOST_READY:
            self._swept, self._sweep_count = self._sweep_began, 0

    def _accept(self, now: float, events: list[Event]) -> None:
        for _ in range(MOST_ACCEPTS):
            try:
                sock, where = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:  # whoever knocked has left, or there are no descriptors left: ulimit -n
                self._complaints.add(f"a connection could not be accepted: {error}", now)
                return
            if len(self._strangers) >= MOST_STRANGERS:
                oldest = next(iter(self._strangers.values()))
                self._drop(oldest, f"{MOST_STRANGERS} strangers wait, and it was the first of them", now, events)
            sock.setblocking(False)
            peer = _Peer(sock, where[0], now)
            self._peers[peer.fd] = self._strangers[peer.fd] = peer
            self._epoll.register(peer.fd, select.EPOLLIN | select.EPOLLRDHUP)
            self._read_hello(peer, now, events)  # a rank's has mostly come already

    def _drop_overdue(self, now: float, events: list[Event]) -> None:
        overdue = [peer for peer in self._strangers.values() if now - peer.since > HELLO_LIMIT_S]
        for peer in overdue:
            self._drop(peer, f"no hello within {HELLO_LIMIT_S:g} s", now, events)

    def _drop(self, peer: _Peer, reason: str, now: float, events: list[Event]) -> None:
        """Drop a stranger who had his chance; if the master was away, his hello may lie unread, and he is none."""
        self._read_hello(peer, now, events)
        if self._strangers.get(peer.fd) is peer:
            self._refuse(peer, reason, now)

    def _read_hello(self, peer: _Peer, now: float, events: list[Event]) -> None:
        try:
            data = peer.sock.recv(HELLO.size - len(peer.hello))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        peer.hello += data
        if not data:
            self._refuse(peer, "gone before its hello was complete", now)
        elif len(peer.hello) == HELLO.size:
            self._check_hello(peer, now, events)

    def _check_hello(self, peer: _Peer, now: float, events: list[Event]) -> None:
        magic, token, rank = HELLO.unpack(peer.hello)
        if not hmac.compare_digest(token, self.token) or magic != MAGIC:
            self._refuse(peer, "no slave of this run", now)
        elif not 0 < rank < self._size:
            self._refuse(peer, f"says to be slave {rank}, but there are only 1 to {self._size - 1}", now)
        elif rank in self._ranks and not _has_left(self._ranks[rank].sock):
            self._refuse(peer, f"says to be slave {rank}, who is connected", now)
        else:
            if rank in self._ranks:
                self._end(self._ranks[rank], rank, "closed", events)
            del self._strangers[peer.fd]
            peer.rank, peer.credit_at = rank, now
            self._ranks[rank] = peer
            self._heard[rank] = now
            events.append(Event(rank, "connected"))

    def _read_beats(self, peer: _Peer, rank: int, mask: int, now: float, events: list[Event]) -> None:
        try:
            count = peer.sock.recv_into(self._buffer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if count and self._buffer[count - 1] == FAREWELL[0]:
            self._end(peer, rank, "left", events)
            self.left.add(rank)
            return
        if count == 0 or mask & GONE_MASK:
            self._end(peer, rank, "closed", events)
            return
        self._heard[rank] = now
        if self._buffer.count(BEAT, 0, count) != count:
            self._end(peer, rank, "garbage", events)
            return
        # What came while the master was away is no flood: the credit has grown meanwhile.
        earned = (now - peer.credit_at) * self._beats_per_s * FLOOD_FACTOR
        peer.credit_bytes = min(peer.credit_bytes + earned, FLOOD_BURST_BYTES) - count
        peer.credit_at = now
        if peer.credit_bytes < 0:
            self._end(peer, rank, "flood", events)

    def _refuse(self, peer: _Peer, reason: str, now: float) -> None:
        del self._strangers[peer.fd]
        self._hang_up(peer)
        self._complaints.add(f"a connection from {peer.where} was dropped: {reason}", now)

    def _end(self, peer: _Peer, rank: int, kind: Literal["left", "closed", "flood", "garbage"], events: list[Event]) -> None:
        del self._ranks[rank]
        self._hang_up(peer)
        events.append(Event(rank, kind))

    def _hang_up(self, peer: _Peer) -> None:
        del self._peers[peer.fd]
        self._epoll.unregister(peer.fd)  # a child that was forked behind Python's back would keep it registered
        peer.sock.close()


def _has_left(sock: socket.socket) -> bool:
    """Whether the peer has closed its end, even if bytes from before are still unread."""
    question = select.poll()
    question.register(sock, select.POLLRDHUP)
    return bool(question.poll(0))


def _listen() -> tuple[socket.socket, select.epoll, list[str]]:
    """Open a port on all interfaces, and what waits for it; say at which addresses of this machine it is."""
    sock = None
    try:
        sock, ipv6 = _bind()
        hosts = [LOOPBACK, *find_addresses(ipv6)]
        for option in SOCKET_OPTIONS:
            sock.setsockopt(*option)  # the accepted ones inherit these and the next
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        sock.setblocking(False)
        epoll = select.epoll()
        epoll.register(sock, select.EPOLLIN)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise BeatError(
            f"the master cannot open a port for the slaves' beats: {error}. Cause: no file descriptors left (ulimit -n), or no "
            f"network in this container. Cure: raise the limit, or allow TCP."
        ) from error
    return sock, epoll, hosts


def _bind() -> tuple[socket.socket, bool]:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=LISTEN_BACKLOG, dualstack_ipv6=True), True
        except OSError:
            pass  # the kernel knows IPv6 but was told not to use it
    return socket.create_server(("", 0), backlog=LISTEN_BACKLOG), False


def _short(host_name: str) -> str:
    return host_name.partition(".")[0].lower()

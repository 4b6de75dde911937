"""The data that `shared()` gives to all slaves before their first job: one copy per host. No MPI.

The rules it keeps:

- The pickled value lies in memory that has a file descriptor and no name (memfd): other processes of the host map it, read-only,
  and nothing is left behind, whoever dies.
- A rank opens another one's memory by /proc, and believes it only if it shows the token: elsewhere that number is another file.
- Who cannot open it gets the bytes. A host whose keeper is lost before the others have its address gets another keeper.
- `Sharing` knows ranks and hosts only, and names what is to be sent.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from jd_hpc.errors import PayloadError, ProtocolError
from jd_hpc.payload import pack, pack_into, unpack
from jd_hpc.wire import padded_bytes

MAPPED_FROM_BYTES = 1 << 18
"""Less is sent to every slave: it is as fast, and a page of its own for every array would not pay."""
TOKEN_BYTES = 16
HEAD_BYTES = 64
"""The token, and what aligns the arrays behind it."""
MOST_ASKS = 2
"""A rank asks once, and once more if it cannot open what it was told of."""

ASKS, REFUSES, KEEPS = "asks", "refuses", "keeps"
"""What a slave says: its facts, when it has none of the data; that it cannot open an address; the address of what it holds."""


class Address(NamedTuple):
    """Where a process of this host holds the data."""

    pid: int
    fd: int
    size: int
    token: bytes


class Memory:
    """Bytes that other processes of the host can map.

    Attributes
    ----------
    data : ndarray of uint8
        The bytes.
    address : Address or None
        None: they are this process's alone.
    """

    def __init__(self, data: NDArray[np.uint8], address: Address | None, fd: int | None = None) -> None:
        self.data, self.address, self._fd = data, address, fd

    @classmethod
    def create(cls, size: int) -> Memory:
        """Make so many bytes. Where they are few, or the system has no memfd for them, they are this process's alone."""
        if size < MAPPED_FROM_BYTES:
            return cls(np.empty(size, "u1"), None)
        try:
            fd = os.memfd_create("jd_hpc")
        except (AttributeError, OSError):
            return cls(np.empty(size, "u1"), None)
        try:
            os.ftruncate(fd, HEAD_BYTES + size)
            mapped = mmap.mmap(fd, HEAD_BYTES + size)
        except OSError:
            os.close(fd)
            return cls(np.empty(size, "u1"), None)
        token = secrets.token_bytes(TOKEN_BYTES)
        mapped[:TOKEN_BYTES] = token
        return cls(np.frombuffer(mapped, "u1")[HEAD_BYTES:], Address(os.getpid(), fd, size, token), fd)

    @classmethod
    def open(cls, address: Address) -> Memory:
        """Map another process's, read-only.

        Raises
        ------
        OSError
            If that cannot be, or is another file: the process is gone, or in another PID namespace, or /proc is hidden.
        """
        path = Path(f"/proc/{address.pid}/fd/{address.fd}")
        size = HEAD_BYTES + address.size
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:  # to open a device may do something
            raise OSError(f"{path} is another file")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            mapped = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        if mapped[:TOKEN_BYTES] != address.token:
            raise OSError(f"{path} is another file")
        return cls(np.frombuffer(mapped, "u1")[HEAD_BYTES:], address)

    def value(self) -> Any:
        """Rebuild what was packed; arrays in it are views of these bytes, read-only."""
        data = self.data[:]
        data.flags.writeable = False
        return unpack(data)

    def close(self) -> None:
        """Let nobody open it any more. The bytes stay as long as somebody has an array in them."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


class Link(Protocol):
    """What a slave needs of the core."""

    def ask_for_shared(
        self, told: dict[str, Any], make_memory: Callable[[int], NDArray[np.uint8]]
    ) -> tuple[bool, bool, NDArray[np.uint8]] | None:
        """Send this to the master; return its answer, or None if the run is over."""

    def tell_shared(self, told: dict[str, Any]) -> None:
        """Send this to the master."""


class Holder:
    """What a rank holds of the data. A context: with it ends what other ranks can open."""

    def __init__(self) -> None:
        self._memory: Memory | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def _make(self, size: int) -> NDArray[np.uint8]:
        self._memory = Memory.create(size)
        return self._memory.data

    def pack(self, value: Any, limit_bytes: int) -> tuple[Memory, int]:
        """Master: lay the value into memory; return that, and its size in bytes.

        Raises
        ------
        PayloadError
            If it cannot be pickled, or is larger than the limit.
        """
        frames, size = pack(value, "what shared() returned")
        if size > limit_bytes:
            raise PayloadError(f"what shared() returned takes {size} bytes, over payload_limit = {limit_bytes}; raise that limit")
        padded = padded_bytes(size)
        self._memory = Memory.create(padded)
        pack_into(frames, self._memory.data)
        return self._memory, size

    def fetch(self, link: Link, facts: dict[str, str]) -> Any:
        """Slave: get the value from the master, or from where it says. None if the run ends before that."""
        told: dict[str, Any] = {ASKS: facts}
        while (answer := link.ask_for_shared(told, self._make)) is not None:
            is_address, is_keeper, data = answer
            if not is_address:
                if is_keeper:
                    assert self._memory is not None
                    link.tell_shared({KEEPS: self._memory.address})
                return Memory(data, None).value()
            try:
                return Memory.open(unpack(data)).value()
            except OSError:
                told = {REFUSES: True}
        return None


class Sharing:
    """Master: who has the data, who waits for it, and what is to be sent.

    Parameters
    ----------
    hosts : dict of str to list of int
        Host name → ranks on it.
    """

    def __init__(self, hosts: dict[str, list[int]]) -> None:
        self._host_of = {rank: host for host, ranks in hosts.items() for rank in ranks}
        self._is_there = self._is_mapped = False
        self._addresses: dict[str, tuple[int, Address]] = {}  # host → (keeper, where it holds the data)
        self._fetching: dict[str, int] = {}  # host → the rank that is to be its keeper
        self._waiting: dict[str, list[int]] = {}
        self._refused: set[int] = set()  # they cannot open what there is on their host
        self._asked: dict[int, int] = {}
        self._missing: AbstractSet[int] = frozenset()
        self._changed: list[str] = []  # hosts to look at

    def offer(self, address: Address | None) -> None:
        """The value is there: rank 0 holds it. None: it is sent to every rank."""
        self._is_there, self._is_mapped = True, address is not None
        if address is not None:
            self._addresses[self._host_of[0]] = (0, address)
        self._changed.extend(self._waiting)

    def hear(self, rank: int, told: dict[str, Any]) -> None:
        """A slave has said something.

        Raises
        ------
        ProtocolError
            If no slave says that.
        """
        host = self._host_of[rank]
        if ASKS in told or REFUSES in told:
            self._asked[rank] = self._asked.get(rank, 0) + 1
            if self._asked[rank] > MOST_ASKS:
                raise ProtocolError(f"slave {rank} asks for the shared data again and again")
            if REFUSES in told:
                self._refused.add(rank)
            self._waiting.setdefault(host, []).append(rank)
        elif KEEPS in told:
            if self._fetching.get(host) != rank:
                return  # it was given up, and another one is to be the keeper
            del self._fetching[host]
            address = told[KEEPS]
            if isinstance(address, Address):
                self._addresses[host] = (rank, address)
        else:
            raise ProtocolError(f"slave {rank} says of the shared data {sorted(map(str, told))}")
        self._changed.append(host)

    def lose(self, dead: AbstractSet[int], missing: AbstractSet[int]) -> None:
        """So many ranks are gone, or do not answer: others take their places."""
        self._missing = frozenset(missing)
        for host, ranks in self._waiting.items():
            ranks[:] = [rank for rank in ranks if rank not in dead]
            keeper, fetching = self._addresses.get(host, (None, None))[0], self._fetching.get(host)
            if keeper in dead:
                del self._addresses[host]
            if fetching in dead or (fetching in missing and any(rank not in missing for rank in ranks)):
                del self._fetching[host]
            self._changed.append(host)

    def next(self) -> tuple[int, Address | None, bool] | None:
        """Return what is to be sent next: to whom, which address (None: the bytes), and whether it is to be its host's keeper."""
        while self._is_there and self._changed:
            answer = self._answer(self._changed[-1])
            if answer is not None:
                return answer
            self._changed.pop()
        return None

    def _answer(self, host: str) -> tuple[int, Address | None, bool] | None:
        ranks = self._waiting.get(host, [])
        for at, rank in enumerate(ranks):
            if not self._is_mapped or rank in self._refused:
                del ranks[at]
                return rank, None, False
            if host in self._addresses:
                del ranks[at]
                return rank, self._addresses[host][1], False
        if ranks and host not in self._fetching:
            rank = next((rank for rank in ranks if rank not in self._missing), ranks[0])
            ranks.remove(rank)
            self._fetching[host] = rank
            return rank, None, True
        return None


@contextlib.contextmanager
def put_back(attributes: dict[str, Any]) -> Iterator[None]:
    """Context of a run: an object's `shared` is afterwards what it was before."""
    was_there, before = "shared" in attributes, attributes.get("shared")
    try:
        yield
    finally:
        attributes.pop("shared", None)
        if was_there:
            attributes["shared"] = before

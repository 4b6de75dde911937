"""``-m jd_hpc.trial KIND``: a run of a few seconds on raw mpi4py in which a slave fails, to see whether the others live.

The rules it keeps: small messages, receives per source, no blocking call, everything has a limit. So what happens is the doing of
the launcher and the MPI alone. Rank 0 prints one line of JSON when all survivors have done all their rounds.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from typing import Any

from jd_hpc import ending, supervisor

ROUNDS = 40
FAILS_IN_ROUND = 5
VICTIM = 2
PAUSE_S = 0.01
"""A slave's work in a round."""
SILENCE_S = 1.0
"""A slave that does not answer for so long is lost."""
LIMIT_S = 20.0
"""No rank lives longer."""
STOP_WELL, STOP_FAILED = -1, -2


def fail(kind: str) -> None:
    """Let this process fail in the way that `kind` names."""
    if kind in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, kind))
    elif kind == "SEGV":
        ctypes.string_at(0)
    elif kind.startswith("_exit"):
        os._exit(int(kind.removeprefix("_exit")))
    elif kind == "exception":
        raise ValueError("a slave's own mistake")


class Peer:
    """Another rank: one message to it and one from it at a time, never waited for."""

    def __init__(self, mpi: Any, rank: int) -> None:
        self.mpi, self.rank = mpi, rank
        self.heard_at = time.monotonic()
        self.lost = False
        self._kept: list[Any] = []  # a buffer belongs to its request, also when that never completes
        self._listen()

    def _listen(self) -> None:
        self._buffer = bytearray(8)
        self._request = self._checked(self.mpi.COMM_WORLD.Irecv, [self._buffer, self.mpi.BYTE], self.rank)

    def _checked(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except self.mpi.Exception:  # an MPI with ULFM tells
            self.lost = True
            return None

    def send(self, number: int) -> None:
        """Send a number."""
        content = number.to_bytes(8, "little", signed=True)
        self._kept.append((content, self._checked(self.mpi.COMM_WORLD.Isend, [content, self.mpi.BYTE], self.rank)))

    def receive(self) -> int | None:
        """Return a number that has come, or None."""
        if self.lost or not self._checked(self._request.Test):
            return None
        number = int.from_bytes(self._buffer, "little", signed=True)
        self.heard_at = time.monotonic()
        self._listen()
        return number

    def close(self) -> None:
        """Take back the receive that nothing will come for. Only in a run without failures: elsewhere that may wait for ever."""
        self._request.Cancel()
        self._request.Wait()

    def is_silent(self) -> bool:
        """Tell whether nothing has come for too long."""
        return self.lost or time.monotonic() - self.heard_at > SILENCE_S


def master(mpi: Any, kind: str) -> dict[str, Any]:
    """Exchange messages with all slaves until each has done its rounds or is lost; return what was seen."""
    comm = mpi.COMM_WORLD
    begin = time.monotonic()
    peers = [Peer(mpi, rank) for rank in range(1, comm.Get_size())]
    rounds = {peer.rank: 0 for peer in peers}
    working = list(peers)
    for peer in peers:
        peer.send(0)
    while working:
        for peer in list(working):
            if peer.receive() is not None:
                rounds[peer.rank] += 1
                if rounds[peer.rank] == ROUNDS:
                    working.remove(peer)
                else:
                    peer.send(rounds[peer.rank])
            elif peer.is_silent():
                peer.lost = True
                working.remove(peer)
        time.sleep(0.0005)
    lost = [peer.rank for peer in peers if rounds[peer.rank] < ROUNDS]
    live = [peer for peer in peers if peer.rank not in lost]
    for peer in live:
        peer.send(STOP_FAILED if lost else STOP_WELL)
    if not lost:
        for peer in peers:
            peer.close()
    else:
        waiting = set(live)

        def others_gone() -> bool:
            for peer in list(waiting):
                if peer.lost or peer.receive() == STOP_FAILED:
                    waiting.discard(peer)
            return not waiting

        ending.failed(f"lost {lost}", others_gone)
    return {"lost": lost, "finished": len(live), "seconds": time.monotonic() - begin}


def slave(mpi: Any, kind: str, rank: int) -> None:
    """Answer the master until it says stop, or fail on the way."""
    peer = Peer(mpi, 0)
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        number = peer.receive()
        if number is None:
            time.sleep(0.0005)
            continue
        if rank == VICTIM and number == FAILS_IN_ROUND:
            fail(kind)
        if number < 0:
            if number == STOP_FAILED:
                ending.failed("the master says so")
                peer.send(STOP_FAILED)
            else:
                peer.close()
            return
        time.sleep(PAUSE_S)
        peer.send(number)
    os._exit(9)


def facts(mpi: Any) -> dict[str, Any]:
    """Return what MPI says of itself."""
    vendor, version = mpi.get_vendor()
    levels = {mpi.THREAD_SINGLE: "single", mpi.THREAD_FUNNELED: "funneled", mpi.THREAD_SERIALIZED: "serialized"}
    return {
        "vendor": vendor,
        "version": ".".join(map(str, version)),
        "size": mpi.COMM_WORLD.Get_size(),
        "thread": levels.get(mpi.Query_thread(), "multiple"),
        "ulfm": mpi.ERR_PROC_FAILED > 20,  # elsewhere the names are there, and using them aborts
    }


def main(kind: str) -> None:
    """Run as one rank. `kind`: SIGKILL, SIGSTOP, SEGV, _exit<code>, exception, none, or facts (no failure and no messages)."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    supervisor.say_joined()  # the others can do without a victim
    if kind == "facts":
        if comm.Get_rank() == 0:
            print(json.dumps(facts(MPI)), flush=True)
    elif comm.Get_rank() == 0:
        print(json.dumps(master(MPI, kind)), flush=True)
    else:
        slave(MPI, kind, comm.Get_rank())


if __name__ == "__main__":
    main(sys.argv[1])

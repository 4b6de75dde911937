"""The process that runs jobs for a rank, and the memory both share: see isolate.py for how they play together.

The rules it keeps:

- The child never calls MPI, and leaves only by os._exit: what the rank wants done at its exit is not the child's to do.
- A number in shared memory is set behind what it announces. So whoever finds the child dead finds a job done, or not.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import pickle
import resource
import signal
import struct
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from jd_hpc._batch import Buffer, Evaluator, SharedNumber
from jd_hpc.errors import Failure, PayloadError
from jd_hpc.payload import ALIGN_BYTES, pack, pack_into, unpack

SPIN_NS = 60_000
"""How long a message is watched for before its reader sleeps: to wake another core takes about as long."""
OOM_SCORE = "500"
"""Where memory runs out, the kernel is to kill the child and not the rank."""

HEAD = struct.Struct(f"=q?7xqq{ALIGN_BYTES - 32}x")

FAILURE, RESULT = 0, 1  # kinds of records in the journal
OVER_MEMORY, INTERRUPTED = 1, 2  # the child's own word on why it left
PR_SET_PDEATHSIG = 1

Failures = list[tuple[int, BaseException | Failure]]

_libc = ctypes.CDLL(None)


class Memory:
    """Pickles that a process shares with its children, in a file without a name that grows.

    Each has a head: its size, whether `pack` made it, and two numbers that say what it is. Most have no arrays inside: those are
    written as they are, since `pack` takes as long as several small ones.
    """

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self._fd = os.memfd_create("jd_hpc")
        else:  # a Python built for an old libc
            with tempfile.TemporaryFile(dir="/dev/shm") as file:
                self._fd = os.dup(file.fileno())
        self._map = mmap.mmap(-1, mmap.PAGESIZE)
        self._size = 0
        self._reserve(mmap.PAGESIZE)

    def _reserve(self, size: int) -> None:
        """Make it at least so long, or take notice that the other process did."""
        if size <= self._size:
            return
        if os.fstat(self._fd).st_size < size:
            os.ftruncate(self._fd, max(size, 2 * self._size))
        self._map = mmap.mmap(self._fd, 0)
        self._size = len(self._map)

    def put(self, at: int, value: Any, what: str, kind: int = 0, offset: int = 0) -> int:
        """Write a pickle at byte `at`; return where the next one may begin.

        Raises
        ------
        PayloadError
            If `value`, which is `what`, cannot be pickled.
        """
        buffers: list[pickle.PickleBuffer] = []
        try:
            plain = pickle.dumps(value, 5, buffer_callback=buffers.append)
        except KeyboardInterrupt:
            raise
        except BaseException:
            plain = b""  # pack will say what is wrong
        start = at + HEAD.size
        if plain and not buffers:
            size = len(plain)
            self._reserve(start + size)
            self._map[start : start + size] = plain
        else:
            frames, size = pack(value, what)
            self._reserve(start + size)
            pack_into(frames, np.frombuffer(self._map, "u1", size, start))
            plain = b""
        HEAD.pack_into(self._map, at, size, not plain, kind, offset)
        return start - (-size // ALIGN_BYTES) * ALIGN_BYTES

    def head(self, at: int) -> tuple[int, int, int]:
        """Return the kind and the offset of the pickle at byte `at`, and where the next one begins."""
        self._reserve(at + HEAD.size)
        size, _, kind, offset = HEAD.unpack_from(self._map, at)
        return kind, offset, at + HEAD.size - (-size // ALIGN_BYTES) * ALIGN_BYTES

    def get(self, at: int) -> Any:
        """Rebuild what lies at byte `at`; it shares no memory with the pickle. Raises whatever unpickling does."""
        self._reserve(at + HEAD.size)
        size, packed, _, _ = HEAD.unpack_from(self._map, at)
        start = at + HEAD.size
        self._reserve(start + size)
        if packed:
            return unpack(np.frombuffer(self._map, "u1", size, start).copy())
        return pickle.loads(self._map[start : start + size])

    def close(self) -> None:
        """Close the file; the memory goes with this object."""
        os.close(self._fd)


def _fixed(size: int) -> NDArray[np.uint8]:
    """Bytes that a process shares with its children, of one length."""
    return np.frombuffer(mmap.mmap(-1, size), "u1")


class Shared:
    """All that rank and child share. Jobs lie from the beginning of each attempt: offset 0 is the first that is still to do."""

    def __init__(self, inner: Evaluator, grain: int) -> None:
        def number(at: int) -> SharedNumber:
            return SharedNumber(page, at * ALIGN_BYTES // 8)  # each in a cache line of its own

        page: NDArray[np.int64] = _fixed(mmap.PAGESIZE).view("i8")
        self.asked = number(0)  # the rank's count of batches
        self.answered = number(1)  # the child's
        self.count = number(2)  # jobs in the batch
        self.running = number(3)  # the job that runs; below 0: the child has not taken the batch yet; count: all done
        self.journal_bytes = number(4)  # complete records
        self.verdict = number(5)
        self.first = number(6)  # number of the job at offset 0
        self.jobs: NDArray[Any] | None = None  # rows, or
        self.job_memory: Memory | None = None  # a pickle
        self.out: Buffer | None = None
        self.codes: NDArray[np.int32] | None = None
        if inner.job_rows is None:
            self.job_memory = Memory()
        else:
            self.jobs = np.ndarray((grain,), inner.job_rows.dtype, _fixed(grain * inner.job_rows.row_bytes).data)
        if inner.result_rows is not None:
            size = grain * inner.result_rows.row_bytes
            self.out = Buffer(size, inner.result_rows, 0, True, _fixed(size))
        if inner.kernel is not None:
            self.codes = _fixed(grain * 4).view("i4")
        self.journal = Memory()  # results that are objects, and failures
        self.wake_child = os.eventfd(0)
        self.wake_rank = os.eventfd(0)

    def write(self, kind: int, at: int, value: Any, what: str) -> None:
        """Append a record to the journal; it is there for good when this returns."""
        self.journal_bytes.set(self.journal.put(self.journal_bytes.get(), value, what, kind, at))

    def records(self) -> Iterator[tuple[int, int, int]]:
        """Say of each record what kind it is, whose it is (an offset), and where it lies."""
        at, end = 0, self.journal_bytes.get()
        while at < end:
            kind, offset, following = self.journal.head(at)
            yield kind, offset, at
            at = following

    def close(self) -> None:
        """Close the files."""
        self.journal.close()
        if self.job_memory is not None:
            self.job_memory.close()
        os.close(self.wake_child)
        os.close(self.wake_rank)


class Child:
    """The process that runs the jobs."""

    def __init__(self, inner: Evaluator, shared: Shared, turn: int, memory_limit: int | None) -> None:
        self._inner = inner
        self._shared = shared
        self._turn = turn
        self._memory_limit = memory_limit
        self._own_pid = os.getpid()
        self._out: Buffer | None = None

    def live(self, rank: int, close_fds: Iterable[int], mask: Iterable[int]) -> NoReturn:
        """Run batches until the rank kills it."""
        try:
            self._settle(rank, close_fds, mask)
            while True:
                self._await_turn()
                self._batch()
                if os.getpid() != self._own_pid:  # a job has forked, and this is not the process that is waited for
                    os._exit(0)
                flush()
                self._shared.answered.set(self._turn)
                os.eventfd_write(self._shared.wake_rank, 1)
        except KeyboardInterrupt:  # raised by a job: SIGINT does not come here
            self._leave(INTERRUPTED)
        except BaseException as error:
            if self._is_memory(error):
                self._leave(OVER_MEMORY)
            traceback.print_exc()
        finally:
            flush()
            os._exit(70)

    def _settle(self, rank: int, close_fds: Iterable[int], mask: Iterable[int]) -> None:
        """Cut the ties with the rank that must be cut."""
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != rank:  # it died before that
            os._exit(0)
        os.setsid()  # what jobs start can be killed with the child, and a terminal's Ctrl-C goes to the rank alone
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):  # sent to all processes of a job, meant for the ranks
            signal.signal(number, signal.SIG_IGN)
        _leave_term_to_the_rank()
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for fd in close_fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
        gc.freeze()  # what the rank left is not to be looked through, and thereby copied, at every collection
        if self._memory_limit is not None:
            _limit_memory(self._memory_limit)
        if self._inner.result_rows is not None:
            self._inner.watch(self._shared.running, lambda at, error: self._tell([at], error), self._shared.codes)

    def _await_turn(self) -> None:
        self._turn += 1
        if not self._shared.asked.becomes(self._turn, SPIN_NS):
            while self._shared.asked.get() != self._turn:
                os.eventfd_read(self._shared.wake_child)

    def _leave(self, verdict: int) -> NoReturn:
        flush()
        self._shared.verdict.set(verdict)
        os._exit(0)

    def _is_memory(self, error: BaseException) -> bool:
        """Whether this is the end of a child that has a limit: who knows what else could not be allocated."""
        return self._memory_limit is not None and (isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError))

    # ---- a batch ---------------------------------------------------------------------------------------------------

    def _batch(self) -> None:
        shared, inner = self._shared, self._inner
        count, first = shared.count.get(), shared.first.get()
        shared.running.set(0)
        try:
            jobs = self._jobs(count)
        except Exception as error:  # it was pickled well, but cannot be rebuilt here
            self._tell(list(range(count)), error)
        else:
            if inner.kernel is not None:
                self._tell_all(inner.evaluate(jobs, count, shared.out, None, first))
            elif inner.process_jobs is not None:
                self._block(jobs, count, first)
            elif shared.out is not None:
                inner.evaluate(jobs, count, shared.out, None, first)  # which tells of each failure itself: it is watched
            else:
                self._singly(jobs, count, first)
        shared.running.set(count)

    def _jobs(self, count: int) -> Any:
        """Return jobs that a hook may keep; a kernel takes them where they lie."""
        shared = self._shared
        if shared.jobs is not None:
            rows = shared.jobs[:count]
            if self._inner.kernel is None:
                rows = rows.copy()
                rows.flags.writeable = False
            return rows
        assert shared.job_memory is not None
        return shared.job_memory.get(0)

    def _singly(self, jobs: Any, count: int, first: int) -> None:
        """Jobs whose results are objects: each is in the journal before the next job runs."""
        results: list[Any] = [None]
        for at in range(count):
            self._shared.running.set(at)
            failures = self._inner.evaluate(jobs[at : at + 1], 1, None, results, first + at)
            if failures:
                self._tell([at], failures[0][1])
            else:
                self._publish(at, results[0])
            results[0] = None

    def _block(self, jobs: Any, count: int, first: int) -> None:
        shared, codec = self._shared, self._inner.result_rows
        if codec is None:
            results: list[Any] = [None] * count
            failures = self._inner.evaluate(jobs, count, None, results, first)
            failed = {at for at, _ in failures}
            for at in range(count):
                if at not in failed:
                    self._publish(at, results[at])
        else:
            assert shared.out is not None
            if self._out is None or self._out.kept():  # a hook may keep its `results`
                self._out = Buffer(shared.out.size, codec, 0, True)
            failures = self._inner.evaluate(jobs, count, self._out, None, first)
            shared.out.rows[:count] = self._out.rows[:count]
        self._tell_all(failures)

    def _publish(self, at: int, result: Any) -> None:
        try:
            self._shared.write(RESULT, at, result, "what process_job returned")
        except PayloadError as error:
            self._tell([at], error)

    def _tell(self, offsets: list[int], error: BaseException | Failure) -> None:
        if not isinstance(error, Failure) and self._is_memory(error):
            self._leave(OVER_MEMORY)
        self._shared.write(FAILURE, -1, (offsets, Failure.of(error)), "a failure")

    def _tell_all(self, failures: Failures) -> None:
        """One record for an exception, however many jobs it failed."""
        records: dict[int, tuple[list[int], BaseException | Failure]] = {}
        for at, error in failures:
            records.setdefault(id(error), ([], error))[0].append(at)
        for offsets, error in records.values():
            self._tell(offsets, error)


def _leave_term_to_the_rank() -> None:
    """Let TERM, which may come to all processes of a job, do nothing here; what jobs start can be ended by it as ever.

    Not ignored, since what they start would inherit that, but caught by a C function without effect.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _libc.signal.argtypes, _libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    nothing = ctypes.cast(_libc.abs, ctypes.c_void_p)
    _libc.signal(signal.SIGTERM, nothing)

    def restore() -> None:
        before = _libc.signal(signal.SIGTERM, signal.SIG_DFL)
        if before != nothing.value:  # the job's own
            _libc.signal(signal.SIGTERM, before)

    os.register_at_fork(after_in_child=restore)


def flush() -> None:
    """Write out what this process has buffered, Python's and C's."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or None
            stream.flush()
    _libc.fflush(None)


def _limit_memory(most: int) -> None:
    """Let this process allocate so many bytes more."""
    status = Path("/proc/self/status").read_text()
    now_kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = now_kib * 1024 + most
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))

"""What a pool's maps do until their results are there, and who waits for these.

The rules it keeps:

- A chunk of a map is cut when a slave is free for it, by what the chunks before it took.
- Every map ends once: with all results, or with the first error.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from queue import SimpleQueue
from typing import Any, ClassVar, Self

from jd_hpc import calls
from jd_hpc.executor import LateError, Results
from jd_hpc.guide import Guide
from jd_hpc.session import Session


def cut(iterable: Iterable[Any], chunksize: int) -> Iterator[tuple[tuple[Any, ...], ...]]:
    """Cut an iterable into chunks for Results; one that raises loses nothing that it gave before."""
    if chunksize < 1:
        raise ValueError(f"chunksize = {chunksize} must be at least 1")
    return _chunks(iter(iterable), chunksize)


def _chunks(members: Iterator[Any], chunksize: int) -> Iterator[tuple[tuple[Any, ...], ...]]:
    chunk: list[tuple[Any, ...]] = []
    try:
        for member in members:
            chunk.append((member,))
            if len(chunk) == chunksize:
                yield tuple(chunk)
                chunk = []
    except Exception:
        if chunk:
            yield tuple(chunk)
        raise
    if chunk:
        yield tuple(chunk)


class AsyncResult:
    """What a call gives, or will give.

    Parameters
    ----------
    future : Future
        Has it.
    callback, error_callback : callable, optional
        Get it, or the exception.
    """

    def __init__(
        self,
        future: Future[Any],
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> None:
        self._future = future
        self._callback, self._error_callback = callback, error_callback
        if callback is not None or error_callback is not None:
            future.add_done_callback(self._call_back)

    def _call_back(self, future: Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None and self._error_callback is not None:
            self._error_callback(error)
        elif error is None and not future.cancelled() and self._callback is not None:
            self._callback(future.result())

    def get(self, timeout: float | None = None) -> Any:
        """Return the result, or raise what the call raised.

        Raises
        ------
        multiprocessing.TimeoutError
            If there is none after `timeout` seconds.
        """
        self.wait(timeout)
        if not self.ready():
            raise _not_ready(timeout)
        try:
            return self._future.result()
        finally:
            del self  # an exception's traceback holds this frame

    def wait(self, timeout: float | None = None) -> None:
        """Return when there is a result, or after `timeout` seconds."""
        wait([self._future], timeout)

    def ready(self) -> bool:
        """Tell whether the call has ended."""
        return self._future.done()

    def successful(self) -> bool:
        """Tell whether it has ended without an exception.

        Raises
        ------
        ValueError
            If it has not ended.
        """
        if not self.ready():
            raise ValueError("the call has not ended: ask ready() first, or wait()")
        return not self._future.cancelled() and self._future.exception() is None


def _not_ready(timeout: float | None) -> Exception:
    from multiprocessing import TimeoutError as NotReadyError  # what users of such pools catch

    return NotReadyError(f"no result after {timeout} s")


class ImapIterator:
    """The results of `imap`. After a call that raised it goes on with those of the next chunk.

    Parameters
    ----------
    results : Results
        Where they come from.
    """

    def __init__(self, results: Results) -> None:
        self._results = results
        self._values: list[Any] = []  # of one chunk, the last one first

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """Return the next result, or raise what its call raised.

        Raises
        ------
        StopIteration
            If there are no more.
        multiprocessing.TimeoutError
            If there is none after `timeout` seconds. It may come later.
        """
        end_s = None if timeout is None else time.monotonic() + timeout
        while not self._values:
            try:
                self._values = self._results.values(end_s)
            except LateError:
                raise _not_ready(timeout) from None
        return self._values.pop()

    def __del__(self) -> None:
        self._results.forsake()


class Map:
    """A map. Its tickets run in the session, each with one chunk after the other."""

    def __init__(
        self, session: Session, function: Callable[..., Any], members: Sequence[Any], guide: Guide, starred: bool, is_heard: bool
    ) -> None:
        self.future: Future[list[Any]] = Future()
        self.future.set_running_or_notify_cancel()
        self.session, self.guide = session, guide
        self._function, self._name = calls.packed_function(function), calls.name_of(function)
        self._members, self._starred = members, starred
        self._given = 0  # to slaves
        self._open = len(members)
        self._results: list[Any] = [None] * len(members)
        self._is_heard = is_heard
        self._came: SimpleQueue[list[Any] | None] = SimpleQueue()  # what a callback is to get; None: no more
        if not self._open:
            self._finish()
        for _ in range(min(len(members), session.places)):
            session.put(_Ticket(self))

    def next_chunk(self) -> tuple[int, int]:
        """Return where the next chunk starts and how many calls it has; none if there is no more to be done."""
        if self.future.done():
            return 0, 0
        first, count = self._given, self.guide.next(len(self._members) - self._given)
        self._given += count
        return first, count

    def packed(self, first: int, count: int) -> calls.Call:
        """Return a chunk as it travels."""
        return calls.chunk(self._function, self._name, self._members[first : first + count], self._starred)

    def end(self, first: int, values: list[Any]) -> None:
        """A chunk has ended."""
        self._results[first : first + len(values)] = values
        self._open -= len(values)
        if self._is_heard:
            self._came.put(values)
        if not self._open:
            self._finish()

    def _finish(self) -> None:
        with contextlib.suppress(InvalidStateError):
            self.future.set_result(self._results)
        self._came.put(None)

    def fail(self, error: BaseException) -> None:
        """Nothing more goes out: from any thread."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)
        self._came.put(None)

    def wait(self, callback: Callable[[Any], object] | None) -> list[Any]:
        """Return the results when all are there."""
        try:
            while callback is not None and (values := self._came.get()) is not None:
                for value in values:
                    callback(value)
            return self.future.result()
        except BaseException as error:
            self.fail(error)
            raise
        finally:
            del self  # an exception's traceback holds this frame


class _Ticket:
    """A task of the session's: a chunk of a map, and after it the next one."""

    is_chunk: ClassVar[bool] = True
    __slots__ = ("_begun_s", "_count", "_first", "_map")

    def __init__(self, whole: Map) -> None:
        self._map = whole
        self._first = self._count = 0
        self._begun_s = 0.0

    def begin(self) -> calls.Call | None:
        self._first, self._count = self._map.next_chunk()
        if not self._count:
            return None
        self._begun_s = time.monotonic()
        try:
            return self._map.packed(self._first, self._count)
        except Exception as error:
            self._map.fail(error)
            return None

    def end(self, value: Any) -> None:
        self._map.guide.note(self._count, time.monotonic() - self._begun_s)
        self._map.end(self._first, value)
        self._map.session.again(self)

    def fail(self, error: BaseException) -> None:
        self._map.fail(error)

    def cancel(self) -> None:
        self._map.fail(RuntimeError("the pool was terminated"))


class Unordered(Results):
    """The results as they come in."""

    def __init__(self, session: Session, function: Callable[..., Any], chunks: Iterator[Any], most: int) -> None:
        self._ended: deque[Any] = deque()
        super().__init__(session, function, chunks, most)

    def note(self, chunk: Any) -> None:
        """A chunk has ended."""
        chunk.is_done = True
        self._ended.append(chunk)
        with self._done:
            self._done.notify()

    def _next(self, end_s: float | None) -> Any:
        """Take the chunk that ended first; one that never began has its turn when it is the first of all."""
        first = self._ahead[0]
        self._wait_for(lambda: self._ended or first.is_done, end_s)
        chunk = self._ended.popleft() if self._ended else first
        self._ahead.remove(chunk)
        return chunk

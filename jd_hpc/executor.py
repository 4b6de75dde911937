"""Executor: the interface of concurrent.futures over MPI. A thin room over session.py."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import Executor as BaseExecutor
from concurrent.futures._base import PENDING
from types import TracebackType
from typing import Any, ClassVar, Literal, TypeVar

from jd_hpc import calls, futures_server
from jd_hpc.machine import LocalMachine, MPIMachine
from jd_hpc.session import OVER, Server, Session

T = TypeVar("T")

NAP_S = 0.0005
"""How long whoever reads results sleeps while they come in faster than this."""


class Executor(BaseExecutor):
    """Runs calls on the slaves of a communicator.

    Every rank makes it and enters it; the master gets the executor, a slave serves meanwhile and then gets None::

        with Executor(MPI.COMM_WORLD) as pool:
            if pool is not None:
                print(list(pool.map(function, range(100))))

    Under ``python -m jd_hpc.futures script.py`` only the master runs the script, and `Executor()` takes the other ranks. With no
    MPI it runs the calls in a thread of this process.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm or MPIMachine, optional
        Where the slaves are.
    max_workers : int, optional
        Use at most so many slaves.
    initializer : callable, optional
        Is called on each slave before its first call: ``initializer(*initargs)``. If it raises, the executor is broken.
    initargs : tuple
        Its arguments.
    journal : path, optional
        A file that gets every result; what it has from an earlier run with the same calls, in the same order, is not computed again
        (see docs/journal.md).
    **options
        Of `JobDispatcher`: `max_attempts`, `job_timeout_s`, `isolate`, ...; `credit` is 1 here. And `payload_limit`: bytes of the
        largest call, and of the largest result.

    Raises
    ------
    ValueError
        If a number is out of range.
    TypeError
        If the initializer cannot be called.
    """

    def __init__(
        self,
        comm: Any = None,
        max_workers: int | None = None,
        *,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        journal: Any = None,
        **options: Any,
    ) -> None:
        if max_workers is not None and max_workers < 1:
            raise ValueError(f"max_workers must be greater than 0, not {max_workers}")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer = {initializer!r} must be callable")
        options = {"max_slaves": max_workers, "initializer": initializer, "initargs": initargs, **options}
        self._hub = futures_server.hub() if comm is None else None
        self._options = options
        self._server = Server(comm if self._hub is None else self._hub.comm, **options)
        self._journal = journal
        self._naps = _Naps()
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._is_over = False

    @property
    def is_master(self) -> bool:
        """Whether this is the rank that hands out calls."""
        return self._server.machine.is_master

    @property
    def machine(self) -> LocalMachine | MPIMachine:
        """Where the calls run."""
        return self._server.machine

    @property
    def stats(self) -> dict[str, int]:
        """As `JobDispatcher.stats`, after the end."""
        return self._server.stats

    def __enter__(self) -> Executor | None:  # type: ignore[override]
        if self.is_master:
            self.begin()
            return self
        self.serve()
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if self.is_master:
            self.shutdown(wait=True)
        return False

    def serve(self) -> None:
        """Slave: serve until the master's executor is shut down. After that an executor cannot be entered again, on any rank."""
        if self._is_over:
            raise RuntimeError(OVER)
        self._is_over = True
        self._server.run()

    def begin(self) -> Session:
        """Master: begin, unless that was done, and return the open run."""
        with self._lock:
            if self._is_over:
                raise RuntimeError(OVER)
            if self._session is None:
                if not self.is_master:
                    raise RuntimeError("a slave serves: enter the executor by `with`, which gives it to the master only")
                if self._hub is not None:
                    self._hub.begin(self._options)
                self._session = Session(self._server, self._journal)
                if self._hub is not None:
                    self._hub.session = self._session
        return self._session

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Have ``function(*args, **kwargs)`` called on a slave.

        Returns
        -------
        Future
            With the result, or the exception that the function raised; its `__cause__` tells the slave and the traceback there. It
            has a PayloadError if the call cannot be pickled.

        Raises
        ------
        RuntimeError
            After `shutdown`.
        Unfinished
            If the run was drained, at the end of the allocation or by a signal. Calls that had not ended have it too.
        BrokenExecutor
            If the run ended early for another reason: its cause says why.
        """
        session = self._session or self.begin()
        future: _Future[T] = _Future(self._naps)
        try:
            call = calls.call(function, args, kwargs)
        except Exception as error:
            future.set_exception(error)
            return future
        session.put(_Submitted(future, call))
        return future

    def map(
        self,
        function: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Return an iterator over the results of ``function(*members)``, in order.

        Parameters
        ----------
        function : callable
            Takes as many arguments as there are iterables.
        *iterables
            They are read at once, or with `buffersize` as results are taken.
        timeout : float, optional
            Seconds from now after which the iterator raises TimeoutError.
        chunksize : int
            Calls that travel together. Large ones pay for small calls.
        buffersize : int, optional
            At most so many chunks are ahead of the results that were taken.

        Raises
        ------
        TimeoutError
            From the iterator.
        Exception
            From the iterator: what a call raised, in its place.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        end_s = None if timeout is None else time.monotonic() + timeout
        members = zip(*iterables, strict=False)
        chunks = iter(lambda: tuple(itertools.islice(members, chunksize)), ())
        return Results(self._session or self.begin(), function, chunks, buffersize).items(end_s)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and let the slaves go when all have ended.

        Parameters
        ----------
        wait : bool
            Return after that.
        cancel_futures : bool
            Cancel what no slave has yet.
        """
        with self._lock:
            self._is_over = True
        if self._session is not None:
            if cancel_futures:
                self._session.cancel()
            self._session.end(wait)


class _Naps:
    """Spares whoever takes one result after the other being woken for each: that costs more than a small call."""

    def __init__(self) -> None:
        self._taken_s = -NAP_S  # when a result that was waited for came in

    def before_waiting(self) -> None:
        """Sleep for a moment, if results come in fast."""
        if time.monotonic() - self._taken_s < NAP_S:
            time.sleep(NAP_S)

    def after_waiting(self) -> None:
        """It came in."""
        self._taken_s = time.monotonic()


class _Future(Future[T]):
    """A future of which there may be many.

    What the base class makes for each are a dozen objects, on which the garbage collector spends longer than a small call takes.
    Most of them are for whoever waits: here he brings them himself.
    """

    def __init__(self, naps: _Naps) -> None:
        # all that the base class makes, which is not asked to
        self._condition = _Lock()
        self._state = PENDING
        self._result = self._exception = None
        self._waiters: list[Any] = []
        self._done_callbacks: list[Any] = []
        self._naps = naps

    def result(self, timeout: float | None = None) -> T:
        try:
            self._wait(timeout)
            return super().result(0)
        finally:
            del self  # what is raised must not lead back here

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._wait(timeout)
        return super().exception(0)

    def cancel(self) -> bool:
        if not super().cancel():
            return False
        with self._condition:
            for waiter in self._waiters:
                if isinstance(waiter, _Waiter):  # what concurrent.futures.wait has there is told by the session
                    waiter.set()
        return True

    def _wait(self, timeout: float | None) -> None:
        if self.done():
            return
        if timeout is None:
            self._naps.before_waiting()
        waiter = _Waiter()
        with self._condition:
            if self.done():
                waiter.set()
            self._waiters.append(waiter)
        try:
            if not waiter.wait(timeout):
                raise TimeoutError
        finally:
            with self._condition:
                self._waiters.remove(waiter)
            self._naps.after_waiting()


class _Lock(type(threading.RLock())):  # type: ignore[misc]
    """What a future has in place of a condition: nobody waits for it."""

    __slots__ = ()

    def notify_all(self) -> None:
        """There is nobody."""


class _Waiter(threading.Event):
    """Of one that waits for a future."""

    def add_result(self, future: Future[Any]) -> None:
        """It is done."""
        self.set()

    add_exception = add_cancelled = add_result


class _Submitted:
    """A task whose end a future waits for."""

    is_chunk: ClassVar[bool] = False
    __slots__ = ("_call", "_future")

    def __init__(self, future: Future[Any], call: calls.Call) -> None:
        self._future, self._call = future, call

    def begin(self) -> calls.Call | None:
        return self._call if self._future.set_running_or_notify_cancel() else None

    def end(self, value: Any) -> None:
        self._future.set_result(value)

    def fail(self, error: BaseException) -> None:
        if not self._future.running() and not self._future.set_running_or_notify_cancel():
            return
        self._future.set_exception(error)

    def cancel(self) -> None:
        if self._future.cancel():
            self._future.set_running_or_notify_cancel()


class _Chunk:
    """A task that is a part of a map."""

    is_chunk: ClassVar[bool] = False
    __slots__ = ("_call", "_results", "error", "is_done", "is_unwanted", "value")

    def __init__(self, results: Results, call: calls.Call | None, error: BaseException | None) -> None:
        self._results, self._call = results, call
        self.value: Any = None
        self.error = error
        self.is_done = error is not None
        self.is_unwanted = False

    def begin(self) -> calls.Call | None:
        call, self._call = self._call, None
        return None if self.is_unwanted else call

    def end(self, value: Any) -> None:
        self.value = value
        self._results.note(self)

    def fail(self, error: BaseException) -> None:
        self.error = error
        self._results.note(self)

    def cancel(self) -> None:
        self.fail(CancelledError())


class LateError(Exception):
    """There is no result yet; a call may raise a TimeoutError of its own."""


class Results:
    """The results of a function for many members, in order, while chunks of them run.

    Parameters
    ----------
    session : Session
        Where they run.
    function : callable
        Is pickled once.
    chunks : iterator of tuples of tuples
        Each member is a tuple of arguments.
    most : int, optional
        Chunks that may be ahead of what was taken; without it all go out at once.
    """

    def __init__(
        self, session: Session, function: Callable[..., Any], chunks: Iterator[tuple[Any, ...]], most: int | None = None
    ) -> None:
        self._session = session
        self._function, self._name = calls.packed_function(function), calls.name_of(function)
        self._chunks = chunks
        self._ahead: deque[_Chunk] = deque()
        self._done = threading.Condition()
        self._awaited: _Chunk | None = None
        self._is_bounded = most is not None
        self._is_new = True
        self._naps = _Naps()
        for _ in itertools.count() if most is None else range(most):
            if not self._put_one():
                break
        self._is_new = False

    def put_rest(self) -> None:
        """Have all go out that has not."""
        while self._is_bounded and self._put_one():
            pass
        self._is_bounded = False

    def forsake(self) -> None:
        """Nobody takes any more results."""
        for chunk in self._ahead:
            chunk.is_unwanted = True

    def _put_one(self) -> bool:
        try:
            members = next(self._chunks, None)
        except Exception as error:
            if not self._is_bounded:
                raise
            self._ahead.append(_Chunk(self, None, error))  # in its place: the results before it are not lost
            return False
        if members is None:
            return False
        try:
            task = _Chunk(self, calls.chunk(self._function, self._name, members), None)
        except Exception as error:
            self._ahead.append(_Chunk(self, None, error))
            return True
        try:
            self._session.put(task)
        except Exception as error:
            if self._is_new:
                raise
            self._ahead.append(_Chunk(self, None, error))  # likewise, and nothing after it
            self._chunks = iter(())
            return False
        self._ahead.append(task)
        return True

    def note(self, chunk: _Chunk) -> None:
        """A chunk has ended."""
        chunk.is_done = True
        if chunk is self._awaited:
            with self._done:
                self._done.notify()

    def _wait(self, chunk: _Chunk, end_s: float | None) -> None:
        self._naps.before_waiting()
        self._awaited = chunk  # before the look: `note` looks after it has changed what we look at
        self._wait_for(lambda: chunk.is_done, end_s)
        self._awaited = None
        self._naps.after_waiting()

    def _wait_for(self, is_there: Callable[[], object], end_s: float | None) -> None:
        with self._done:
            if not self._done.wait_for(is_there, None if end_s is None else end_s - time.monotonic()):
                raise LateError

    def _next(self, end_s: float | None) -> _Chunk:
        """Take the chunk whose turn it is, when it has ended."""
        chunk = self._ahead[0]
        if not chunk.is_done:
            self._wait(chunk, end_s)
        return self._ahead.popleft()

    def values(self, end_s: float | None) -> list[Any]:
        """Take the results of the chunk whose turn it is, the last one first, or raise its error.

        Raises
        ------
        StopIteration
            If there are no more.
        LateError
            If they are not there at the time `end_s`.
        """
        if not self._ahead:
            raise StopIteration
        chunk = self._next(end_s)
        if self._is_bounded:
            self._put_one()
        try:
            if chunk.error is not None:
                raise chunk.error
            values: list[Any] = chunk.value
        finally:
            del chunk  # an exception's traceback holds this frame
        values.reverse()
        return values

    def items(self, end_s: float | None) -> Iterator[Any]:
        """Return the iterator; it raises TimeoutError after the time `end_s`."""
        try:
            while self._ahead:
                try:
                    values = self.values(end_s)
                except LateError:
                    raise TimeoutError from None
                while values:  # popped, so that nothing here keeps what the user has dropped
                    yield values.pop()
        finally:
            self.forsake()

"""Pool: the interface of multiprocessing.Pool over MPI, used as schwimmbad's. A thin room over executor.py and session.py.

The rules it keeps:

- Slaves serve in the constructor and leave the program there, unless told otherwise: only the master comes to what follows.
- The iterable that a user gives is read in the user's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, ClassVar, Literal, NoReturn, Self
from weakref import WeakSet

import numpy as np

from jd_hpc.executor import Executor, Results
from jd_hpc.futures_server import Hub
from jd_hpc.guide import Guide
from jd_hpc.machine import MPIMachine
from jd_hpc.pool_results import AsyncResult, ImapIterator, Map, Unordered, cut
from jd_hpc.session import Session

BEGIN_LIMIT_S = 5.0
"""After an error of the master's nobody waits any longer for slaves that have not come yet."""
LOOK_AHEAD = 4
"""Chunks for each slave by which imap is ahead of what was taken."""


class Pool:
    """Runs functions on the slaves of a communicator, as `multiprocessing.Pool` does on processes.

    Every rank makes it. On a slave the constructor serves until the master's pool is closed, and then leaves the program
    (`SystemExit(0)`), so that only the master goes on::

        with Pool() as pool:
            print(pool.map(function, range(100)))

    The lines that schwimmbad asks for, ``if not pool.is_master(): pool.wait(); sys.exit(0)``, do no harm and are not needed. Under
    ``python -m jd_hpc.futures script.py`` only the master runs the script. With one rank, or no MPI, calls run in a thread of this
    process.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, MPIMachine or LocalMachine, optional
        Where the slaves are. Default: COMM_WORLD, or nowhere else if there is no MPI.
    serve : bool
        False: the constructor returns on slaves too, and each of them calls `wait()`, which returns when the pool is closed.
    max_slaves : int, optional
        Use at most so many slaves.
    initializer : callable, optional
        Is called on each slave before its first call: ``initializer(*initargs)``.
    initargs : tuple
        Its arguments.
    use_dill : bool
        Changes nothing: what pickle cannot do goes by cloudpickle, if that is installed.
    **options
        Of `JobDispatcher`: `max_attempts`, `job_timeout_s`, `isolate`, ..., `credit` (default 1); `payload_limit` and `journal`
        of `Executor`. With a journal a chunk is one call where nothing else is said: calls must be the same in every run.

    Raises
    ------
    SystemExit
        On a slave, when it has served.
    LaunchError
        If the ranks were not launched as one MPI run, or `comm` is no communicator.

    Attributes
    ----------
    rank : int
        This rank.
    size : int
        How many calls can run at once: the number of slaves, or 1.
    workers : set of int
        The ranks that run calls.
    """

    current: ClassVar[Pool | None] = None
    """The master's pool that was made last and is open, if any."""

    def __init__(
        self,
        comm: Any = None,
        *,
        serve: bool = True,
        max_slaves: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        use_dill: bool = False,
        **options: Any,
    ) -> None:
        self._executor = Executor(_world(comm), max_slaves, initializer=initializer, initargs=initargs, **options)
        machine = self._executor.machine
        self.rank: int = machine.rank
        self.size: int = machine.slots if max_slaves is None else min(machine.slots, max_slaves)
        self.workers: set[int] = set(range(1, 1 + self.size)) if machine.size > 1 else {0}
        self._has_served = self._is_closed = False
        self._slaves_leave = serve and Hub.current is None
        self._imaps: WeakSet[Results] = WeakSet()  # those that somebody takes results from
        if self.is_master():
            self._session = self._executor.begin()
            Pool.current = self
        elif serve:
            self.wait()
            raise SystemExit(0)

    def is_master(self) -> bool:
        """Tell whether this is the rank that hands out calls."""
        return self.rank == 0

    def is_worker(self) -> bool:
        """Tell whether this is a slave."""
        return self.rank > 0

    def wait(self) -> None:
        """Slave: serve until the master's pool is closed. On the master it returns at once."""
        if self.is_worker() and not self._has_served:
            self._has_served = True
            self._executor.serve()

    # ---- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more calls; the slaves leave when those that were given have ended. A slave that has not served does so now."""
        if self.is_worker():
            return self.wait()
        self._leave()
        for results in list(self._imaps):
            results.put_rest()
        return self._executor.shutdown(wait=False)

    def join(self) -> None:
        """Return when all has ended.

        Raises
        ------
        ValueError
            If the pool was not closed before.
        """
        if self.is_worker():
            return None
        if not self._is_closed:
            raise ValueError("the pool is still running: call close() or terminate() first")
        return self._executor.shutdown(wait=True)

    def terminate(self) -> None:
        """End now: what no slave has begun is not done, and of what slaves do the results are not waited for.

        A call that a slave has begun cannot be broken off: the slave leaves the pool after it, and this returns then. With none it
        returns at once, and the call goes on in its thread.
        """
        if self.is_worker():
            return self.wait()
        return self._break_off(None)

    def _break_off(self, begin_limit_s: float | None) -> None:
        self._leave()
        self._session.break_off(RuntimeError("the pool was terminated"), self.workers != {0}, begin_limit_s)

    def _leave(self) -> None:
        if self._slaves_leave and isinstance(self._executor.machine, MPIMachine):
            self._executor.machine.note_departure()
        self._is_closed = True
        if Pool.current is self:
            Pool.current = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if self.is_worker():
            self.wait()
        elif error is None:
            self._leave()  # what imap has not read stays unread: it may be endless
            self._executor.shutdown(wait=True)
        else:
            self._break_off(BEGIN_LIMIT_S)
        return False

    def __reduce__(self) -> NoReturn:
        raise NotImplementedError("a Pool cannot be pickled: keep it out of the arguments and of what the function refers to")

    # ---- calls -------------------------------------------------------------------------------------------------------

    def map(
        self,
        func: Callable[[Any], Any],
        iterable: Iterable[Any],
        chunksize: int | Callable[[Any], object] | None = None,
        callback: Callable[[Any], object] | None = None,
    ) -> list[Any]:
        """Return the results of ``func(member)``, in order.

        Parameters
        ----------
        func : callable
            Takes one argument.
        iterable
            Is read at once. The rows of a numpy array travel as an array.
        chunksize : int, optional
            Calls that travel together. Default: it adapts, 1 for long calls, more for short ones and fewer towards the end, so that
            all slaves end together. A callable here is the callback: schwimmbad has it in this place.
        callback : callable, optional
            Is called here with every result, as it comes in.

        Raises
        ------
        Exception
            The first one that a call raised; its `__cause__` tells the slave and the traceback there. Nothing more is begun then.
        PayloadError
            If the function or a member cannot be pickled, or is too large.
        ValueError
            If the pool was closed.
        BrokenExecutor
            If the run ended early: its cause says why.
        """
        if callable(chunksize):
            chunksize, callback = None, chunksize
        return self._map(func, iterable, chunksize, False, callback is not None).wait(callback)

    def starmap(self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None) -> list[Any]:
        """Return the results of ``func(*member)``, in order: as `map`, for functions of several arguments."""
        return self._map(func, iterable, chunksize, True).wait(None)

    def map_async(
        self,
        func: Callable[[Any], Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult:
        """Have ``func(member)`` called for all members; return what has ``get``, ``wait``, ``ready`` and ``successful``.

        `callback` gets the list of the results, or `error_callback` the exception, in a thread of the pool's.
        """
        return AsyncResult(self._map(func, _own(iterable), chunksize, False).future, callback, error_callback)

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult:
        """Have ``func(*member)`` called for all members: as `map_async`."""
        return AsyncResult(self._map(func, _own(iterable), chunksize, True).future, callback, error_callback)

    def imap(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> ImapIterator:
        """Return an iterator over the results of ``func(member)``, in order.

        The iterable is read as results are taken, and is ahead of them by at most 4 chunks for each slave: so it may be endless.
        `close` reads the rest of it.
        """
        return self._imap(Results, func, iterable, chunksize)

    def imap_unordered(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> ImapIterator:
        """Return an iterator over the results as they come in: otherwise as `imap`."""
        return self._imap(Unordered, func, iterable, chunksize)

    def apply(self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: dict[str, Any] | None = None) -> Any:
        """Return ``func(*args, **kwds)``, called on a slave."""
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: dict[str, Any] | None = None,
        callback: Callable[[Any], object] | None = None,
        error_callback: Callable[[BaseException], object] | None = None,
    ) -> AsyncResult:
        """Have ``func(*args, **kwds)`` called on a slave; return what has ``get``, ``wait``, ``ready`` and ``successful``.

        `callback` gets the result, or `error_callback` the exception, in a thread of the pool's.
        """
        return AsyncResult(self.submit(func, *args, **(kwds or {})), callback, error_callback)

    def submit(self, func: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have ``func(*args, **kwargs)`` called on a slave, and return its future, as `Executor.submit` does."""
        self._running()
        return self._executor.submit(func, *args, **kwargs)

    def _map(
        self, func: Callable[..., Any], iterable: Iterable[Any], chunksize: int | None, starred: bool, is_heard: bool = False
    ) -> Map:
        session = self._running()
        if chunksize is not None and chunksize < 1:
            raise ValueError(f"chunksize = {chunksize} must be at least 1")
        members = iterable if type(iterable) in (tuple, range, np.ndarray) else list(iterable)
        if chunksize is None and session.has_journal:
            chunksize = 1
        return Map(session, func, members, Guide(self.size, chunksize), starred, is_heard)  # type: ignore[arg-type]

    def _imap(self, kind: type[Results], func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int) -> ImapIterator:
        results = kind(self._running(), func, cut(iterable, chunksize), LOOK_AHEAD * self.size)
        self._imaps.add(results)
        return ImapIterator(results)

    def _running(self) -> Session:
        if self.is_worker():
            raise RuntimeError("a slave runs calls and cannot hand out any: let it call wait(), and use the pool on the master")
        if self._is_closed:
            raise ValueError("the pool was closed: make another one, or close it later")
        return self._session


def register_parallel_backend() -> None:
    """Make "jd_hpc" known to joblib as a parallel backend, so that scikit-learn and others run on the slaves.

    ``with joblib.parallel_config("jd_hpc"):`` uses the open pool that was made last, or makes one that stays open
    until the program ends. ``parallel_config("jd_hpc", pool=pool)`` names the pool.

    Raises
    ------
    ImportError
        If joblib is not installed.
    """
    from jd_hpc import joblib_backend

    joblib_backend.register()


def _world(comm: Any) -> Any:
    """Return the communicator of a pool that was given none."""
    if comm is not None or Hub.current is not None:
        return comm
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # no MPI on this machine
        return None
    return MPI.COMM_WORLD


def _own(iterable: Iterable[Any]) -> Iterable[Any]:
    """Return what stays as it is while somebody goes on; `_map` itself copies lists."""
    return iterable.copy() if isinstance(iterable, np.ndarray) else iterable

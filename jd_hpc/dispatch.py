"""dispatch(): runs calls from any iterable, and gives their results to a list or a collector. A thin room over JobDispatcher.

The rules it keeps:

- What the user gave is first touched inside the run, where an error reaches the other ranks.
- Of the jobs only those that are on their way are kept.
- A collector that was started is closed, however the run ends.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from reprlib import Repr
from typing import Any

from jd_hpc import calls
from jd_hpc.dispatcher import JobDispatcher
from jd_hpc.errors import CallError, CollectorError, JobError, PayloadError
from jd_hpc.machine import LocalMachine, as_machine

Collector = Generator[None, tuple[int, Any, Any], None]
Parts = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

_repr = Repr()
_repr.maxother = _repr.maxstring = 80
shown = _repr.repr
"""The repr of what a user gave, cut short, for a message."""


def parts_of(job: Any, index: int) -> Parts:
    """Return the callable, the positional and the named arguments of job number `index`, `(callable, args, kwargs, *extra)`.

    Raises
    ------
    CallError
        If it is no such tuple. `args` and `kwargs` may be missing, or None.
    """
    if not isinstance(job, (tuple, list)) or not job:
        hint = f"; did you mean ({getattr(job, '__name__', 'function')},)?" if callable(job) else ""
        raise CallError(f"job {index} is {shown(job)}; a job is a tuple (callable, args, kwargs), such as (f, [1, 2]){hint}")
    function = job[0]
    if not callable(function):
        raise CallError(f"job {index}: {shown(function)} cannot be called; a job is a tuple (callable, args, kwargs)")
    args = job[1] if len(job) > 1 and job[1] is not None else ()
    kwargs = job[2] if len(job) > 2 and job[2] is not None else {}
    if not isinstance(args, Iterable) or isinstance(args, (str, bytes, Mapping)):
        raise CallError(f"job {index}: args is {shown(args)}; give a list of arguments, and a single one as [x]")
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise CallError(f"job {index}: kwargs is {shown(kwargs)}; give a dict of argument names and values")
    return function, tuple(args), dict(kwargs)


def call_of(job: Any, index: int) -> calls.Call:
    """Return the call of job number `index`, ready to travel.

    Raises
    ------
    CallError
        If it is none, or cannot be pickled.
    """
    function, args, kwargs = parts_of(job, index)
    try:
        return calls.call(function, args, kwargs)
    except PayloadError as error:
        raise CallError(f"job {index}: {error}") from error.__cause__


def dispatch(
    jobs: Iterable[Any],
    collector: Collector | None = None,
    remote: bool = True,
    build_result_list: bool | None = None,
    vm: Any = None,
    *,
    grain: int = 1,
    credit: int | None = None,
    journal: str | os.PathLike[str] | None = None,
    on_error: str = "raise",
    **options: Any,
) -> list[Any] | None:
    """Run calls on the slaves of a vm. Every rank of the vm must call it.

    Parameters
    ----------
    jobs : iterable
        Gives jobs `(callable, args, kwargs, *extra)`: the result is what `callable(*args, **kwargs)` returns. `args` and `kwargs`
        may be missing or None; `extra` stays on the master, for the collector. Only the master asks for jobs, one by one when a
        slave has room, so a generator may go by what the collector has seen. None in place of a job: there is none now, ask again
        after the next result.
    collector : generator, optional
        A coroutine that was not started: it gets `(index, job, result)` by `yield` as jobs end, `index` counted from 0, and is
        closed at the end (GeneratorExit). The one on the master is used.
    remote : bool
        False: the master makes all calls itself, in order; the others return at once.
    build_result_list : bool, optional
        Whether to return the list of results. Default: only without a collector.
    vm : None, mpi4py.MPI.Intracomm or MPIMachine
        Where the slaves are, as for `JobDispatcher`. None: the calls are made here.
    grain : int
        Jobs per message. For jobs of less than about 100 microseconds a larger grain pays.
    credit : int, optional
        Messages that a slave may hold at once, default 2. With 1 a job is asked for only when its slave is idle.
    journal : path, optional
        A file that gets every result, as for `JobDispatcher.run`.
    on_error : "raise" or "return"
        What a job's exception does: end the run, or stand in the place of the result, as a JobError.
    **options
        Of `JobDispatcher`: max_slaves, isolate, job_timeout_s, debug and others.

    Returns
    -------
    list or None
        On the master the results in the order of the jobs, if they were asked for; None elsewhere.

    Raises
    ------
    JobError
        On the master, if a job raised; its index, slave, traceback there, and the exception as `__cause__`.
    CallError
        On the master, if a job is no such tuple, or its callable cannot be pickled; lambdas need cloudpickle.
    CollectorError
        On the master, if the collector is none, or ended before the jobs.
    JdError, Unfinished
        As `JobDispatcher.run`.
    Exception
        On the master, whatever `jobs` or the collector raised, after all slaves have left the run.
    """
    machine = as_machine(vm)
    if not remote and not machine.is_master:
        return None
    exchange = Exchange(jobs, collector, build_result_list)
    options.update(vm=machine if remote else None, grain=grain, credit=credit)
    try:
        results: list[Any] | None = Dispatch(exchange, on_error, **options).run(journal)
    finally:
        exchange.close()
    return results


class Exchange:
    """Where jobs come from and results go to.

    Parameters
    ----------
    jobs, collector, build_result_list
        As for `dispatch`; first touched by `begin`.

    Attributes
    ----------
    in_flight : dict of int to object
        The jobs that were asked for and whose results were not delivered, by their numbers.
    is_over : bool
        Whether there are no more jobs.
    results : list or None
        The results so far, in the order of the jobs, if they are kept.
    """

    def __init__(self, jobs: Iterable[Any], collector: Collector | None, build_result_list: bool | None) -> None:
        self._jobs, self._collector = jobs, collector
        self._iterator: Iterator[Any] = iter(())
        self._count = 0
        self._is_collecting = False
        self.in_flight: dict[int, Any] = {}
        self.is_over = False
        self.results: list[Any] | None = [] if build_result_list or (build_result_list is None and collector is None) else None

    def begin(self) -> None:
        """Start the collector, and make ready to ask for jobs.

        Raises
        ------
        CallError, CollectorError
            If `jobs` is no iterable, or the collector is none.
        """
        try:
            self._iterator = iter(self._jobs)
        except TypeError as error:
            raise CallError(f"jobs is {shown(self._jobs)}; give a list or a generator of (callable, args, kwargs)") from error
        if self._collector is not None:
            self._begin_to_collect(self._collector)

    def _begin_to_collect(self, collector: Collector) -> None:
        cure = "call a generator function that loops: while True: index, job, result = yield"
        if not all(hasattr(collector, name) for name in ("send", "close", "__next__")):
            raise CollectorError(f"collector = {shown(collector)} is no coroutine; {cure}")
        if inspect.isgenerator(collector) and inspect.getgeneratorstate(collector) != inspect.GEN_CREATED:
            raise CollectorError("the collector was started before; give a fresh one, and do not call next() on it")
        try:
            next(collector)
        except StopIteration:
            raise CollectorError(f"the collector ended before it came to a yield; {cure}") from None
        self._is_collecting = True

    def next_job(self) -> tuple[int, Any] | None:
        """Ask for a job: its number and itself, or None if there is none now.

        Raises
        ------
        CallError
            If it waits for a result that cannot come.
        Exception
            Whatever `jobs` raises.
        """
        if self.is_over:
            return None
        try:
            job = next(self._iterator)
        except StopIteration:
            self.is_over = True
            return None
        except Exception as error:
            error.add_note(f"jobs raised this when it was asked for job {self._count}.")
            raise
        if job is not None:
            index = self._count
            self.in_flight[index] = job
            self._count += 1
            return index, job
        if not self.in_flight:
            raise CallError(
                f"jobs gave None in place of job {self._count}, which is to say that results must come first; but no job is on "
                f"its way. Return from the generator to end the run"
            )
        return None

    def deliver(self, index: int, result: Any, *more: Any) -> None:
        """Hand a result over; the collector gets `more` with it.

        Raises
        ------
        CollectorError
            If the collector has ended.
        Exception
            Whatever the collector raises.
        """
        job = self.in_flight.pop(index)
        if self.results is not None:
            missing = index + 1 - len(self.results)
            if missing > 0:
                self.results.extend([None] * missing)
            self.results[index] = result
        if self._collector is None:
            return
        try:
            self._collector.send((index, job, result, *more))
        except StopIteration:
            raise CollectorError(
                f"the collector ended when it was given the result of job {index}. Let it loop for ever: "
                f"while True: index, job, result = yield"
            ) from None
        except Exception as error:
            error.add_note(f"The collector raised this when it was given the result of job {index}.")
            raise

    def close(self) -> None:
        """Tell the collector, if it was started, that there is no more."""
        if self._is_collecting and self._collector is not None:
            self._is_collecting = False
            self._collector.close()


class Dispatch(JobDispatcher):
    """The dispatcher behind `dispatch`, which has the parameters."""

    def __init__(self, exchange: Exchange, on_error: str, **options: Any) -> None:
        calls.refuse_streams(options)
        super().__init__(**options)
        if on_error not in ("raise", "return"):
            raise ValueError(f'on_error = {on_error!r} is unknown: it can be "raise" or "return"')
        self._exchange = exchange
        self._returns_errors = on_error == "return"
        self._travels = self.isolate or not (isinstance(self.machine, LocalMachine) or self.machine.size == 1)

    def reset(self) -> None:
        """Make ready."""
        self._exchange.begin()

    def next_job(self) -> calls.Call | Parts | None:
        """Ask for a job."""
        given = self._exchange.next_job()
        if given is None:
            return None
        index, job = given
        return call_of(job, index) if self._travels else parts_of(job, index)

    def process_job(self, job: Any) -> Any:
        """Make the call."""
        if self._travels:
            return calls.run(job)
        function, args, kwargs = job
        return function(*args, **kwargs)

    def process_result(self, index: int, job: Any, result: Any) -> None:
        """Hand a result over."""
        if self._travels:
            try:
                result = calls.opened(result)
            except PayloadError as error:
                error.add_note(f"This was the result of job {index}.")
                if not self._returns_errors:
                    raise
                result = error
        self._exchange.deliver(index, result)

    def process_failure(self, index: int, job: Any, error: JobError) -> None:
        """End the run, or take the error for the result."""
        if self._returns_errors:
            self._exchange.deliver(index, error)
        else:
            super().process_failure(index, job, error)

    def postprocess(self) -> list[Any] | None:
        """Return the results, if they are kept."""
        return self._exchange.results

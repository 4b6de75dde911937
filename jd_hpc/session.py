"""A run that stays open: calls are handed to it at any time and from any thread, and their ends come back one by one.

The rules it keeps:

- The run has a thread of its own on the master; only that thread speaks MPI. The slaves just run the server.
- Every task that was put in ends once: by `end`, by `fail`, or because its `begin` says that nobody wants it any more.
- Whatever ends the run early, ends all open tasks, and `put` says so from then on.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from typing import Any, Protocol

from jd_hpc import calls
from jd_hpc.dispatcher import JobDispatcher
from jd_hpc.errors import JobError, PayloadError
from jd_hpc.journal import path_of
from jd_hpc.runs import Engine, Run

LOOK_S = 0.05
"""How often an idle master hears who is still there."""
WRAPPING_BYTES = 1024
"""What is added to a call at the most, before it travels."""
TOO_HEAVY = "a call of {} bytes is over payload_limit = {}; raise it, or have the function read what is large from a file"


class Task(Protocol):
    """What a session runs. All is called in the session's thread; what these raise ends the run."""

    def begin(self) -> calls.Call | None:
        """Return the call, just before it goes out; None if nobody wants it any more."""

    def end(self, value: Any) -> None:
        """Take the result."""

    def fail(self, error: BaseException) -> None:
        """Hear what went wrong."""

    def cancel(self) -> None:
        """Hear, in any thread, that nothing will come of it: it has not begun."""


class Server(JobDispatcher):
    """Runs calls. On a slave, `run()` serves until the master's session ends.

    Parameters
    ----------
    vm
        As for JobDispatcher.
    initializer : callable, optional
        Is called on each slave, or here if there are none, before the first call: ``initializer(*initargs)``.
    initargs : tuple
        Its arguments.
    payload_limit : int, optional
        Bytes of the largest call, and of the largest result.
    **options
        Of JobDispatcher.
    """

    def __init__(
        self,
        vm: Any = None,
        *,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        payload_limit: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(vm, **options)
        if payload_limit is not None:
            self.payload_limit = payload_limit
        self._initializer, self._initargs = initializer, initargs
        self.waiting: deque[Task] = deque()
        self.begun: dict[int, Task] = {}
        self._number = 0

    def on_startup(self) -> None:
        """Call the initializer."""
        if self._initializer is not None and (self.machine.size == 1 or not self.machine.is_master):
            self._initializer(*self._initargs)

    def next_job(self) -> calls.Call | None:
        """Return the next call that somebody wants."""
        while self.waiting:
            try:
                task = self.waiting.popleft()
            except IndexError:  # cancelled meanwhile
                break
            job = task.begin()
            if job is None:
                continue
            weight_bytes = calls.bytes_of(job) + WRAPPING_BYTES
            if weight_bytes > self.payload_limit:  # the engine would end the run
                task.fail(PayloadError(TOO_HEAVY.format(weight_bytes, self.payload_limit)))
            else:
                self.begun[self._number] = task
                self._number += 1
                return job
        return None

    def process_job(self, job: calls.Call) -> calls.Answer:
        """Run a call."""
        return calls.run(job)

    def process_result(self, index: int, job: calls.Call, result: calls.Answer) -> None:
        """Hand a result to its task."""
        task = self.begun.pop(index)
        try:
            value = calls.opened(result)
        except Exception as error:  # it was pickled well, but cannot be rebuilt here
            task.fail(error)
        else:
            task.end(value)

    def process_failure(self, index: int, job: calls.Call, error: JobError) -> None:
        """Tell a task what went wrong: the exception of the function itself, with the traceback of the slave as its cause."""
        cause = error.__cause__
        if cause is None:
            self.begun.pop(index).fail(error)
            return
        error.__cause__ = None
        cause.__cause__ = error
        self.begun.pop(index).fail(cause)

    def open_run(self, work: Callable[[Engine], None], journal: Any = None) -> None:
        """Master: run `work` between the beginning of a run and its end."""
        self._set_up_logging()
        Run(self, self._plan, path_of(journal), self._log, work).go()


class Session:
    """The master's side of a run that stays open.

    Parameters
    ----------
    server : Server
        Made with the same options on every rank; the slaves call `run()` of theirs.
    journal : path, optional
        As for `JobDispatcher.run`.
    """

    def __init__(self, server: Server, journal: Any = None) -> None:
        self._server = server
        self._journal = journal
        self._engine: Engine | None = None
        self._changed = threading.Condition()
        self._sleeping = False
        self._ending = False
        self._error: BaseException | None = None
        self._broken_off: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="jd_hpc session", daemon=True)
        self._thread.start()
        atexit.register(self.end)

    @property
    def places(self) -> int:
        """How many tasks can have begun and not ended at the same time."""
        server = self._server
        if server.machine.size == 1:
            return 1
        return server.credit * (server.machine.slots if server.max_slaves is None else min(server.machine.slots, server.max_slaves))

    @property
    def is_ending(self) -> bool:
        """Whether nothing can be put in any more."""
        return self._ending

    def put(self, task: Task) -> None:
        """Have a task run.

        Raises
        ------
        BrokenExecutor
            If the run has ended early, with the reason as its cause.
        RuntimeError
            If the session has ended.
        """
        if self._ending:
            self._refuse()
        self._server.waiting.append(task)
        if self._ending:  # just now
            with contextlib.suppress(ValueError):
                self._server.waiting.remove(task)
                self._refuse()
        else:
            self._rouse()

    def again(self, task: Task) -> None:
        """Have a task run once more, from its own `end`: also while the session ends."""
        self._server.waiting.append(task)

    def _rouse(self) -> None:
        if self._sleeping:
            with self._changed:
                self._changed.notify()
        elif (engine := self._engine) is not None:
            engine.wake()

    def _refuse(self) -> None:
        if self._error is not None:
            raise BrokenExecutor(f"the run has ended: {type(self._error).__name__}: {self._error}") from self._error
        raise RuntimeError("it was shut down: nothing can be submitted any more")

    def cancel(self) -> None:
        """Forget what has not gone out."""
        while self._server.waiting:
            with contextlib.suppress(IndexError):
                self._server.waiting.popleft().cancel()

    def break_off(self, why: BaseException, wait: bool = True) -> None:
        """End the run now, for this reason. What slaves run now comes to its end, and nobody hears of it.

        Without `wait` nobody waits for that, not even the end of the program.
        """
        self._broken_off = why
        if (engine := self._engine) is not None:
            engine.break_off(why)
        self.cancel()
        self.end(wait)
        if not wait:
            atexit.unregister(self.end)

    def end(self, wait: bool = True) -> None:
        """End the run when all tasks have ended; with `wait` return after that."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._engine is not None:
            self._engine.wake()
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()
            atexit.unregister(self.end)

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._server.open_run(self._work, self._journal)
        except BaseException as error:
            self._error = error
        finally:
            self._ending = True
            self._engine = None
            why = self._error or RuntimeError("the run has ended before its tasks")
            while self._server.begun or self._server.waiting:
                self._next_open().fail(self._broken(why))

    def _next_open(self) -> Task:
        return self._server.begun.popitem()[1] if self._server.begun else self._server.waiting.popleft()

    def _broken(self, why: BaseException) -> BaseException:
        error = BrokenExecutor(f"the run ended before this: {type(why).__name__}: {why}")
        error.__cause__ = why
        return error

    def _work(self, engine: Engine) -> None:
        self._engine = engine
        while self._broken_off is None:
            engine.run_jobs()
            if self._server.begun:  # the run was drained
                return
            with self._changed:
                self._sleeping = True
                if not self._server.waiting and not self._ending:
                    self._changed.wait(LOOK_S)
                self._sleeping = False
            if self._server.waiting:
                continue
            if self._ending:
                return
            engine.look_around()

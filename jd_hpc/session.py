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
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from typing import Any, ClassVar, Protocol

from jd_hpc import calls, ending
from jd_hpc.dispatcher import JobDispatcher
from jd_hpc.errors import JobError, PayloadError, Unfinished
from jd_hpc.guide import Guide
from jd_hpc.journal import path_of
from jd_hpc.runs import Engine, Run
from jd_hpc.signals import Notes

LOOK_S = 0.05
"""How often an idle master hears who is still there."""
WRAPPING_BYTES = 1024
"""What is added to a call at the most, before it travels."""
BUNDLE_MOST = 512
"""Calls that travel together at the most."""
BUNDLE_BYTES = 1 << 16
"""What they weigh together, if they are more than one."""
BEGIN_WAIT_S = 1.0
"""How long `cancel` lets a run that is just beginning give out something."""
OVER = "cannot schedule new futures after shutdown"
TOO_HEAVY = "a call of {} bytes is over payload_limit = {}; raise it, or have the function read what is large from a file"


class Task(Protocol):
    """What a session runs. All is called in the session's thread; what these raise ends the run."""

    is_chunk: ClassVar[bool]
    """Whether it stands for as many calls as should travel together."""

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
        calls.refuse_streams(options)
        most = BUNDLE_MOST if payload_limit is None else 1  # results that fit one by one may not fit together
        # one message at a time: a call that waits behind a long one on its slave could run elsewhere
        super().__init__(vm, **{"grain": most, "credit": 1, **options})
        if payload_limit is not None:
            self.payload_limit = payload_limit
        slots = self.machine.slots if self.max_slaves is None else min(self.machine.slots, self.max_slaves)
        self.places = self.credit * slots if self.machine.size > 1 else 1
        self._guide = Guide(slots)
        self._bundle: _Bundle | None = None  # that is being filled
        self._held: tuple[Task, calls.Call] | None = None  # did not fit into the last one
        self.wake: Callable[[], object] = _do_nothing
        self._initializer, self._initargs = initializer, initargs
        self.waiting: deque[Task] = deque()
        self.begun: dict[int, tuple[Task, _Bundle]] = {}
        self._number = 0
        self.first_began = threading.Event()

    def on_startup(self) -> None:
        """Call the initializer."""
        if self._initializer is not None and (self.machine.size == 1 or not self.machine.is_master):
            self._initializer(*self._initargs)

    @property
    def has_more(self) -> bool:
        """Whether there are calls that have not gone out."""
        return self._held is not None or bool(self.waiting)

    def forsaken(self) -> Task | None:
        """Return, after the end, a task that has not ended; None if there is no more."""
        held, self._held = self._held, None
        if held is not None:
            return held[0]
        if self.begun:
            return self.begun.popitem()[1][0]
        return self.waiting.popleft() if self.waiting else None

    def next_job(self) -> calls.Call | None:
        """Return the next call that somebody wants, or None where a bundle ends.

        The engine sends what it gets until None, or until it has `grain` calls, as one message.
        """
        bundle = self._bundle
        if bundle is None or bundle.count == self.grain:
            left = len(self.waiting) + (self._held is not None)
            bundle = self._bundle = _Bundle(self._guide.next(left))
        begun = self._next_wanted() if bundle.count < bundle.most or not bundle.count else None
        if begun is not None and bundle.count and not bundle.has_room_for(*begun):
            self._held, begun = begun, None
        if begun is None:
            self._bundle = None
            if self.has_more:
                self.wake()  # the bundle is full, and the engine believes that there is nothing more
            return None
        task, job = begun
        bundle.add(task, job)
        self.begun[self._number] = task, bundle
        self._number += 1
        if self._number == 1:
            self.first_began.set()
        return job

    def _next_wanted(self) -> tuple[Task, calls.Call] | None:
        held, self._held = self._held, None
        if held is not None:
            return held
        while self.waiting:
            try:
                task = self.waiting.popleft()
            except IndexError:  # cancelled meanwhile
                break
            job = task.begin()
            if job is None:
                continue
            weight_bytes = calls.bytes_of(job) + WRAPPING_BYTES
            if weight_bytes <= self.payload_limit:
                return task, job
            task.fail(PayloadError(TOO_HEAVY.format(weight_bytes, self.payload_limit)))  # the engine would end the run
        return None

    def _ended(self, index: int) -> Task:
        """Forget a call that has ended, and note how long it took."""
        task, bundle = self.begun.pop(index)
        if not bundle.is_noted:  # its results come all at once
            bundle.is_noted = True
            self._guide.note(bundle.count, time.monotonic() - bundle.begun_s)
        return task

    def process_job(self, job: calls.Call) -> calls.Answer:
        """Run a call."""
        return calls.run(job)

    def process_result(self, index: int, job: calls.Call, result: calls.Answer) -> None:
        """Hand a result to its task."""
        task = self._ended(index)
        try:
            value = calls.opened(result)
        except PayloadError as error:
            task.fail(error)
        else:
            task.end(value)

    def process_failure(self, index: int, job: calls.Call, error: JobError) -> None:
        """Tell a task what went wrong: the exception of the function itself, with the traceback of the slave as its cause."""
        cause = error.__cause__
        if cause is None:
            self._ended(index).fail(error)
            return
        error.__cause__ = None
        cause.__cause__ = error
        self._ended(index).fail(cause)

    def open_run(self, work: Callable[[Engine], None], journal: Any = None) -> None:
        """Master: run `work` between the beginning of a run and its end."""
        self._set_up_logging()
        Run(self, self._plan, path_of(journal), self._log, work).go()


def _do_nothing() -> None:
    """There is no engine yet."""


class _Bundle:
    """Calls that travel together."""

    __slots__ = ("begun_s", "count", "is_noted", "most", "weight_bytes")

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = self.weight_bytes = 0
        self.is_noted = False
        self.begun_s = time.monotonic()

    def has_room_for(self, task: Task, job: calls.Call) -> bool:
        """Whether this call may travel with those that are there."""
        return not task.is_chunk and self.weight_bytes + calls.bytes_of(job) <= BUNDLE_BYTES

    def add(self, task: Task, job: calls.Call) -> None:
        """One more."""
        self.count += 1
        self.weight_bytes += calls.bytes_of(job)
        if task.is_chunk:
            self.most, self.is_noted = 1, True


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
        self._has_begun = threading.Event()
        self._error: BaseException | None = None
        self._broken_off: BaseException | None = None
        self._notes = Notes()  # the run's own thread cannot have signals noted
        self._notes.begin()
        self._thread: threading.Thread | None = threading.Thread(target=self._main, name="jd_hpc session", daemon=True)
        self._thread.start()
        atexit.register(self.end)

    @property
    def has_journal(self) -> bool:
        """Whether calls must be the same in every run."""
        return path_of(self._journal) is not None

    @property
    def places(self) -> int:
        """How many tasks can have begun and not ended at the same time, if each travels alone."""
        return self._server.places

    @property
    def is_ending(self) -> bool:
        """Whether nothing can be put in any more."""
        return self._ending

    def put(self, task: Task) -> None:
        """Have a task run.

        Raises
        ------
        Unfinished
            If the run was drained.
        BrokenExecutor
            If it has ended early for another reason, which is the cause.
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
        if isinstance(self._error, Unfinished):
            raise self._error
        if self._error is not None:
            raise BrokenExecutor(f"the run has ended: {type(self._error).__name__}: {self._error}") from self._error
        raise RuntimeError(OVER)

    def cancel(self) -> None:
        """Forget what has not gone out. A run that is just beginning may give out something first: then it is known to work."""
        if self._server.waiting:
            self._server.first_began.wait(BEGIN_WAIT_S)
        self._cancel_waiting()

    def _cancel_waiting(self) -> None:
        while self._server.waiting:
            with contextlib.suppress(IndexError):
                self._server.waiting.popleft().cancel()

    def break_off(self, why: BaseException, wait: bool = True, begin_limit_s: float | None = None) -> None:
        """End the run now, for this reason. What slaves run now comes to its end, and nobody hears of it.

        Without `wait` nobody waits for that, not even the end of the program; nor if the slaves have not come within the limit.
        """
        self._broken_off = why
        if (engine := self._engine) is not None:
            engine.break_off(why)
        self._cancel_waiting()
        self.end(wait=False)
        if wait and not self._has_begun.wait(begin_limit_s):
            ending.failed("the slaves have not come")
            wait = False
        if wait:
            self.end()
        else:
            atexit.unregister(self.end)

    def end(self, wait: bool = True) -> None:
        """End the run when all tasks have ended; with `wait` return after that."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._engine is not None:
            self._engine.wake()
        thread = self._thread
        if wait and thread is not None and thread is not threading.current_thread():
            thread.join()
            self._thread = None
            atexit.unregister(self.end)
        self._notes.end()

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._server.open_run(self._work, self._journal)
        except BaseException as error:
            self._error = error
        finally:
            self._ending = True
            self._engine = None
            self._has_begun.set()
            why = self._error or RuntimeError("the run has ended before its tasks")
            while (task := self._server.forsaken()) is not None:
                task.fail(self._broken(why))

    def _broken(self, why: BaseException) -> BaseException:
        if isinstance(why, Unfinished):
            return why
        error = BrokenExecutor(f"the run ended before this: {type(why).__name__}: {why}")
        error.__cause__ = why
        return error

    def _work(self, engine: Engine) -> None:
        self._engine = engine
        self._has_begun.set()
        self._server.wake = engine.wake
        while self._broken_off is None:
            engine.run_jobs()
            if self._server.begun:  # the run was drained
                return
            with self._changed:
                self._sleeping = True
                if not self._server.has_more and not self._ending:
                    self._changed.wait(LOOK_S)
                self._sleeping = False
            if self._server.has_more:
                continue
            if self._ending:
                return
            engine.look_around()

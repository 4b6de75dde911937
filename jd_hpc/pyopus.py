"""What scripts for PyOPUS use of its parallel half: `cOS`, `MPI` and `JobDispatcher`. They run after a change of their imports.

The rules it keeps:

- The names, and the names and order of arguments, are PyOPUS's; docs/pyopus.md says what differs, and why.
- `cOS.setVM` parts master and slaves: the slaves serve there until the program ends, and never come back. It is one run
  (session.py) all the time.
- A function that is not sent to a slave is called at once, in the place of `Spawn`.
"""

from __future__ import annotations

import atexit
import socket
import sys
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import BrokenExecutor
from typing import Any, ClassVar

from jd_hpc import calls, dispatcher, futures_server
from jd_hpc.dispatch import Collector, Exchange, call_of, parts_of
from jd_hpc.errors import Failure, JobError, LaunchError, PayloadError, Unfinished
from jd_hpc.machine import MPIMachine
from jd_hpc.session import Server, Session

__all__ = ["MPI", "HostID", "JobDispatcher", "OpusOS", "TaskID", "cOS"]

NOT_MIRRORED = "files are not mirrored to the slaves; put what the jobs need where all nodes see it, or copy it in the job"


class HostID:
    """A host.

    Attributes
    ----------
    name : str
        Its name.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostID) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"HostID({self.name!r})"


class TaskID:
    """Who runs.

    Attributes
    ----------
    rank : int
        The rank.
    number : int
        The tid of the task that it runs, or 0 where `cOS` has sent none.
    """

    def __init__(self, rank: int, number: int) -> None:
        self.rank, self.number = rank, number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskID) and (self.rank, self.number) == (other.rank, other.number)

    def __hash__(self) -> int:
        return hash((self.rank, self.number))

    def __str__(self) -> str:
        return f"{self.rank}:{self.number}"

    def __repr__(self) -> str:
        return f"TaskID({self.rank}, {self.number})"


class MPI:
    """The ranks of MPI.COMM_WORLD, for `cOS.setVM` or as the vm of a `JobDispatcher`. Every rank makes it.

    Parameters
    ----------
    debug : int
        0: silent. 1: the master logs how the run goes. 2: more.
    startupDir, translateStartupDir, mirrorMap, persistentStorage
        Must have their defaults: jobs run in the folder where the ranks were started, and files are not mirrored.

    Raises
    ------
    NotImplementedError
        If they have not.
    LaunchError
        If the ranks were not launched as one MPI run.
    """

    _here: ClassVar[tuple[int, str] | None] = None
    _taskNumber: ClassVar[int] = 0

    def __init__(
        self,
        debug: int = 0,
        startupDir: str | None = None,
        translateStartupDir: bool = True,
        mirrorMap: dict[str, str] | None = None,
        persistentStorage: bool = False,
    ) -> None:
        for name, value in (("startupDir", startupDir), ("mirrorMap", mirrorMap), ("persistentStorage", persistentStorage)):
            if value:
                raise NotImplementedError(f"MPI({name}={value!r}): {NOT_MIRRORED}")
        from mpi4py import MPI as Mpi

        self.machine = MPIMachine(Mpi.COMM_WORLD)
        self.debug = debug
        MPI._here = self.machine.rank, Mpi.Get_processor_name()

    @staticmethod
    def hostID() -> HostID:
        """Return the host of this process."""
        return HostID(socket.gethostname() if MPI._here is None else MPI._here[1])

    @staticmethod
    def taskID() -> TaskID:
        """Return the rank of this process, and the tid of the task that it runs."""
        return TaskID(0 if MPI._here is None else MPI._here[0], MPI._taskNumber)

    @staticmethod
    def slots() -> int:
        """As `cOS.slots`."""
        return cOS.slots()

    @staticmethod
    def freeSlots() -> int:
        """As `cOS.freeSlots`."""
        return cOS.freeSlots()

    @staticmethod
    def finalize() -> None:
        """As `cOS.finalize`."""
        cOS.finalize()


def run_task(number: int, call: calls.Call) -> tuple[HostID, calls.Answer]:
    """Slave: run a task; return where, and its result as it travels."""
    MPI._taskNumber = number
    try:
        return MPI.hostID(), calls.run(call)
    finally:
        MPI._taskNumber = 0


class Task:
    """What `Spawn` or `dispatch` has started.

    Parameters
    ----------
    system : OpusOS
        Whose task it is.
    tid, parent : int
        Its number, and that of the task that started it; 1 is the script itself.
    call : Call, optional
        What is to travel.

    Attributes
    ----------
    is_done : bool
        Whether it has ended.
    is_unwanted : bool
        Whether nobody waits for it any more.
    host : HostID or None
        Where it ran, if a slave ran it.
    """

    is_chunk: ClassVar[bool] = False

    def __init__(self, system: OpusOS, tid: int, parent: int, call: calls.Call | None = None) -> None:
        self.tid, self.parent = tid, parent
        self.is_done = self.is_unwanted = False
        self.host: HostID | None = None
        self._system, self._call = system, call
        self._value: Any = None
        self._error: BaseException | None = None

    def call_here(self, function: Callable[..., Any], args: Iterable[Any], kwargs: dict[str, Any]) -> None:
        """Run it in this process."""
        try:
            self._value = function(*args, **kwargs)
        except Exception as error:
            self._error = error
        except SystemExit as error:
            self._error = JobError(self.tid, 0, Failure.of(error))
        self.is_done = True

    def result(self) -> Any:
        """Return its result, or raise what it raised."""
        if self._error is not None:
            raise _why(self._error)
        return self._value

    # What the session asks and says, in its thread.

    def begin(self) -> calls.Call | None:
        """Give the call, if it is still wanted."""
        if self.is_unwanted:
            self._system.note_end(self)
            return None
        return self._call

    def end(self, value: tuple[HostID, calls.Answer]) -> None:
        """Take the result."""
        self.host, answer = value
        try:
            self._value = calls.opened(answer)
        except PayloadError as error:
            self._error = error
        self._system.note_end(self)

    def fail(self, error: BaseException) -> None:
        """Take what the function raised, or what ended the run. A function that exits does not end the master."""
        is_exit = not isinstance(error, Exception) and isinstance(error.__cause__, JobError)
        self._error = error.__cause__ if is_exit else error
        self._system.note_end(self)

    def cancel(self) -> None:
        """Hear that nothing will come of it."""
        self._system.note_end(self)


def _why(error: BaseException) -> BaseException:
    """Return why the run ended, if that is what is wrong: it is what `run()` of a dispatcher would raise."""
    return error.__cause__ if isinstance(error, BrokenExecutor) and error.__cause__ is not None else error


class OpusOS:
    """What `cOS` is: starts functions on the slaves, and collects what they return."""

    def __init__(self) -> None:
        self._vm: MPI | None = None
        self._session: Session | None = None
        self._is_final = False
        self._debug = 0
        self._last_tid = self._active_tid = 1  # the script itself
        self._children: dict[int, Task] = {}  # of Spawn, not joined
        self._remote_count = 0  # tasks that slaves have or will get
        self._changed = threading.Condition()  # a task has ended

    def __reduce__(self) -> str:
        return "cOS"

    @property
    def is_served(self) -> bool:
        """Whether there are slaves that serve, on the master."""
        return self._session is not None

    # ---- the vm ------------------------------------------------------------------------------------------------------

    def setVM(self, vm: MPI | None = None) -> None:
        """Use the ranks of a vm from now on. Every rank calls it; slaves serve in it until the program ends, and exit.

        Parameters
        ----------
        vm : MPI or None
            None, or a vm of one rank: everything is run in this process.

        Raises
        ------
        TypeError
            If it is no vm.
        RuntimeError
            If the slaves are gone.
        LaunchError
            Under ``python -m jd_hpc.futures``, where the slaves are another one's.
        """
        if vm is not None and not isinstance(vm, MPI):
            raise TypeError(f"setVM({vm!r}): give it a jd_hpc.pyopus.MPI(), or None")
        self._vm = vm
        if vm is None or vm.machine.size == 1 or self._session is not None:
            return
        if self._is_final:
            raise RuntimeError("setVM: finalize() has let the slaves go; call it once, at the end of the script")
        if futures_server.Hub.current is not None:
            raise LaunchError("under python -m jd_hpc.futures the slaves serve Executor(); leave -m jd_hpc.futures out for cOS")
        server = Server(vm.machine, credit=1, debug=min(2, max(vm.debug, self._debug)))
        vm.machine.channel()
        if not vm.machine.is_master:
            self._vm = None  # what a job spawns is run here
            server.run()
            sys.exit(0)
        self._session = Session(server)
        atexit.register(self.finalize)  # before the session's own, which would wait for all that has not gone out

    def setDebug(self, debug: int = 0) -> None:
        """Say how much is logged, 0 to 2. It counts when `setVM` is called."""
        self._debug = debug

    def slots(self) -> int:
        """Return the number of ranks of the vm, the master among them; -1 without a vm."""
        return -1 if self._vm is None else self._vm.machine.size

    def freeSlots(self) -> int:
        """Return the number of slaves that have no task; -1 without a vm. A task that has ended need not be joined."""
        return -1 if self._vm is None else max(0, self._vm.machine.size - 1 - self._remote_count)

    def finishedTasks(self) -> int:
        """Return the number of tasks that have ended and were not joined; -1 without a vm."""
        return -1 if self._vm is None else sum(task.is_done for task in self._own_children())

    def getTid(self) -> int:
        """Return the tid of the task that runs here; 1 is the script itself."""
        return self._active_tid

    def finalize(self) -> None:
        """Let the slaves go, when they have ended what they do. What is left to do at the end of the program does it too."""
        session, self._session, vm, self._vm = self._session, None, self._vm, None
        if session is not None:
            if vm is not None:
                vm.machine.note_departure()
            self._is_final = True
            atexit.unregister(self.finalize)
            session.cancel()
            session.end()

    # ---- tasks -------------------------------------------------------------------------------------------------------

    def Spawn(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwargs: dict[str, Any] | None = None,
        remote: bool = False,
        targetHostID: HostID | None = None,
        block: bool = True,
        enqueue: bool = True,
        extendedReturnValue: bool = False,
    ) -> Any:
        """Start ``func(*args, **kwargs)``.

        Parameters
        ----------
        remote : bool
            On a slave. False, or where there is none: it is called here and now, before `Spawn` returns.
        targetHostID
            Must be None: the slave that is free first gets the task.
        block : bool
            If no slave is free, wait for one.
        enqueue : bool
            If no slave is free, and `block` is False: have the task wait for one.
        extendedReturnValue : bool
            Return ``(tid, None, None)``: which slave will run it is not known yet.

        Returns
        -------
        int
            The tid, for `Join`; -1 if no slave was free, and the task was not to wait.

        Raises
        ------
        NotImplementedError
            If there is a `targetHostID`.
        PayloadError
            If the function or its arguments cannot be pickled.
        Unfinished, JdError
            If the run has ended early.
        """
        if targetHostID is not None:
            raise NotImplementedError("Spawn(targetHostID=...): the slave that is free first gets the task")
        task = None
        if not (remote and self._sends):
            task = self._run_here(func, args, kwargs or {})
        else:
            call = calls.call(func, tuple(args), kwargs or {})
            if block:
                self._wait(lambda: self.freeSlots() > 0)
            if block or enqueue or self.freeSlots() > 0:
                task = self._send(call)
        if task is not None:
            self._children[task.tid] = task
        tid = -1 if task is None else task.tid
        return (tid, None, None) if extendedReturnValue else tid

    def Join(self, tidList: Collection[int] = (), block: bool = True) -> dict[int, Any]:
        """Take the result of one task that was started here by `Spawn`: of those that have ended, the oldest.

        Parameters
        ----------
        tidList : collection of int
            Only one of these. Empty: any.
        block : bool
            Wait until there is one.

        Returns
        -------
        dict
            ``{tid: result}``; empty if there is none.

        Raises
        ------
        ValueError
            If `tidList` names what is no task of this one, or was joined before.
        Exception
            What the function raised; its `__cause__` tells the slave and the traceback there.
        """
        wanted = [task for task in self._own_children() if not tidList or task.tid in tidList]
        missing = set(tidList) - {task.tid for task in wanted}
        if missing:
            raise ValueError(f"Join: {sorted(missing)} are no tasks that were started here and not joined yet")
        if block and wanted:
            self._wait(lambda: any(task.is_done for task in wanted))
        for task in wanted:  # in the order of their tids
            if task.is_done:
                del self._children[task.tid]
                return {task.tid: task.result()}
        return {}

    def Yield(self) -> None:
        """Do nothing: no other task runs in this process."""

    # ---- dispatch ----------------------------------------------------------------------------------------------------

    def dispatch(
        self,
        jobList: Iterable[Any],
        collector: Collector | None = None,
        remote: bool = True,
        buildResultList: bool | None = None,
        collectHostIDs: bool = False,
    ) -> list[Any] | None:
        """Run jobs ``(callable, args, kwargs, *extra)``; the rules are those of `jd_hpc.dispatch`. Only the master calls it.

        Parameters
        ----------
        jobList : iterable
            The jobs. It is asked for one when a slave is free.
        collector : generator, optional
            A coroutine that was not started: it gets `(index, job, result)`, and is closed at the end.
        remote : bool
            False: they are all called here, in order.
        buildResultList : bool, optional
            Whether to return the list of results. Default: only without a collector.
        collectHostIDs : bool
            The collector gets `(index, job, result, host)`; `host` is the HostID, or None for what ran here.

        Returns
        -------
        list or None
            The results in the order of the jobs, if they were asked for.

        Raises
        ------
        CallError, CollectorError
            If what was given is no job, or no collector.
        Exception
            What a job, `jobList` or the collector raised.
        """
        exchange = Exchange(jobList, collector, buildResultList)
        running: dict[int, Task] = {}
        try:
            exchange.begin()
            while True:
                can_send = self._start_jobs(exchange, running, remote and self._sends)
                if exchange.is_over and not running:
                    break
                index = self._wait_for_one(running, can_send)
                if index is not None:
                    self._deliver(exchange, index, running.pop(index), collectHostIDs)
        finally:
            for task in running.values():
                task.is_unwanted = True
            exchange.close()
        return exchange.results

    def dispatchSingle(
        self, function: Callable[..., Any], args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None, remote: bool = True
    ) -> Any:
        """Return what ``function(*args, **kwargs)`` returns on a slave."""
        tid = self.Spawn(function, args, kwargs, remote)
        return self.Join([tid])[tid]

    def _start_jobs(self, exchange: Exchange, running: dict[int, Task], remote: bool) -> bool:
        """Start what can be started; return whether there would be more if a slave were free."""
        while self.freeSlots() > 0 if remote else not running:
            given = exchange.next_job()
            if given is None:
                return False
            index, job = given
            running[index] = self._send(call_of(job, index)) if remote else self._run_here(*parts_of(job, index))
        return not exchange.is_over

    def _wait_for_one(self, running: dict[int, Task], can_send: bool) -> int | None:
        """Wait until a job has ended, and return its number; None if a slave became free otherwise."""

        def first() -> int | None:
            return next((index for index, task in running.items() if task.is_done), None)

        self._wait(lambda: first() is not None or (can_send and self.freeSlots() > 0))
        return first()

    def _deliver(self, exchange: Exchange, index: int, task: Task, tells_host: bool) -> None:
        try:
            result = task.result()
        except Exception as error:
            error.add_note(f"This was job {index} of dispatch.")
            raise
        exchange.deliver(index, result, *([task.host] if tells_host else []))

    # ---- mechanics ---------------------------------------------------------------------------------------------------

    @property
    def _sends(self) -> bool:
        return self._vm is not None and self._session is not None

    def note_end(self, task: Task) -> None:
        """Session: a task has ended."""
        with self._changed:
            task.is_done = True
            self._remote_count -= 1
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(condition)

    def _own_children(self) -> list[Task]:
        return [task for task in self._children.values() if task.parent == self._active_tid]

    def _next_tid(self) -> int:
        self._last_tid += 1
        return self._last_tid

    def _send(self, call: calls.Call) -> Task:
        """Have a call run on a slave."""
        assert self._session is not None
        tid = self._next_tid()
        task = Task(self, tid, self._active_tid, calls.call(run_task, (tid, call), {}))
        with self._changed:
            self._remote_count += 1
        try:
            self._session.put(task)
        except (BrokenExecutor, Unfinished) as error:
            self.note_end(task)
            raise _why(error) from None
        return task

    def _run_here(self, function: Callable[..., Any], args: Iterable[Any], kwargs: dict[str, Any]) -> Task:
        """Call a function as a task; what it starts is its own to join."""
        task = Task(self, self._next_tid(), self._active_tid)
        self._active_tid = task.tid
        try:
            task.call_here(function, args, kwargs)
        finally:
            for child in self._own_children():
                child.is_unwanted = True
                del self._children[child.tid]
            self._active_tid = task.parent
        return task


cOS = OpusOS()
"""The only one, as in PyOPUS."""


class JobDispatcher(dispatcher.JobDispatcher):
    """`jd_hpc.JobDispatcher` with PyOPUS's names of arguments. Every rank calls `run()`; not after `cOS.setVM`, where slaves serve.

    Parameters
    ----------
    vm : None, MPI, mpi4py.MPI.Intracomm or MPIMachine
        Where the slaves are.
    maxSlaves : int, optional
        Use at most so many slaves.
    minSlaves : int
        With fewer the master evaluates the jobs itself.
    debug : int
        0, 1, or 2; what is more is 2.
    **options
        Those of `jd_hpc.JobDispatcher`.

    Raises
    ------
    ValueError
        If numbers are negative or contradict each other.
    """

    def __init__(self, vm: Any = None, maxSlaves: int | None = None, minSlaves: int = 0, debug: int = 0, **options: Any) -> None:
        machine = vm.machine if isinstance(vm, MPI) else vm
        super().__init__(machine, maxSlaves, minSlaves, min(debug, 2), **options)

    def run(self, journal: Any = None) -> Any:
        """As `jd_hpc.JobDispatcher.run`.

        Raises
        ------
        LaunchError
            If `cOS.setVM` has the slaves.
        """
        if cOS.is_served and self.machine.size > 1:
            raise LaunchError("the slaves have served cOS since setVM; leave that out, or use cOS.dispatch")
        return super().run(journal)

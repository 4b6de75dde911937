"""JobDispatcher: the class that users derive from. The hooks, the options and run(); no mechanics."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jd_hpc.errors import JobError, MessageError
from jd_hpc.history import path_of as history_path_of
from jd_hpc.journal import path_of as journal_path_of
from jd_hpc.machine import LEAST_HEARTBEAT_S, LocalMachine, MPIMachine, as_machine
from jd_hpc.messages import Filter, Handler, Handlers
from jd_hpc.plan import Hook, Plan
from jd_hpc.progress import wanted
from jd_hpc.runs import Run
from jd_hpc.signals import Drains
from jd_hpc.streams import SEED_MOST, stream
from jd_hpc.wire import MOST_ATTEMPTS

logger = logging.getLogger("jd_hpc")

INDEX_MOST = (1 << 63) - 1


class JobDispatcher:
    """Runs many independent jobs on the slaves of a vm. Derive from it, write the hooks, call `run()` on every rank.

    Parameters
    ----------
    vm : None, mpi4py.MPI.Intracomm or MPIMachine
        Where the slaves are. None, or a communicator of one rank: jobs are evaluated here, through the same hooks.
    max_slaves : int, optional
        Use at most so many slaves; the others wait idle until the run ends. Default: all.
    min_slaves : int
        With fewer usable slaves than this, or none, the master evaluates the jobs itself.
    debug : int
        0: silent. 1: the master logs how the run goes. 2: every job sent and every result too, and the slaves speak as well.
        Lines go to the logger ``jd_hpc``, and to stderr if no logging was set up.
    grain : int, optional
        Jobs per message, default 1. For jobs of less than about 100 microseconds a larger grain pays.
    credit : int, optional
        Messages that a slave may hold at once, default 2: one to work on, one to go on with.
    max_attempts : int
        A job is given up, and goes to `process_failure`, when so many slaves, or processes of `isolate`, failed while they ran it.
    job_timeout_s : float, optional
        What one job may take, in seconds; a message of several may take as many times that. A slave that takes longer gets no
        more jobs until it answers, and its jobs go to others; with `isolate` the process is ended instead. A slave whose
        `on_startup` or `on_shutdown` takes longer is not waited for at the end.
    isolate : bool
        Run jobs in a process of their own on every slave: a crash, a hang or a job out of memory then costs an attempt of that
        job, and nothing else, with any MPI and any launcher.
    memory_limit : int, optional
        With `isolate`: bytes that the jobs' process may allocate.
    heartbeat_s : float
        How often a slave gives a sign of life, from a thread that needs no GIL, in seconds, at least 0.02. 0: nobody listens.
    liveness_timeout_s : float
        Silence after which a slave is suspected, in seconds: its jobs go to others, and it is taken on again when it is heard.
    local_fallback : bool
        False: when too few slaves are left, the run ends with SlavesLostError; the master does not do their work.
    history : path-like, optional
        A file to which the master adds a line for every event, for ``jd-hpc check`` (see docs/history.md). Default: the environment
        variable JD_HPC_HISTORY; "": none.
    walltime : None, float or callable
        When the allocation ends: seconds from the start of the process, or a function without arguments that returns the seconds
        that are left (the master calls it every few seconds). None: the environment decides, which is ``--walltime`` or Slurm;
        `math.inf`: it ends never.
    walltime_margin_s : float
        So long before that end all must have come in, in seconds: the time to write, to part and to end.
    rng : bool
        Give every job a random stream of its own: `process_job` is called as ``process_job(job, rng)``. See `rng()`, which
        `process_jobs` calls itself. A journal then belongs to this seed.
    seed : int
        Of the random streams, 0 to 2**64 - 1; the same on all ranks.
    ordered : bool
        Results and failures are handed over in the order of their jobs. What comes in before its turn waits on the master.
    window : int, optional
        With `ordered`: so many jobs, rounded up to whole messages, may be fetched and not handed over; then `next_job` waits for
        the oldest one. Default: eight times what all slaves may hold, and what `next_jobs` is asked ahead.
    progress : bool or int, optional
        True, or how many jobs there are: the master shows a bar on stderr, by tqdm, or a line per minute where that is no terminal
        (docs/progress.md). Default: the environment variable JD_HPC_PROGRESS, else none.

    Raises
    ------
    ValueError
        If numbers are negative or contradict each other.
    LaunchError
        If the ranks were not launched as one MPI run.

    Attributes
    ----------
    job_dtype, result_dtype : dtype-like or None
        Class attributes, or set in the constructor. A numpy dtype: jobs or results are rows of it and travel as bytes, never
        pickled; ``("f8", 3)`` is an array of three. None: any object that can be pickled.
    kernel
        Likewise. A compiled kernel that takes the place of `process_job` (see `jd_hpc.kernel`).
    allow_nan : bool
        Likewise. False: a NaN in a numeric job or result is an error.
    payload_limit : int
        Likewise. Bytes of the largest message; a larger one is refused with an error.
    job_count : int or None
        Likewise, or set in `reset`. How many jobs there are, where that is known: only `progress` wants to know.
    machine : LocalMachine or MPIMachine
        Tells slots, hosts and who is master.
    stats : dict of str to int
        On the master, after a run: jobs, messages sent and refused, slaves lost, suspected and reinstated, batches sent again, late
        results dropped, results that came from the journal.
    from_journal : bool
        On the master: True while `process_result` or `process_results` is called with results that the journal had already.
    first_index : int
        Where jobs run, while `process_jobs` is called: the number of its first job.
    """

    job_dtype: Any = None
    result_dtype: Any = None
    kernel: Any = None
    allow_nan: bool = True
    payload_limit: int = 1 << 36
    job_count: int | None = None
    from_journal: bool = False
    first_index: int = 0

    def __init__(
        self,
        vm: Any = None,
        max_slaves: int | None = None,
        min_slaves: int = 0,
        debug: int = 0,
        *,
        grain: int | None = None,
        credit: int | None = None,
        max_attempts: int = 3,
        job_timeout_s: float | None = None,
        isolate: bool = False,
        memory_limit: int | None = None,
        heartbeat_s: float = 0.5,
        liveness_timeout_s: float = 10.0,
        local_fallback: bool = True,
        history: str | os.PathLike[str] | None = None,
        walltime: float | Callable[[], float] | None = None,
        walltime_margin_s: float = 30.0,
        rng: bool = False,
        seed: int = 0,
        ordered: bool = False,
        window: int | None = None,
        progress: bool | int | None = None,
    ) -> None:
        self.grain = _number("grain", 1 if grain is None else grain, 1, 1 << 30)
        self.credit = _number("credit", 2 if credit is None else credit, 1, 1 << 10)
        self.max_slaves = None if max_slaves is None else _number("max_slaves", max_slaves, 0, 1 << 30)
        self.min_slaves = _number("min_slaves", min_slaves, 0, 1 << 30)
        self.debug = _number("debug", debug, 0, 2)
        self.max_attempts = _number("max_attempts", max_attempts, 1, MOST_ATTEMPTS)
        self.job_timeout_s = None if job_timeout_s is None else _seconds("job_timeout_s", job_timeout_s)
        self.isolate = bool(isolate)
        self.memory_limit = None if memory_limit is None else _number("memory_limit", memory_limit, 1 << 20, 1 << 60)
        self.heartbeat_s = _seconds("heartbeat_s", heartbeat_s, zero=True)
        self.liveness_timeout_s = _seconds("liveness_timeout_s", liveness_timeout_s)
        self.local_fallback = bool(local_fallback)
        self.history_path = history_path_of(history)
        self._names_history, self._names_progress = history is not None, progress is not None  # else the environment does
        is_time = walltime is not None and not callable(walltime) and walltime != math.inf
        self.walltime = _seconds("walltime", walltime) if is_time else walltime  # type: ignore[arg-type]
        self.walltime_margin_s = _seconds("walltime_margin_s", walltime_margin_s, zero=True)
        self.gives_rng = bool(rng)
        self._seed = _number("seed", seed, 0, SEED_MOST)  # `seed` may well be the user's own
        self.ordered = bool(ordered)
        self._window = None if window is None else _number("window", window, 1, 1 << 40)
        self._progress = wanted(progress)  # likewise
        if 0 < self.heartbeat_s < LEAST_HEARTBEAT_S:
            raise ValueError(f"heartbeat_s = {heartbeat_s} is out of range: it is 0, or at least {LEAST_HEARTBEAT_S}")
        if self.liveness_timeout_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"liveness_timeout_s = {liveness_timeout_s} must be at least twice heartbeat_s = {heartbeat_s}, or a beat that is "
                f"a little late would cost a slave its jobs"
            )
        if self.memory_limit is not None and not self.isolate:
            raise ValueError("memory_limit needs isolate=True: a limit on the rank itself would end MPI with the job")
        if self._window is not None and not self.ordered:
            raise ValueError("window needs ordered=True: without it results wait for nothing")
        if self.max_slaves is not None and self.min_slaves > self.max_slaves:
            raise ValueError(f"min_slaves = {min_slaves} is more than max_slaves = {max_slaves}; no run could ever use slaves")
        self.machine: LocalMachine | MPIMachine = as_machine(vm)
        self.stats: dict[str, int] = {}
        self._handlers = Handlers()
        self._post: Any = None  # what carries messages, while a run is on

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Master, at the start of every run: forget the last one."""

    def next_job(self) -> Any:
        """Master: return the next job, or None if there is none now.

        The run ends at None with nothing in flight: after every result it is asked again, so results may create new jobs. Numeric
        jobs are rows of `job_dtype`; what is returned is copied.
        """
        raise NotImplementedError(f"{type(self).__name__} must define next_job() or next_jobs(count)")

    def process_job(self, job: Any) -> Any:
        """Slave: run one job and return its result.

        A numeric job is a read-only view of the receive buffer, which may be kept. The result must be exactly what `result_dtype`
        says. An exception fails this job only: the master gets it in `process_failure`. With ``rng=True`` a second
        argument comes, the job's random stream.
        """
        raise NotImplementedError(f"{type(self).__name__} must define process_job(job), process_jobs(jobs, results) or a kernel")

    def process_result(self, index: int, job: Any, result: Any) -> None:
        """Master: take the result of job number `index` (from 0), once for every job, in order of completion.

        With ``ordered=True`` in the order of `index`, failures included.
        """

    def process_failure(self, index: int, job: Any, error: JobError) -> None:
        """Master: job number `index` failed; `error` has the traceback of the slave. The default ends the run and raises it."""
        try:
            raise error
        finally:
            del job, error  # the traceback holds this frame, and the frame should hold neither the job nor the traceback

    def postprocess(self) -> Any:
        """Master, after the last result: what it returns is what `run()` returns there."""
        return None

    def next_jobs(self, count: int) -> Sequence[Any] | NDArray[Any] | None:
        """Master, instead of `next_job` where overridden: return up to `count` jobs, or None if there is none now.

        Numeric jobs: an array of up to `count` rows. Blocks are asked for a little ahead of the slaves.
        """
        raise NotImplementedError

    def process_jobs(self, jobs: Any, results: Any) -> None:
        """Slave, instead of `process_job` where overridden: run a batch.

        `jobs` has up to `grain` jobs: an array of rows, or a list. Fill `results`: an array of as many rows, or a list. An
        exception fails the whole batch. Job i of them has the number ``self.first_index + i``.
        """
        raise NotImplementedError

    def process_results(self, indices: NDArray[np.int64], jobs: Any, results: Any) -> None:
        """Master, instead of `process_result` where overridden: take many results at once.

        The arrays are read-only and may be kept.
        """
        raise NotImplementedError

    def shared(self) -> Any:
        """Master, after `reset`, where overridden: return what every slave is to have before its first job.

        While the run is on, `self.shared` is no longer this method but what it returned: on every slave, and on the master. It can
        be anything that can be pickled. Arrays in it are read-only, and large ones lie in memory once per host (docs/shared.md).
        """
        raise NotImplementedError

    def job_key(self, job: Any) -> Any:
        """Master, with a journal and jobs that are objects: return what identifies a job, the job itself by default.

        The journal compares the pickle of this (or these bytes, if it returns bytes) from run to run. Override it where equal jobs
        may pickle differently, as sets of strings do.
        """
        return job

    def on_startup(self) -> None:
        """Every rank, at the start of every run; `self.machine.is_master` tells which."""

    def on_slave_started(self, slave: int) -> None:
        """Master: a slave (its rank) has reported for work."""

    def on_slave_idle(self, slave: int) -> None:
        """Master: a slave has given back all it had, and no job waits."""

    def on_slave_failed(self, slave: int, indices: list[int]) -> None:
        """Master: a slave was lost, or is suspected; the jobs of these numbers, which it held, go to others."""

    def on_job_sent(self, slave: int, index: int) -> None:
        """Master: a job went out to a slave."""

    def on_result(self, slave: int, index: int) -> None:
        """Master: a result came in from a slave, before it is processed."""

    def on_shutdown(self) -> None:
        """Every rank, at the end of every run, also when it failed."""

    # ---- random numbers ----------------------------------------------------------------------------------------------

    def rng(self, index: int) -> np.random.Generator:
        """Any rank: return a fresh random stream for job `index`, at its beginning.

        It depends on `seed` and `index` alone: not on the rank, nor on how often the job was tried. Streams of two jobs, or of two
        seeds, never overlap. It is a numpy Generator over Philox.

        Raises
        ------
        ValueError, TypeError
            If `index` is no number of a job.
        """
        return stream(self._seed, _number("index", index, 0, INDEX_MOST))

    @cached_property
    def comm(self) -> Any:
        """The communicator of the ranks that run a job together, in `process_job` (see MPIMachine): of one rank by default."""
        return self.machine.group_comm

    # ---- messages of your own (docs/messages.md) -----------------------------------------------------------------------

    def add_handler(self, message_type: type, handler: Handler, filter: Filter | None = None) -> None:
        """Any rank: have messages of this class, or of one derived from it, handled here.

        Parameters
        ----------
        message_type : type
            Of the messages. The first handler that was added, and fits, gets a message: like `except` clauses.
        handler : callable
            Called with (source, message); `source` is a rank, 0 the master. Returns None, or pairs (destination, message) to send.
        filter : callable, optional
            Called with the same before; the handler is not called if this returns something false. A message that every filter
            refuses is dropped.
        """
        self._handlers.add(message_type, handler, filter)

    def tell(self, message: Any, destination: int = 0) -> None:
        """Any rank, in hooks, handlers and jobs: send an object to the handler that another rank has for it.

        The master never waits, and drops what is for a slave that is not up. A slave waits while 8 of its messages are not handled
        yet. Between slaves a message goes by way of the master. What one rank sends to another, results and jobs included, keeps
        its order.

        Parameters
        ----------
        message : object
            Anything that can be pickled.
        destination : int
            A rank: 0 is the master.

        Raises
        ------
        MessageError
            Outside a run or its thread, if there is no such rank, or if 1024 messages wait for that slave already.
        PayloadError
            If it cannot be pickled, or is over `payload_limit`.
        """
        self._carrier().tell(message, destination)

    def broadcast(self, message: Any) -> int:
        """Master: send an object to all slaves that are up, as `tell` does; return to how many it went."""
        count: int = self._carrier().broadcast(message)
        return count

    def poll(self) -> int:
        """Slave, in a long job: handle the messages that have come; return how many these were.

        Cheap when there is none. It ends the job when the run is stopped. On the master it does nothing: its handlers are called
        between its hooks.
        """
        post = self._post
        if post is None:
            post = self._carrier()
        count: int = post.poll_letters()
        return count

    def _carrier(self) -> Any:
        if self._post is None:
            raise MessageError(
                "tell(), broadcast() and poll() are for hooks, handlers and jobs of a run, and there is none now. Cure: call them "
                "from on_startup on, until the last result"
            )
        return self._post

    # ---- the run -----------------------------------------------------------------------------------------------------

    def run(self, journal: str | os.PathLike[str] | None = None) -> Any:
        """Run all jobs. Every rank of the vm must call it.

        Parameters
        ----------
        journal : path, optional
            A file that gets every delivered result. What it has already, from a run of the same jobs that did not come to its end,
            is delivered first, with `from_journal` set, and only the rest is computed. Default: what the environment variable
            JD_HPC_JOURNAL names, if it is set. Only the master reads and writes it. More is in docs/journal.md.

        Returns
        -------
        object
            On the master what `postprocess` returned; None on slaves.

        Raises
        ------
        Unfinished
            On all ranks, if the allocation ends or a signal comes before all jobs have ended. `postprocess` is not called then. It
            is a SystemExit with code 85.
        JobError
            On the master, if a job failed and `process_failure` is not overridden.
        JournalError
            On the master, one of its kinds: if another run writes this journal, if it belongs to other jobs, is damaged, or cannot
            be written.
        NestedRunError, ThreadLevelError
            If the vm is in a run of this process already, or MPI does not allow a run in this thread (docs/nested.md).
        JdError
            Others of its kinds for bad jobs, bad results and ranks that disagree; each names its cause and cure.
        Exception
            Whatever a hook of the master raised, after all slaves have left the run.
        """
        self._set_up_logging()
        path = None if journal is None and Drains.is_inside() else journal_path_of(journal)  # JD_HPC_JOURNAL is the outer run's
        return Run(self, self._plan, path, self._log).go()

    def _plan(self) -> Plan:
        plan = Plan(self, self._overrides)
        if self.debug > 1:
            plan.on_job_sent = _traced("slave %d gets job %d", plan.on_job_sent)
            plan.on_result = _traced("slave %d answers job %d", plan.on_result)
        if self.debug > 0:
            plan.on_slave_started = _traced("slave %d has started", plan.on_slave_started)
        return plan

    def _overrides(self, name: str) -> bool:
        """Whether a hook is the user's own: of a derived class, or set on the instance."""
        return name in vars(self) or getattr(type(self), name) is not getattr(JobDispatcher, name)

    def _set_up_logging(self) -> None:
        if self.debug:
            logger.setLevel(logging.INFO if self.debug == 1 else logging.DEBUG)
            if not logger.hasHandlers():
                handler = logging.StreamHandler(sys.stderr)
                handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
                logger.addHandler(handler)

    def _log(self, message: str, *args: Any) -> None:
        if self.debug:
            logger.info(message, *args)


def _traced(message: str, hook: Hook | None) -> Hook:
    """Return a hook that logs, and then does what `hook` did."""

    def traced(*args: Any) -> None:
        logger.log(logging.DEBUG if len(args) > 1 else logging.INFO, message, *args)
        if hook is not None:
            hook(*args)

    return traced


def _seconds(name: str, value: float, zero: bool = False) -> float:
    """Check an option that is a time."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} = {value!r} is no number of seconds")
    if not (0 < value < 1e9 or (zero and value == 0)):
        raise ValueError(f"{name} = {value} is out of range: it is a number of seconds, more than 0 and less than 1e9")
    return float(value)


def _number(name: str, value: int, least: int, most: int) -> int:
    """Check an option."""
    try:
        number = index(value)
    except TypeError as error:
        raise TypeError(f"{name} = {value!r} is no whole number") from error
    if not least <= number <= most:
        raise ValueError(f"{name} = {number} is out of range: it can be {least} to {most}")
    return number

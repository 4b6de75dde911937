"""JobDispatcher: the class that users derive from. The hooks, the options and run(); no mechanics."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jd_hpc import allocation, chaos, ending, local, supervisor
from jd_hpc.errors import JobError, MasterLostError, Unfinished
from jd_hpc.machine import LEAST_HEARTBEAT_S, Channel, LocalMachine, MPIMachine, as_machine, load_core
from jd_hpc.plan import Hook, Plan
from jd_hpc.signals import Asked, Drains, Interrupts
from jd_hpc.survival import Watch
from jd_hpc.walltime import Drain, Walltime
from jd_hpc.wire import MOST_ATTEMPTS

logger = logging.getLogger("jd_hpc")

ISOLATED_MARGIN_S = 10.0
"""With isolate the slave ends an overdue job itself; the master steps in when not even that has worked."""


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
        more jobs until it answers, and its jobs go to others; with `isolate` the process is ended instead.
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
    walltime : None, float or callable
        When the allocation ends: seconds from the start of the process, or a function without arguments that returns the seconds
        that are left (the master calls it every few seconds). None: the environment decides, which is ``--walltime`` or Slurm;
        `math.inf`: it ends never.
    walltime_margin_s : float
        So long before that end all must have come in, in seconds: the time to write, to part and to end.

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
    machine : LocalMachine or MPIMachine
        Tells slots, hosts and who is master.
    stats : dict of str to int
        On the master, after a run: jobs, messages sent and refused, slaves lost, suspected and reinstated, batches sent again, late
        results dropped.
    """

    job_dtype: Any = None
    result_dtype: Any = None
    kernel: Any = None
    allow_nan: bool = True
    payload_limit: int = 1 << 36

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
        walltime: float | Callable[[], float] | None = None,
        walltime_margin_s: float = 30.0,
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
        is_time = walltime is not None and not callable(walltime) and walltime != math.inf
        self.walltime = _seconds("walltime", walltime) if is_time else walltime  # type: ignore[arg-type]
        self.walltime_margin_s = _seconds("walltime_margin_s", walltime_margin_s, zero=True)
        if 0 < self.heartbeat_s < LEAST_HEARTBEAT_S:
            raise ValueError(f"heartbeat_s = {heartbeat_s} is out of range: it is 0, or at least {LEAST_HEARTBEAT_S}")
        if self.liveness_timeout_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"liveness_timeout_s = {liveness_timeout_s} must be at least twice heartbeat_s = {heartbeat_s}, or a beat that is "
                f"a little late would cost a slave its jobs"
            )
        if self.memory_limit is not None and not self.isolate:
            raise ValueError("memory_limit needs isolate=True: a limit on the rank itself would end MPI with the job")
        if self.max_slaves is not None and self.min_slaves > self.max_slaves:
            raise ValueError(f"min_slaves = {min_slaves} is more than max_slaves = {max_slaves}; no run could ever use slaves")
        self.machine: LocalMachine | MPIMachine = as_machine(vm)
        self.stats: dict[str, int] = {}

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
        says. An exception fails this job only: the master gets it in `process_failure`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define process_job(job), process_jobs(jobs, results) or a kernel")

    def process_result(self, index: int, job: Any, result: Any) -> None:
        """Master: take the result of job number `index` (from 0), once for every job, in order of completion."""

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
        exception fails the whole batch.
        """
        raise NotImplementedError

    def process_results(self, indices: NDArray[np.int64], jobs: Any, results: Any) -> None:
        """Master, instead of `process_result` where overridden: take many results at once.

        The arrays are read-only and may be kept.
        """
        raise NotImplementedError

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

    # ---- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> Any:
        """Run all jobs. Every rank of the vm must call it.

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
        JdError
            Others of its kinds for bad jobs, bad results and ranks that disagree; each names its cause and cure.
        Exception
            Whatever a hook of the master raised, after all slaves have left the run.
        """
        self._set_up_logging()
        with Drains() as asked:
            return self._run(asked)

    def _run(self, asked: Asked | None) -> Any:
        machine = self.machine
        if isinstance(machine, LocalMachine) or machine.size == 1:
            return self._run_local(asked)
        core = load_core()
        channel = machine.channel()
        chaos.arm_from_environment(machine.rank, machine.size)
        if machine.is_master:
            master = core.Master(
                channel.handle, channel.next_run(), channel.body_turn, channel.early, channel.dead, channel.missing
            )
            with Interrupts(master):
                return self._run_master(machine, channel, master, asked)
        slave = core.Slave(channel.handle, channel.next_run(), channel.body_turn)
        slave.asked = asked
        with Interrupts(slave):
            return self._run_slave(channel, slave)

    def _run_local(self, asked: Asked | None) -> Any:
        try:
            plan = self._plan()
            self.on_startup()
            self.reset()
            drain = None if asked is None else self._drain(plan)  # inside a job of another run: that one's business
            count, left = local.run_jobs(plan, drain, asked)
            if left and drain is not None:
                raise self._unfinished(drain.reason, count - left, left, 0)
            self._log("%d jobs were evaluated locally", count)
            return self.postprocess()
        finally:
            self.on_shutdown()

    def _run_master(self, machine: MPIMachine, channel: Channel, master: Any, asked: Asked | None) -> Any:
        usable = machine.size - 1 if self.max_slaves is None else min(self.max_slaves, machine.size - 1)
        alone = usable < max(1, self.min_slaves)
        self._log("run %d: %d slaves%s", master.run, usable, ", too few: the master evaluates the jobs" if alone else "")
        try:
            try:
                plan = self._plan()
                master.begin(plan, 0 if alone else usable)
                self._watch(channel, master, plan)
                drain = self._drain(plan)
                master.drain_by(drain, asked)
                machine.busy = master.busy_slaves
                self.on_startup()
                self.reset()
                master.run_jobs()
            finally:  # the slaves leave the run first, whatever happened
                machine.busy = None
                master.stop()
                self.stats = master.counters()
                if master.failed:
                    channel.note_failures()
            self._log("run %d: %s", master.run, self.stats)
            if master.left is not None:
                raise self._unfinished(drain.reason, *master.left)
            return self.postprocess()
        finally:
            self.on_shutdown()

    def _watch(self, channel: Channel, master: Any, plan: Plan) -> None:
        """Have the slaves watched."""
        margin_s = ISOLATED_MARGIN_S if plan.isolate else 0.0
        listener = channel.listener if plan.heartbeat_s else None
        watch = Watch(master.scheduler, listener, plan.liveness_timeout_s, plan.job_timeout_s, margin_s)
        master.watch_over(watch, channel.acknowledge)

    def _drain(self, plan: Plan) -> Drain:
        """What decides when nothing more goes out."""
        left = allocation.left_of(plan.walltime, os.environ)
        return Drain(plan.grain, plan.credit, None if left is None else Walltime(left, plan.walltime_margin_s))

    def _unfinished(self, *facts: Any) -> Unfinished:
        error = Unfinished(*facts)
        print(f"jd_hpc: {error}; exit code {error.code}", file=sys.stderr, flush=True)
        ending.exit_with(error.CODE)
        return error

    def _run_slave(self, channel: Channel, slave: Any) -> None:
        try:
            try:
                plan = self._plan()
                slave.begin(plan)
                slave.beat = channel.beat_every(plan.heartbeat_s)
                self.on_startup()
                slave.ready(plan.facts())
                if self.debug > 1:
                    self._log("run %d: slave %d is ready", slave.run, slave.rank)
                slave.serve()
            except MasterLostError as error:
                ending.failed(str(error))
                raise
            except BaseException as error:
                slave.report(error)
                slave.leave()
                raise
            else:
                slave.leave()
            finally:
                slave.close()
                if slave.failed and not self._waits_for_abort(slave):
                    ending.failed("ranks of the run failed")
            if slave.drained:
                ending.exit_with(ending.UNFINISHED)
                raise Unfinished("the master says so")
        finally:
            self.on_shutdown()

    @staticmethod
    def _waits_for_abort(slave: Any) -> bool:
        """Whether this rank ends as ever, by MPI_Finalize, and waits there until the master ends the run by MPI_Abort.

        Without a supervisor the launcher would end the master too if this rank went first.
        """
        return slave.drained and not supervisor.is_there()

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
        raise ValueError(f"{name} = {value} is out of range: it is a number of seconds, more than 0")
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

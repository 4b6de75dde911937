"""One run of a dispatcher on this rank: as the master, as a slave, or alone. It brings the rooms together, in order.

The rules it keeps:

- Whatever happens on the master, the slaves leave the run first; then history and journal are closed, and errors go on.
- A slave that cannot go on tells the master why, and leaves with the others.
- `on_shutdown` comes last on every rank. By then, and in `postprocess`, the ranks may begin another run.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from jd_hpc import allocation, chaos, ending, groups, local, sharing, supervisor
from jd_hpc.claims import Claim
from jd_hpc.errors import MasterLostError, Unfinished
from jd_hpc.history import History
from jd_hpc.journal import Journal
from jd_hpc.machine import Channel, LocalMachine, MPIMachine, load_core, mpi_name
from jd_hpc.messages import LocalPost
from jd_hpc.plan import Plan
from jd_hpc.progress import Progress
from jd_hpc.signals import Asked, Drains, Interrupts
from jd_hpc.survival import Watch
from jd_hpc.walltime import Drain, Walltime

if TYPE_CHECKING:
    from jd_hpc.dispatcher import JobDispatcher

ISOLATED_MARGIN_S = 10.0
"""With isolate the slave ends an overdue job itself; the master steps in when not even that has worked."""
OPTIONS = (
    "grain", "credit", "max_attempts", "min_slaves", "local_fallback", "job_timeout_s", "isolate", "memory_limit", "heartbeat_s",
    "liveness_timeout_s", "ordered", "gives_rng",
)  # fmt: skip
"""What a history tells."""


class Engine(Protocol):
    """What runs jobs: the core's master, or local.Engine."""

    def run_jobs(self) -> None:
        """Run until no job is left; may be called again."""

    def wake(self) -> None:
        """There are jobs again: from any thread."""

    def break_off(self, error: BaseException) -> None:
        """Have run_jobs raise this: from any thread."""

    def look_around(self) -> None:
        """Between two calls of run_jobs, now and then."""


def _run_jobs(engine: Engine) -> None:
    engine.run_jobs()


class Run:
    """One run.

    Parameters
    ----------
    dispatcher : JobDispatcher
        Whose hooks are called.
    make_plan : callable
        Returns the Plan; what is wrong with the options shows there, when the other ranks can be told.
    journal_path : str or None
        Of the journal, if there is to be one.
    log : callable
        Takes a message and its arguments, as a logger does.
    work : callable, optional
        What the master does between the beginning of the run and its end. Default: run all jobs.
    """

    def __init__(
        self,
        dispatcher: JobDispatcher,
        make_plan: Callable[[], Plan],
        journal_path: str | None,
        log: Callable[..., None],
        work: Callable[[Engine], None] | None = None,
    ) -> None:
        self._dispatcher = dispatcher
        self._make_plan = make_plan
        self._work = work or _run_jobs
        self._journal_path = journal_path
        self._log = log
        self._asked: Asked | None = None
        self._claim: Claim
        self._drain: Drain | None = None

    def go(self) -> Any:
        """Run, and return what `postprocess` returned on the master."""
        machine = self._dispatcher.machine
        with Drains() as self._asked, sharing.put_back(vars(self._dispatcher)):
            if isinstance(machine, LocalMachine) or machine.size == 1:
                with self._history() as history:
                    return self._go_alone(history)
            core = load_core()
            with machine.claim() as self._claim:
                channel = self._channel(machine)
                chaos.arm_from_environment(machine.rank, machine.size)
                if machine.is_master:
                    master = core.Master(
                        channel.handle, channel.next_run(), channel.body_turn, channel.early, channel.dead, channel.missing
                    )
                    with Interrupts(master), self._history() as history:
                        return self._go_as_master(machine, channel, master, history)
                slave = core.Slave(channel.handle, channel.next_run(), channel.body_turn)
                with Interrupts(slave):
                    return self._go_as_slave(machine, channel, slave, core)

    def _channel(self, machine: MPIMachine) -> Channel:
        """Come together with the other ranks. After a Ctrl-C meanwhile nobody may wait for them, not even in MPI_Finalize."""
        try:
            return machine.channel()
        except BaseException:
            ending.failed("the ranks have not come together")
            raise

    # ---- alone -------------------------------------------------------------------------------------------------------

    def _go_alone(self, history: History) -> Any:
        dispatcher = self._dispatcher
        try:
            plan = self._make_plan()
            plan.tell(history.begin(self._facts(0)))
            plan.post = dispatcher._post = LocalPost(dispatcher._handlers)
            with self._journal(plan), self._progress() as plan.progress:
                dispatcher.on_startup()
                dispatcher.reset()
                self._share_alone(plan)
                drain = None if self._asked is None else self._make_drain(plan)  # inside another run's job: that one's business
                with contextlib.closing(local.Engine(plan, drain, self._asked)) as engine:
                    self._work(engine)
                if plan.progress is not None:
                    plan.progress.tick(0.0, lambda: (engine.count - engine.put_back, plan.failed_count, 0, 1), last=True)
            stored = 0 if plan.journal is None else plan.journal.delivered
            dispatcher.stats = history.counters = {"jobs": engine.count, "from journal": stored}
            if engine.put_back:
                raise self._unfinished(plan, engine.count - engine.put_back, engine.put_back, 0)
            self._log("%d jobs were evaluated locally", engine.count - stored)
            return dispatcher.postprocess()
        finally:
            dispatcher._post = None
            dispatcher.on_shutdown()

    # ---- the master --------------------------------------------------------------------------------------------------

    def _go_as_master(self, machine: MPIMachine, channel: Channel, master: Any, history: History) -> Any:
        dispatcher = self._dispatcher
        usable = machine.slaves if dispatcher.max_slaves is None else min(dispatcher.max_slaves, machine.slaves)
        alone = usable < max(1, dispatcher.min_slaves)
        self._log("run %d: %d slaves%s", master.run, usable, ", too few: the master evaluates the jobs" if alone else "")
        try:
            with contextlib.ExitStack() as opened:
                try:
                    plan = self._make_plan()
                    slaves = 0 if alone else usable
                    if machine.grouping is not None:
                        groups.check(plan)
                        plan.fellows = machine.grouping.fellows(slaves)
                    plan.tell(history.begin(self._facts(slaves, run=master.run, mpi=mpi_name(), hosts=channel.hosts)))
                    opened.enter_context(self._journal(plan))
                    if plan.shared is not None and slaves:
                        plan.sharing = sharing.Sharing(channel.hosts)
                    master.progress = progress = opened.enter_context(self._progress())
                    dispatcher._post, master.handlers = master, dispatcher._handlers  # first: slaves may be there already
                    master.begin(plan, slaves)
                    self._watch(channel, master)
                    master.drain_by(self._make_drain(plan), self._asked)
                    machine.busy = master.busy_slaves
                    dispatcher.on_startup()
                    dispatcher.reset()
                    if plan.sharing is None:
                        self._share_alone(plan)
                    else:
                        self._share(plan, master, opened.enter_context(sharing.Holder()))
                    self._work(master)
                    if progress is not None:
                        progress.tick(0.0, master.counts, last=True)
                finally:
                    machine.busy = dispatcher._post = None
                    try:
                        self._stop(channel, master)
                    except BaseException:
                        if not master.stop_began:  # a signal handler of the user's raised on the way there
                            self._stop(channel, master)
                        raise
                    finally:
                        history.counters = dispatcher.stats
                        self._claim.release()
            self._log("run %d: %s", master.run, dispatcher.stats)
            if master.left is not None:
                raise self._unfinished(plan, *master.left)
            return dispatcher.postprocess()
        finally:
            dispatcher.on_shutdown()

    def _watch(self, channel: Channel, master: Any) -> None:
        """Have the slaves watched."""
        options = self._dispatcher
        margin_s = ISOLATED_MARGIN_S if options.isolate else 0.0
        listener = channel.listener if options.heartbeat_s else None
        watch = Watch(master.scheduler, listener, options.liveness_timeout_s, options.job_timeout_s, margin_s)
        master.watch_over(watch, channel.acknowledge, options.liveness_timeout_s)

    def _stop(self, channel: Channel, master: Any) -> None:
        """Have all slaves leave the run."""
        if not master.watched:  # it failed before it began
            master.begin(None, 0)
            self._watch(channel, master)
        try:
            master.stop()
        finally:
            self._dispatcher.stats = master.counters()
            if master.failed:
                channel.note_failures()

    # ---- a slave -----------------------------------------------------------------------------------------------------

    def _team(self, plan: Plan, machine: MPIMachine, slave: Any, stopped: type[BaseException]) -> groups.Team | None:
        """Return this rank's part of its group, where slaves are groups."""
        if machine.grouping is None:
            return None
        groups.check(plan)
        if machine.grouping.place is None:  # idle
            return None
        return groups.Team(machine.grouping, slave, stopped, self._dispatcher.liveness_timeout_s)

    def _go_as_slave(self, machine: MPIMachine, channel: Channel, slave: Any, core: Any) -> None:
        dispatcher = self._dispatcher
        slave.asked = self._asked
        opened = contextlib.ExitStack()
        try:
            try:
                plan = self._make_plan()
                plan.team = self._team(plan, machine, slave, core.StoppedAtWork)
                slave.begin(plan)
                dispatcher._post, slave.handlers = slave, dispatcher._handlers
                slave.beat = channel.beat_every(plan.heartbeat_s)
                with contextlib.suppress(core.StoppedAtWork):  # by a poll() in on_startup, or in the group
                    with channel.limited(dispatcher.job_timeout_s):
                        dispatcher.on_startup()
                    if plan.shared is not None:
                        self._set_shared(opened.enter_context(sharing.Holder()).fetch(slave, plan.facts()))
                    if plan.team is not None:
                        plan.team.begin(plan.run_one)
                    slave.ready(plan.facts())
                    if dispatcher.debug > 1:
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
                dispatcher._post = None
                slave.close()
                opened.close()
                self._claim.release()
                if not slave.parted and channel.connection is not None:
                    channel.connection.close()  # the process may live on, and the master is not to wait for its goodbye
                # A slave that was drained, without a supervisor, waits in MPI_Finalize until the master ends the run by MPI_Abort:
                # the launcher would end the master too if this rank went first.
                if slave.failed and (supervisor.is_there() or not slave.drained):
                    ending.failed("ranks of the run failed")
            if slave.drained:
                ending.drained()
                raise Unfinished("the master says so")
        finally:
            with channel.limited(dispatcher.job_timeout_s):
                dispatcher.on_shutdown()

    # ---- shared data -------------------------------------------------------------------------------------------------

    def _set_shared(self, value: Any) -> None:
        vars(self._dispatcher)["shared"] = value

    def _share_alone(self, plan: Plan) -> None:
        if plan.shared is not None:
            self._set_shared(plan.shared())

    def _share(self, plan: Plan, master: Any, holder: sharing.Holder) -> None:
        """Have the slaves get what `shared` returns. The master has the same copy as those of its host."""
        assert plan.shared is not None
        memory, size = holder.pack(plan.shared(), plan.payload_limit)
        self._set_shared(memory.value())
        master.share(memory.data, size, memory.address)

    # ---- what a run is made with -------------------------------------------------------------------------------------

    @property
    def _is_outer(self) -> bool:
        """Whether this is no run in a hook or a job of another one: what the environment says is for that one."""
        return self._asked is not None

    def _history(self) -> History:
        is_wanted = self._is_outer or self._dispatcher._names_history
        return History(self._dispatcher.history_path if is_wanted else "")

    def _journal(self, plan: Plan) -> contextlib.AbstractContextManager[Any]:
        """Open the journal, if there is to be one."""
        if self._journal_path is None:
            return contextlib.nullcontext()
        plan.journal = Journal(self._journal_path, plan, self._dispatcher)
        return plan.journal

    def _progress(self) -> contextlib.AbstractContextManager[Progress | None]:
        """What shows how far the run is, if that is wanted."""
        dispatcher, option = self._dispatcher, self._dispatcher._progress
        if option is False or not (self._is_outer or dispatcher._names_progress):
            return contextlib.nullcontext()
        return Progress(lambda: dispatcher.job_count if option is True else option)

    def _make_drain(self, plan: Plan) -> Drain:
        """Return what decides when nothing more goes out."""
        left = allocation.left_of(self._dispatcher.walltime, os.environ)
        walltime = None if left is None else Walltime(left, self._dispatcher.walltime_margin_s)
        self._drain = Drain(plan.grain, plan.credit, walltime)
        return self._drain

    def _unfinished(self, plan: Plan, ended: int, put_back: int, cut_off: int) -> Unfinished:
        assert self._drain is not None
        held = 0 if plan.order is None else plan.order.held  # they came in, but no hook has had them
        error = Unfinished(self._drain.reason, ended - held, put_back + held, cut_off)
        print(f"jd_hpc: {error}; exit code {error.code}", file=sys.stderr, flush=True)
        ending.drained()
        return error

    def _facts(self, slaves: int, **facts: Any) -> dict[str, Any]:
        """Return what the first line of a history tells of this run."""
        from jd_hpc import __version__

        options = {name: getattr(self._dispatcher, name) for name in OPTIONS} | {"seed": self._dispatcher._seed}
        return {"version": __version__, "class": type(self._dispatcher).__qualname__, "slaves": slaves, **facts, "options": options}

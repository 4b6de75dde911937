"""Slaves of several ranks: `MPIMachine(comm, ranks_per_slave=k)`. How ranks make groups, and how a group runs a job together.

The rules it keeps:

- The engine knows groups by their first ranks only, the leaders: these are its slaves. The other ranks, the members, take jobs from
  their leader, on a communicator that nobody else uses.
- Nothing here blocks: every wait looks out for the master's word to stop, with growing pauses.
- A job has ended when every rank of the group has come out of it. So no rank can be a job ahead of another one.
- A rank that failed may leave others waiting for it in MPI, for ever. They get some time to come out; then the group is given up.
- Every message says of which run and of which job it is: what an earlier one has left is dropped.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

from jd_hpc._batch import Buffer, Evaluator
from jd_hpc.attached import Attached
from jd_hpc.errors import Failure, GroupError

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from jd_hpc.plan import Plan

TAG_HERE, TAG_JOB, TAG_OUTCOME, TAG_OVER = 1, 2, 3, 4
YIELDS = 200
"""A rank that waits looks so many times before it begins to sleep ..."""
SLEEP_FIRST_S, SLEEP_MOST_S = 2e-6, 1e-3
"""... for so long."""

Place = tuple[int, int]


def count_groups(size: int, ranks_per_slave: int, leave_rest_idle: bool) -> int:
    """Return how many groups so many ranks make, the master not counted.

    Raises
    ------
    GroupError
        If ranks would be left, and are not to be.
    """
    count, rest = divmod(size - 1, ranks_per_slave)
    if rest and not leave_rest_idle:
        raise GroupError(
            f"{size} ranks are a master and {size - 1} others; these make {count} groups of {ranks_per_slave} and leave {rest}. "
            f"Cure: start {1 + count * ranks_per_slave} or {1 + (count + 1) * ranks_per_slave} ranks, or leave_rest_idle=True"
        )
    return count


def arrange(hosts: Sequence[str], ranks_per_slave: int) -> list[list[int]]:
    """Return the ranks of each group, given every rank's host; rank 0 is the master. Groups lie on one host where that can be."""
    on_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        if rank:
            on_host.setdefault(host, []).append(rank)
    groups, rest = [], []
    for ranks in on_host.values():
        whole = len(ranks) // ranks_per_slave * ranks_per_slave
        groups += [ranks[at : at + ranks_per_slave] for at in range(0, whole, ranks_per_slave)]
        rest += ranks[whole:]
    return groups + [
        rest[at : at + ranks_per_slave] for at in range(0, len(rest) - ranks_per_slave + 1, ranks_per_slave)
    ]  # fmt: skip


def check(plan: Plan) -> None:
    """Refuse what a group cannot do; and let it hold one job at a time.

    Raises
    ------
    GroupError
        With the cure.
    """
    for wrong, what in (
        (plan.isolate, "isolate=True: the jobs' process is no rank of MPI. Cure: isolate=False"),
        (plan.kernel is not None, "a compiled kernel: it knows no communicator. Cure: call it in process_job"),
        (plan.process_jobs is not None, "process_jobs. Cure: process_job, which all ranks of the group call with the same job"),
        (plan.grain > 1, "a grain of more than 1: its ranks run one job at a time. Cure: grain=1"),
    ):
        if wrong:
            raise GroupError(f"ranks_per_slave does not go together with {what}")
    plan.credit = 1


class Groups:
    """The groups of a communicator, and this rank's part. Made by all its ranks at the same time.

    Attributes
    ----------
    engine : mpi4py.MPI.Intracomm
        All ranks, in the engine's order: the master, the leaders, the members, those that are idle.
    groups : list of list of int
        The ranks of each group, by the user's communicator.
    hosts : dict of str to list of int
        Host name → ranks of the user's communicator.
    comm : mpi4py.MPI.Intracomm or None
        This rank's group; None: it is in none.
    """

    def __init__(self, comm: Intracomm, ranks_per_slave: int) -> None:
        from mpi4py import MPI

        names = comm.allgather(MPI.Get_processor_name())
        self.hosts: dict[str, list[int]] = {}
        for rank, host in enumerate(names):
            self.hosts.setdefault(host, []).append(rank)
        self.groups = arrange(names, ranks_per_slave)
        order = [0, *(ranks[0] for ranks in self.groups), *(rank for ranks in self.groups for rank in ranks[1:])]
        order += sorted(set(range(len(names))) - set(order))
        self._engine_rank = {rank: at for at, rank in enumerate(order)}
        places = {rank: (at, ranks.index(rank)) for at, ranks in enumerate(self.groups) for rank in ranks}
        self.place: Place | None = places.get(comm.Get_rank())
        color, key = self.place or (MPI.UNDEFINED, 0)
        self.engine = cast("Intracomm", comm.Split(0, self._engine_rank[comm.Get_rank()]))
        mine = cast("Intracomm", comm.Split(color, key))
        self.comm = None if self.place is None else mine
        self.private = None if self.place is None else mine.Dup()

    def fellows(self, group_count: int) -> dict[int, list[int]]:
        """Return for every rank of the first groups the ranks of its group, the leader first: by the engine's numbers."""
        numbers = [[self._engine_rank[rank] for rank in ranks] for ranks in self.groups[:group_count]]
        return {rank: ranks for ranks in numbers for rank in ranks}

    @classmethod
    def of(cls, comm: Intracomm, ranks_per_slave: int) -> Groups:
        """Return the groups of `comm`; the first call is collective. They live as long as it does."""
        known = _attached.of(comm, dict)
        if ranks_per_slave not in known:
            known[ranks_per_slave] = cls(comm, ranks_per_slave)
        return known[ranks_per_slave]

    def let_go(self) -> None:
        """The user frees the communicator, on all ranks: so do we."""
        for own in (self.engine, self.comm, self.private):
            if own is not None:
                own.Free()


def _let_go_all(known: dict[int, Groups]) -> None:
    for groups in known.values():
        groups.let_go()


_attached = Attached(_let_go_all)


class Link(Protocol):
    """What a rank of a group needs of the core's Slave."""

    run: int

    def look_out(self) -> None:
        """Raise if the master says stop."""

    def tell_broken(self, failure: Failure) -> None:
        """Tell the master that the group cannot go on, and what became of its job."""


class Team:
    """A rank's part of its group, in one run.

    Parameters
    ----------
    groups : Groups
        Where it is.
    link : Slave
        The core's.
    stopped : type of exception
        What `link.look_out` raises when the master says stop.
    patience_s : float
        Once a rank of the group has failed, the others get so long to come out of the job.
    """

    def __init__(self, groups: Groups, link: Link, stopped: type[BaseException], patience_s: float) -> None:
        assert groups.private is not None and groups.place is not None
        self._comm, self._rank = groups.private, groups.place[1]
        self._others = range(1, groups.private.Get_size())
        self._link, self._stopped, self._patience_s = link, stopped, patience_s
        self._turn = 0  # jobs so far
        self._is_broken = False
        self._outcomes: dict[int, Failure | None] = {}
        self._looks, self._pause_s = 0, 0.0

    def begin(self, process_job: Callable[[Any, int], object]) -> None:
        """Leader: wait for the members. Member: run jobs, by their numbers, until the master says stop, which is raised."""
        if self._rank == 0:
            self._assemble()
        else:
            self._follow(process_job)

    # ---- the leader --------------------------------------------------------------------------------------------------

    def _assemble(self) -> None:
        """Leader: wait until all members are in this run."""
        here: set[int] = set()
        while len(here) < len(self._others):
            found = self._receive(TAG_HERE)
            if found is None:
                self._rest(self._link.look_out)
            elif found[1][0] == self._link.run:
                here.add(found[0])

    def run(
        self, inner: Evaluator, jobs: Any, out: Buffer | None, results: list[Any] | None, index: int
    ) -> list[tuple[int, Any]]:
        """Leader: run one job on all ranks of the group; return what failed, as an evaluator does."""
        if self._is_broken:
            raise self._stopped
        self._turn += 1
        try:
            job = pickle.dumps((self._link.run, self._turn, jobs[0], index), 5)
        except Exception as error:
            return [(0, error)]
        self._outcomes = {}
        self._send([(job, TAG_JOB, rank) for rank in self._others])
        failures = inner.evaluate(jobs, 1, out, results, index)
        self._outcomes[0] = Failure.of(failures[0][1]) if failures else None
        self._collect()
        failed = [(rank, failure) for rank, failure in sorted(self._outcomes.items()) if failure is not None]
        if not failed:
            return []
        rank, first = failed[0]
        also = f"; {len(failed) - 1} others failed too" if len(failed) > 1 else ""
        told = first._replace(message=f"{first.message} (rank {rank} of {self._comm.Get_size()} of the group{also})")
        if len(self._outcomes) <= len(self._others):
            self._give_up(told)
            raise self._stopped  # no other answer: the master has this one
        over = pickle.dumps((self._link.run, self._turn, None), 5)
        self._send([(over, TAG_OVER, rank) for rank, _ in failed if rank])
        return [(0, told)]

    def _collect(self) -> None:
        """Wait until all are out of the job. Once one has failed, for a limited time: the others may be waiting for it in MPI."""
        end_s = None
        while len(self._outcomes) <= len(self._others):
            if end_s is None and any(failure is not None for failure in self._outcomes.values()):
                end_s = time.monotonic() + self._patience_s
            found = self._receive(TAG_OUTCOME)
            if found is not None:
                rank, (run, turn, failure) = found
                if (run, turn) == (self._link.run, self._turn):
                    self._outcomes[rank] = failure
            elif end_s is None:
                self._rest(self._link.look_out)
            elif time.monotonic() > end_s:
                return
            else:
                self._rest(self._look_on)  # the master must hear of it before we leave

    # ---- a member ----------------------------------------------------------------------------------------------------

    def _follow(self, process_job: Callable[[Any, int], object]) -> None:
        """Member: run jobs with the leader until the master says stop, which is raised."""
        self._send([(pickle.dumps((self._link.run,), 5), TAG_HERE, 0)])
        while True:
            found = None if self._is_broken else self._receive(TAG_JOB)
            if found is None:
                self._rest(self._link.look_out)
                continue
            run, turn, job, index = found[1]
            if run != self._link.run:
                continue
            failure = None
            try:
                process_job(job, index)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                failure = Failure.of(error)
            del job
            self._send([(pickle.dumps((run, turn, failure), 5), TAG_OUTCOME, 0)])
            if failure is not None:
                self._await_the_others(turn, failure)

    def _await_the_others(self, turn: int, failure: Failure) -> None:
        """After a failure of this rank: if the leader does not come out of the job, the master hears it from here."""
        end_s = time.monotonic() + self._patience_s + 1.0  # where it does, it is the one to say so
        while time.monotonic() < end_s:
            found = self._receive(TAG_OVER)
            if found is not None and found[1][:2] == (self._link.run, turn):
                return
            self._rest(self._look_on)
        where = f"(rank {self._rank} of {self._comm.Get_size()} of the group)"
        self._give_up(failure._replace(message=f"{failure.message} {where}"))

    # ---- both --------------------------------------------------------------------------------------------------------

    def _give_up(self, failure: Failure) -> None:
        self._is_broken = True
        self._link.tell_broken(failure)

    def _lose_touch(self, error: BaseException) -> NoReturn:
        """MPI cannot reach a rank of the group. Mostly it has died: then the master notices, and gives our job to others."""
        self._is_broken = True
        tell_at_s = time.monotonic() + self._patience_s
        while True:
            self._rest(self._link.look_out)
            if time.monotonic() > tell_at_s:
                tell_at_s = math.inf
                self._give_up(Failure.of(error))

    def _look_on(self) -> None:
        """Look out, but stay."""
        with contextlib.suppress(self._stopped):
            self._link.look_out()

    def _send(self, messages: list[tuple[bytes, int, int]]) -> None:
        """Send, and wait until all have gone out: while this rank is in a job nothing of it moves."""
        from mpi4py import MPI

        requests = []
        try:
            requests += [self._comm.Isend([data, MPI.BYTE], rank, tag) for data, tag, rank in messages]
            while not MPI.Request.Testall(requests):
                self._rest(self._link.look_out)
        except BaseException as error:
            _set_aside.append((requests, messages))
            if isinstance(error, MPI.Exception):
                self._lose_touch(error)
            raise

    def _receive(self, tag: int) -> tuple[int, Any] | None:
        """Return a message that came in: from whom, and what."""
        from mpi4py import MPI

        status = MPI.Status()
        request = data = None
        try:
            message = self._comm.Improbe(MPI.ANY_SOURCE, tag, status)
            if message is None:
                return None
            data = bytearray(status.Get_count(MPI.BYTE))
            source = status.Get_source()
            request = message.Irecv([data, MPI.BYTE])
            while not request.Test():
                self._rest(self._link.look_out)
        except BaseException as error:
            _set_aside.append((request, data))
            if isinstance(error, MPI.Exception):
                self._lose_touch(error)
            raise
        self._looks = 0
        return source, pickle.loads(data)

    def _rest(self, look: Callable[[], None]) -> None:
        """Look out, and pause."""
        look()
        self._looks += 1
        if self._looks == 1:
            self._pause_s = SLEEP_FIRST_S
        if self._looks < YIELDS:
            time.sleep(0)
        else:
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, SLEEP_MOST_S)


_set_aside: list[Any] = []
"""Requests and their memory, where a run ended in the middle of a message: MPI may read or write it until the process ends."""


class TeamEvaluator(Evaluator):
    """Runs a leader's batches, which are of one job each, on all ranks of its group."""

    def __init__(self, inner: Evaluator, team: Team) -> None:
        super().__init__(inner.process_job, None, inner.job_rows, inner.result_rows, inner.allow_nan)
        self._inner, self._team = inner, team

    def evaluate(
        self, jobs: Any, count: int, out: Buffer | None, results: list[Any] | None, first: int = 0
    ) -> list[tuple[int, Any]]:
        """Run a batch; the same contract as the base class has."""
        return self._team.run(self._inner, jobs, out, results, first)

    def close(self) -> None:
        """Nothing need be given back."""
        self._inner.close()

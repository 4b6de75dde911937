"""The vm: where the slaves are. Who is master, how many slots, which MPI this is and who launched it is found out here only."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jd_hpc import ending, slurm, supervisor
from jd_hpc.attached import Attached
from jd_hpc.beats import Connection, Listener
from jd_hpc.claims import Claim
from jd_hpc.errors import FamilyError, GroupError, LaunchError, MasterLostError
from jd_hpc.groups import Groups, count_groups

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

logger = logging.getLogger("jd_hpc")

CONNECT_TIMEOUT_S = 10.0
"""How long a slave tries to reach the master's side channel."""
SILENT_AT_THE_END_S = 10.0
"""At the end of the program the master waits for ranks that give signs of life, and so long for one that gives none."""
PART_LOOK_S = 0.002
LEAST_HEARTBEAT_S = 0.02
TAG_NEWS = 2
"""Of `Channel.tell`; wire.py has the other tags."""
HEAR_LEAST_S, HEAR_MOST_S = 1e-5, 0.005
"""The pauses of `Channel.hear`, a tenth of what it has waited: the master may come late, or a rank wait for long."""
FIRST_HEARTBEAT_S = 0.5
"""Before the first run."""

FAMILIES = {"Open MPI": "openmpi", "MPICH": "mpich", "Intel MPI": "mpich", "MVAPICH": "mpich", "Cray MPICH": "mpich"}
"""What mpi4py calls an MPI, and the family whose binary interface it has."""


class LocalMachine:
    """The machine that is this process alone. No MPI is imported.

    Attributes
    ----------
    is_master : bool
        Always True.
    slots : int
        1: the place where jobs run.
    """

    is_master = True
    rank = 0
    size = 1
    slots = 1

    @property
    def group_comm(self) -> Intracomm:
        """COMM_SELF. Only who asks for it imports MPI."""
        from mpi4py import MPI

        return MPI.COMM_SELF

    @property
    def free_slots(self) -> int:
        """1: whoever can ask is not running a job."""
        return 1

    @property
    def hosts(self) -> dict[str, list[int]]:
        """Host name → ranks on it."""
        return {socket.gethostname(): [0]}


class MPIMachine:
    """The ranks of a communicator: rank 0 is the master, the others are slaves.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Every rank of it must make the machine, and call `run()` of the same dispatchers in the same order. Messages of jd_hpc
        travel on a duplicate; the user's own on `comm` are never touched.
    ranks_per_slave : int
        So many ranks make a slave: they run every job together, on a communicator of their own (docs/groups.md).
    leave_rest_idle : bool
        Ranks that make no whole group: idle until the run ends, or an error.

    Raises
    ------
    GroupError
        If ranks are left over, and are not to be left idle.
    LaunchError
        If the ranks were launched as one run but MPI does not see them as one, or `comm` is no intracommunicator.
    FamilyError
        If there is no compiled core for the MPI that mpi4py runs on.

    Attributes
    ----------
    rank, size : int
        Of `comm`.
    is_master : bool
        True on rank 0.
    slaves : int
        How many there are; they are numbered from 1. With `ranks_per_slave` of 1 the number of a slave is its rank.
    slots : int
        Where jobs can run: the slaves, or 1 (the master itself) if there are none.
    """

    def __init__(self, comm: Intracomm, ranks_per_slave: int = 1, *, leave_rest_idle: bool = False) -> None:
        from mpi4py import MPI

        if not isinstance(comm, MPI.Comm) or comm == MPI.COMM_NULL or comm.Is_inter():
            raise LaunchError(f"{comm!r} is no communicator of ranks; pass an intracommunicator such as MPI.COMM_WORLD, or vm=None")
        check_launch(MPI.COMM_WORLD.Get_size(), dict(os.environ))
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.is_master: bool = self.rank == 0
        self.ranks_per_slave = ranks_per_slave
        if not isinstance(ranks_per_slave, int) or ranks_per_slave < 1:
            raise GroupError(f"ranks_per_slave = {ranks_per_slave!r} is out of range: it is a whole number from 1")
        self.slaves: int = count_groups(self.size, ranks_per_slave, leave_rest_idle)
        self.slots: int = max(1, self.slaves)
        self.busy: Callable[[], int] | None = None  # how many slaves run jobs now, while a run is on

    @property
    def free_slots(self) -> int:
        """Slots that run no job now; on a slave, which cannot know, all of them."""
        return self.slots - (self.busy() if self.busy is not None else 0)

    @property
    def hosts(self) -> dict[str, list[int]]:
        """Host name → ranks on it. The first use is collective: every rank must ask, or have run a dispatcher."""
        return self.channel().hosts if self.grouping is None else self.grouping.hosts

    @property
    def grouping(self) -> Groups | None:
        """The groups, if slaves are groups. Collective when it is first asked for."""
        return None if self.ranks_per_slave == 1 or self.size == 1 else Groups.of(self.comm, self.ranks_per_slave)

    @property
    def groups(self) -> list[list[int]]:
        """The ranks of each slave, slave 1 first. The first use is collective, as with `hosts`."""
        return [[rank] for rank in range(1, self.size)] if self.grouping is None else self.grouping.groups

    @property
    def group_comm(self) -> Intracomm:
        """The communicator of this rank's group; COMM_SELF where it is in none."""
        from mpi4py import MPI

        grouping = self.grouping
        return MPI.COMM_SELF if grouping is None or grouping.comm is None else grouping.comm

    def note_departure(self) -> None:
        """Master: the slaves leave the program after the run that they are in; no other one is possible then."""
        _departed.update(self._world_ranks())

    def check_presence(self) -> None:
        """Master: see to it that nobody is waited for who will not come.

        Raises
        ------
        LaunchError
            If slaves have left the program.
        """
        if _departed and self.is_master and not _departed.isdisjoint(self._world_ranks()):
            raise LaunchError(
                "the slaves have left the program, as they do when the master's Pool is closed, or cOS is finalized. Cure: one "
                "Pool for the whole program; or Pool(serve=False), and pool.wait() on the slaves, which then go on; or python -m "
                "jd_hpc.futures script.py"
            )

    def _world_ranks(self) -> list[int]:
        """The slaves' ranks in COMM_WORLD."""
        from mpi4py import MPI

        ranks = MPI.Group.Translate_ranks(self.comm.Get_group(), range(1, self.size), MPI.COMM_WORLD.Get_group())
        return [rank for rank in ranks if rank != MPI.UNDEFINED]

    def claim(self) -> Claim:
        """Begin a run on these ranks: no other one of this process may until the claim is released."""
        from mpi4py import MPI

        return Claim(MPI, MPI._handleof(self.comm))

    def channel(self) -> Channel:
        """Return our own duplicate of the communicator, made when it is first asked for (collective)."""
        return Channel.of(self.comm if self.grouping is None else self.grouping.engine)


class Channel:
    """Our duplicate of a user's communicator; it lives as long as that one does.

    Attributes
    ----------
    comm : mpi4py.MPI.Intracomm
        The duplicate, with errors returned.
    run : int
        Runs started on it so far. Ranks agree on it because they call run() in the same order.
    early : list of (int, bytes)
        Messages that slaves sent for the next run while the master still ended the last one.
    body_turn : ndarray of uint32
        For each rank, how many bodies were sent to it: kept from run to run, so that a body that a failed run left behind is never
        taken for another one.
    listener : Listener or None
        Master: hears the slaves' signs of life (beats.py).
    dead, missing : set of int
        Master: ranks whose process is gone, and ranks that did not leave a run when it ended; these may come back.
    """

    def __init__(self, comm: Intracomm) -> None:
        from mpi4py import MPI

        self.comm = comm.Dup()
        self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        self.run = 0
        self.early: list[tuple[int, bytes]] = []
        self.body_turn = np.zeros(self.comm.Get_size(), "u4")
        self.hosts: dict[str, list[int]] = {}
        for rank, host in enumerate(self.comm.allgather(MPI.Get_processor_name())):
            self.hosts.setdefault(host, []).append(rank)
        self.dead: set[int] = set()
        self.missing: set[int] = set()
        self.listener: Listener | None = None
        self.connection: Connection | None = None
        self._news: list[Any] = []  # sends of `tell` that are not complete: a rank may be gone
        if self.comm.Get_rank() == 0 and len(self.hosts) > 1:
            _warn_of_ucx()
        self._connect()
        self._leave_pmix()
        _channels.add(self)
        supervisor.say_joined()

    def _connect(self) -> None:
        """Open the side channel: collective. Without one a run goes on all the same, but nobody hears who is gone."""
        from mpi4py import MPI

        trouble = ""
        offer = None
        if self.comm.Get_rank() == 0:
            try:
                self.listener = Listener(self.comm.Get_size(), LEAST_HEARTBEAT_S)
                hosts = {host: self.listener.addresses_for(host) for host in self.hosts}
                offer = (hosts, self.listener.token)
            except OSError as error:
                trouble = f"the master cannot listen: {error}"
        offer = self.comm.bcast(offer)
        if offer is not None and self.comm.Get_rank() > 0:
            try:
                addresses, token = offer[0][MPI.Get_processor_name()], offer[1]
                self.connection = Connection.connect(addresses, token, self.comm.Get_rank(), FIRST_HEARTBEAT_S, CONNECT_TIMEOUT_S)
            except OSError as error:
                trouble = f"rank {self.comm.Get_rank()} cannot reach the master: {error}"
        troubles = [text for text in self.comm.allgather(trouble) if text]
        if self.listener is not None:  # all that can have connected, have
            self.listener.poll(time.monotonic())
        if troubles and self.comm.Get_rank() == 0:
            logger.warning("No signs of life from all ranks, so that one that dies may go unnoticed: %s", "; ".join(troubles[:3]))

    def _leave_pmix(self) -> None:
        """Where the user wants it (see slurm.py) no rank's death is to reach Slurm's PMIx: collective."""
        if not slurm.leaves_pmix_early():
            return
        for rank in range(1, self.comm.Get_size()):  # MPI asks PMIx for an address when a rank is first spoken to
            if self.comm.Get_rank() == 0:
                self.comm.send(None, rank)
                self.comm.recv(None, rank)
            elif self.comm.Get_rank() == rank:
                self.comm.recv(None, 0)
                self.comm.send(None, 0)
        self.comm.Barrier()
        if slurm.leave_pmix():
            ending.failed("PMIx was left early, and MPI_Finalize needs it", self._others_gone)

    def beat_every(self, period_s: float) -> Any:
        """Slave: give a sign of life so often; 0: none. Returns what tells whether the master is there, or None."""
        if self.connection is None:
            return None
        self.connection.beat_every(period_s)
        return self.connection if period_s else None

    def limited(self, seconds: float | None) -> contextlib.AbstractContextManager[None]:
        """Context, slave: what takes longer gives no more signs of life until it is over. None: no limit."""
        return contextlib.nullcontext() if self.connection is None else self.connection.limited(seconds)

    def tell(self, value: Any) -> None:
        """Master, before a run: let every rank that is there know something. Nobody is waited for."""
        from mpi4py import MPI

        news = pickle.dumps((self.run, value), 5)
        self._news = [request for request in self._news if not _is_complete(request)]
        for rank in range(1, self.comm.Get_size()):
            if rank not in self.dead:
                with contextlib.suppress(MPI.Exception):  # it is gone, which the run will notice
                    self._news.append(self.comm.Isend([news, MPI.BYTE], rank, TAG_NEWS))

    def hear(self, heartbeat_s: float) -> Any:
        """Slave, before a run: return what the master told.

        Raises
        ------
        MasterLostError
            If the master is gone.
        """
        from mpi4py import MPI

        beat, status = self.beat_every(heartbeat_s), MPI.Status()
        run = -1
        try:
            while run < self.run:  # else it was told before a run that went on without this rank
                begin_s = time.monotonic()
                while not self.comm.Iprobe(0, TAG_NEWS, status):
                    if beat is not None and not beat.alive:
                        raise MasterLostError
                    time.sleep(min(max(0.1 * (time.monotonic() - begin_s), HEAR_LEAST_S), HEAR_MOST_S))
                news = bytearray(status.Get_count(MPI.BYTE))
                self.comm.Recv([news, MPI.BYTE], 0, TAG_NEWS)
                run, value = pickle.loads(news)
        except (MasterLostError, MPI.Exception) as error:
            ending.failed(str(error))
            raise MasterLostError from error
        return value

    def acknowledge(self) -> list[int]:
        """Master: ask MPI which ranks it knows to have failed (ULFM), and have it go on without them."""
        from mpi4py import MPI

        failed = self.comm.Get_failed()
        self.comm.Ack_failed(failed.Get_size())
        return list(MPI.Group.Translate_ranks(failed, None, self.comm.Get_group()))

    def note_failures(self) -> None:
        """Master, after a run: if ranks failed, MPI cannot be finalized when the process ends."""
        ending.failed(f"ranks lost: {sorted(self.dead)}, silent: {sorted(self.missing)}", self._others_gone)

    def part(self) -> None:
        """At the end of the program. A slave says farewell; the master waits for that, so that none dies on it unnoticed."""
        if self.connection is not None:
            self.connection.farewell()
        if self.listener is None:
            return
        while self.listener.connected:
            now = time.monotonic()
            for rank, kind in self.listener.poll(now):
                if kind not in ("left", "connected"):
                    self.dead.add(rank)
            self.missing.update(self.listener.silent(now, SILENT_AT_THE_END_S))
            if self.dead or not set(self.listener.connected) - self.missing:
                break
            time.sleep(PART_LOOK_S)
        if self.dead or self.missing:
            self.note_failures()

    def _others_gone(self) -> bool:
        """Whether every rank that may still be at work has closed its connection."""
        if self.listener is None:
            return True
        self.listener.poll(time.monotonic())
        return not set(self.listener.connected) - self.missing

    @classmethod
    def of(cls, comm: Intracomm) -> Channel:
        """Return the channel of `comm`; the first call on a communicator is collective."""
        return _attached.of(comm, lambda: cls(comm))

    def let_go(self) -> None:
        """The user frees the communicator, on all ranks: so do we."""
        _channels.discard(self)
        if self.connection is not None:
            self.connection.farewell()  # the master may not have read our last message yet
            self.connection.close()
        if self.listener is not None:
            self.listener.close()
        self.comm.Free()

    @property
    def handle(self) -> int:
        """The MPI handle of the duplicate, for the compiled core."""
        from mpi4py import MPI

        return MPI._handleof(self.comm)

    def next_run(self) -> int:
        """Number the next run."""
        self.run += 1
        return self.run


_departed: set[int] = set()
"""Master: the ranks in COMM_WORLD of slaves that no run will find any more."""
_channels: set[Channel] = set()
_attached = Attached(Channel.let_go)


def _is_complete(request: Any) -> bool:
    """Whether a send is over; one to a rank that is gone is."""
    from mpi4py import MPI

    try:
        return bool(request.Test())
    except MPI.Exception:
        return True


def _part() -> None:
    for channel in list(_channels):
        channel.part()


ending.before_end(_part)


def _warn_of_ucx() -> None:
    """Between hosts MPICH 5.0.2's UCX over TCP lost messages that met a receive from any source, with plain mpi4py too."""
    from mpi4py import MPI

    vendor, version = MPI.get_vendor()
    library = MPI.Get_library_version()
    if vendor == "MPICH" and version >= (5,) and "ch4:ucx" in library and os.environ.get("MPIR_CVAR_CH4_NETMOD") != "ofi":
        cure = "export MPIR_CVAR_CH4_NETMOD=ofi" if "ofi" in library else "an MPICH that is built with ch4:ofi"
        logger.warning("MPICH's UCX may lose messages between hosts, and a run then hangs. Cure, before the launch: %s", cure)


def as_machine(vm: Any) -> LocalMachine | MPIMachine:
    """Return the machine for what a user passed as `vm`: None, a machine, or a communicator."""
    if vm is None:
        return LocalMachine()
    machine = vm if isinstance(vm, (LocalMachine, MPIMachine)) else MPIMachine(vm)
    if isinstance(machine, MPIMachine):
        machine.check_presence()
    return machine


def check_launch(world_size: int, environ: dict[str, str]) -> None:
    """Refuse silent singletons: several processes were launched, and each one's MPI believes to be alone.

    Raises
    ------
    LaunchError
        With the cure for the launcher that was used.
    """
    if world_size > 1:
        return
    by_openmpi, by_mpich = environ.get("OMPI_COMM_WORLD_SIZE", "0"), environ.get("PMI_SIZE", "0")
    by_slurm = environ.get("SLURM_STEP_NUM_TASKS", "0") if by_openmpi == by_mpich == "0" else "0"  # srun may start an mpiexec
    if int(by_openmpi) > 1:
        cause = "Open MPI's mpiexec, or srun --mpi=pmix, started a program of another MPI"
    elif int(by_mpich) > 1:
        cause = "MPICH's mpiexec, or srun --mpi=pmi2, started a program of another MPI"
    elif int(by_slurm) > 1:
        cause = "srun was not told which MPI this is: it is srun --mpi=pmi2 for MPICH and srun --mpi=pmix for Open MPI"
    else:
        return
    if int(by_slurm) > 1:
        cure = 'srun --mpi=pmi2 or --mpi=pmix, as said; or before srun: eval "$(jd-hpc slurm env)", which finds out which'
    else:
        cure = (
            "use the launcher that belongs to the MPI of mpi4py; for an MPI from PyPI that is the mpiexec in the same "
            "environment's bin folder"
        )
    raise LaunchError(
        f"{max(by_openmpi, by_mpich, by_slurm, key=int)} processes were launched, but MPI sees only this one: each would do all "
        f"the work. Cause: {cause}. Cure: {cure}."
    )


def load_core() -> Any:
    """Import the compiled core that fits the MPI of mpi4py.

    mpi4py.MPI must come first: it loads the MPI library, which the core then finds loaded.

    Raises
    ------
    FamilyError
        If there is none, with the cure.
    """
    from mpi4py import MPI

    family = FAMILIES.get(MPI.get_vendor()[0], "mpich")
    try:
        return importlib.import_module(f"jd_hpc._core_{family}")
    except ImportError as error:
        raise FamilyError(
            f"mpi4py runs on {mpi_name()} (family {family}), but jd_hpc has {_cores()} in this "
            f"environment ({error}). Cure: build jd_hpc with that MPI's mpicc, "
            f"MPICC=/path/to/mpicc pip install --force-reinstall --no-deps --no-cache-dir jd_hpc; "
            f"or use the environment of the other family: one environment holds one MPI."
        ) from error


def mpi_name() -> str:
    """Return the name and version of mpi4py's MPI, such as "Open MPI 5.0.11"."""
    from mpi4py import MPI

    vendor, version = MPI.get_vendor()
    return f"{vendor} {'.'.join(map(str, version))}"


def _cores() -> str:
    found = sorted({path.name.split(".")[0].removeprefix("_core_") for path in Path(__file__).parent.glob("_core_*")})
    return f"a compiled core only for {' and '.join(found)}" if found else "no compiled core"

"""jd_hpc: a job dispatcher for many independent jobs and an MPI allocation."""

from jd_hpc.arrays import map_array
from jd_hpc.dispatcher import JobDispatcher
from jd_hpc.errors import (
    FamilyError,
    GroupError,
    HistoryError,
    IsolationError,
    JdError,
    JobError,
    JournalError,
    JournalFormatError,
    JournalHeldError,
    JournalMismatchError,
    JournalWriteError,
    KernelError,
    LaunchError,
    MasterLostError,
    MPIError,
    NestedRunError,
    PayloadError,
    ProcessDiedError,
    ProtocolError,
    RanksDisagreeError,
    SlaveError,
    SlavesLostError,
    ThreadLevelError,
    Unfinished,
    WalltimeError,
)
from jd_hpc.executor import Executor
from jd_hpc.machine import LocalMachine, MPIMachine

__version__ = "0.1.0"

__all__ = [
    "Executor",
    "FamilyError",
    "GroupError",
    "HistoryError",
    "IsolationError",
    "JdError",
    "JobDispatcher",
    "JobError",
    "JournalError",
    "JournalFormatError",
    "JournalHeldError",
    "JournalMismatchError",
    "JournalWriteError",
    "KernelError",
    "LaunchError",
    "LocalMachine",
    "MPIError",
    "MPIMachine",
    "MasterLostError",
    "NestedRunError",
    "PayloadError",
    "ProcessDiedError",
    "ProtocolError",
    "RanksDisagreeError",
    "SlaveError",
    "SlavesLostError",
    "ThreadLevelError",
    "Unfinished",
    "WalltimeError",
    "__version__",
    "map_array",
]

"""jd_hpc: a job dispatcher for many independent jobs and an MPI allocation."""

from jd_hpc.dispatcher import JobDispatcher
from jd_hpc.errors import (
    FamilyError,
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
    PayloadError,
    ProcessDiedError,
    ProtocolError,
    RanksDisagreeError,
    SlaveError,
    SlavesLostError,
    Unfinished,
    WalltimeError,
)
from jd_hpc.executor import Executor
from jd_hpc.machine import LocalMachine, MPIMachine
from jd_hpc.pool import Pool, register_parallel_backend

__version__ = "0.1.0"

__all__ = [
    "Executor",
    "FamilyError",
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
    "PayloadError",
    "Pool",
    "ProcessDiedError",
    "ProtocolError",
    "RanksDisagreeError",
    "SlaveError",
    "SlavesLostError",
    "Unfinished",
    "WalltimeError",
    "__version__",
    "register_parallel_backend",
]

"""jd_hpc: a job dispatcher for many independent jobs and an MPI allocation."""

from jd_hpc.dispatcher import JobDispatcher
from jd_hpc.errors import (
    FamilyError,
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
)
from jd_hpc.machine import LocalMachine, MPIMachine

__version__ = "0.1.0"

__all__ = [
    "FamilyError",
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
    "ProcessDiedError",
    "ProtocolError",
    "RanksDisagreeError",
    "SlaveError",
    "SlavesLostError",
    "__version__",
]

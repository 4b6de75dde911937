"""Every error that jd_hpc raises. Each message names the cause and the cure."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class JdError(Exception):
    """Base of all errors of this package."""


class PayloadError(JdError, ValueError):
    """A job or a result that cannot travel: wrong dtype, wrong shape, illegal NaN, too large, not picklable."""


class CallError(PayloadError):
    """What was given as a job is no call, `(callable, args, kwargs)`, or its callable cannot travel."""


class CollectorError(JdError, RuntimeError):
    """What was given as a collector is no coroutine, or it ended before the jobs did."""


class KernelError(JdError, ValueError):
    """What was given as a compiled kernel is none, or the kernel returned a number other than 0."""


class LaunchError(JdError, RuntimeError):
    """The ranks were not started as one MPI run."""


class NestedRunError(JdError, RuntimeError):
    """run() on a communicator that is in a run already, or in a process that was forked from a rank."""


class ThreadLevelError(JdError, RuntimeError):
    """run() from a thread that must not call MPI."""


class GroupError(JdError, ValueError):
    """Slaves of several ranks (`ranks_per_slave`) that cannot be made, or cannot do what the dispatcher asks."""


class FamilyError(JdError, ImportError):
    """No compiled core for the MPI that mpi4py runs on."""


class RanksDisagreeError(JdError, RuntimeError):
    """Master and slave run different versions, dispatchers or options."""


class WalltimeError(JdError, ValueError):
    """What was given as the walltime is none."""


class Unfinished(SystemExit):
    """The run was drained before all its jobs ended: the allocation ends, or a signal asked for it. Raised by `run()` on all ranks.

    It is a SystemExit: a script that does not catch it leaves with exit code 85, without a traceback. Results that came in before
    were given to `process_result` as ever. No job was charged with an attempt for it.

    Attributes
    ----------
    reason : str
        Why, such as "SIGUSR2 at rank 2".
    ended, put_back, cut_off : int
        On the master: jobs that ended; that `next_job` had returned but no slave has now; that were still with a slave at the
        end. On slaves 0.
    """

    CODE = 85

    def __init__(self, reason: str, ended: int = 0, put_back: int = 0, cut_off: int = 0) -> None:
        super().__init__(self.CODE)
        self.reason, self.ended, self.put_back, self.cut_off = reason, ended, put_back, cut_off

    def __str__(self) -> str:
        cut_off = f", {self.cut_off} were cut off" if self.cut_off else ""
        return f"drained ({self.reason}): {self.ended} jobs ended, {self.put_back} were put back{cut_off}"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.reason, self.ended, self.put_back, self.cut_off)


class ProtocolError(JdError, RuntimeError):
    """A message, or an event, that cannot be."""


class ProcessDiedError(JdError):
    """The process that ran the job died, or had to be killed.

    Parameters
    ----------
    how : str
        What became of it: "killed by SIGSEGV", "left with exit code 3", "ran longer than job_timeout_s = 5",
        "over memory_limit = 100000000 bytes".
    """

    def __init__(self, how: str) -> None:
        super().__init__(how)  # nothing else, so that it survives pickling
        self.how = how

    def __str__(self) -> str:
        return f"the process that ran the job died: {self.how}"


class IsolationError(JdError, RuntimeError):
    """The process that is to run the jobs cannot be started."""


class MasterLostError(JdError, RuntimeError):
    """The master is gone: nobody is left to run jobs for."""

    def __init__(self) -> None:
        super().__init__("the master is gone: its connection ended. What it wrote before it died says why")


class HistoryError(JdError, RuntimeError):
    """A history that cannot be written, or a file that is none."""


class SlavesLostError(JdError, RuntimeError):
    """Too few slaves are left, and the master must not do their work (``local_fallback=False``)."""

    def __init__(self, lost: int, suspected: int) -> None:
        super().__init__(lost, suspected)

    def __str__(self) -> str:
        lost, suspected = self.args
        return f"too few slaves are left: {lost} were lost, {suspected} do not answer; local_fallback=True lets the master go on"


class MPIError(JdError, RuntimeError):
    """An MPI call failed; the message is the one of MPI."""


class BeatError(JdError, OSError):
    """The connection by which the master knows that a slave is alive cannot be opened."""


class ChaosError(JdError):
    """Raised on demand (see `jd_hpc.chaos`)."""

    def __init__(self) -> None:
        super().__init__("an exception on demand, from jd_hpc.chaos: nothing else is wrong")


class MessageError(JdError, RuntimeError):
    """A message of your own that cannot be sent, or that nobody handles."""


class ProgressError(JdError, ImportError):
    """A progress bar is wanted, and what draws it is not installed."""


class JournalError(JdError, RuntimeError):
    """Base of the errors about the journal of a run."""


class JournalHeldError(JournalError):
    """Another process writes this journal, or has taken it over."""


class JournalMismatchError(JournalError):
    """The journal belongs to another set of jobs."""


class JournalFormatError(JournalError):
    """The file is no journal, one of a newer version, or damaged."""


class JournalWriteError(JournalError):
    """The journal cannot be opened or written: no folder, no right, no room."""


REPORT_PART_BYTES = 1 << 20
"""A report of a failure is cut where it is longer: it must reach the master whatever the exception carries."""


def _shortened(text: str) -> str:
    if len(text) <= REPORT_PART_BYTES:
        return text
    half = REPORT_PART_BYTES // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


class Failure(NamedTuple):
    """What a slave tells the master about an exception; travels pickled."""

    type_name: str
    message: str
    traceback: str
    pickled: bytes | None
    died: str | None = None
    """How the process ended that ran the job, if that is what became of it: then the job may have another try."""

    @classmethod
    def of(cls, error: BaseException | Failure) -> Failure:
        """Describe an exception that was caught. The exception itself comes along if it survives pickling.

        A description made elsewhere stays what it is.
        """
        if isinstance(error, Failure):
            return error
        try:
            text = str(error)
        except Exception:
            text = "<an exception whose str() raised>"
        try:
            lines = "".join(traceback.format_exception(error))
        except Exception:
            lines = f"{type(error).__qualname__} (its traceback cannot be formatted)\n"
        pickled: bytes | None
        try:
            pickled = pickle.dumps(error, 5)
            pickle.loads(pickled)
        except BaseException:
            pickled = None
        if pickled is not None and len(pickled) > REPORT_PART_BYTES:
            pickled = None
        died = error.how if isinstance(error, ProcessDiedError) else None
        return cls(type(error).__qualname__, _shortened(text), _shortened(lines), pickled, died)

    @classmethod
    def of_all(cls, failures: Iterable[tuple[int, BaseException | Failure]]) -> dict[int, Failure]:
        """Describe the failures of a batch, given as (offset, exception); one that failed many jobs is described once."""
        reports: dict[int, Failure] = {}
        told = {}
        for at, error in failures:
            if id(error) not in reports:
                reports[id(error)] = cls.of(error)
            told[at] = reports[id(error)]
        return told

    def exception(self) -> BaseException | None:
        """Return the original exception, or None if it cannot be had here."""
        if self.pickled is None:
            return None
        try:
            error = pickle.loads(self.pickled)
        except BaseException:
            return None
        return error if isinstance(error, BaseException) else None


class RemoteError(JdError):
    """An error with the traceback of the rank it happened on.

    Attributes
    ----------
    type_name : str
        Name of the exception's type there.
    message : str
        What `str()` of it said there.
    remote_traceback : str
        The traceback, as text. The original exception is `__cause__`, where it could be pickled.
    """

    def __init__(self, text: str, failure: Failure) -> None:
        super().__init__(text)
        self.type_name = failure.type_name
        self.message = failure.message
        self.remote_traceback = failure.traceback
        self.__cause__ = failure.exception()

    def __str__(self) -> str:
        return f"{self.args[0]}\n\nTraceback there:\n{self.remote_traceback}"

    def __reduce__(self) -> tuple[object, ...]:
        failure = Failure(self.type_name, self.message, self.remote_traceback, None)
        return _rebuild, (type(self), self.args[0], failure, self.__dict__)


def _rebuild(kind: type[RemoteError], text: str, failure: Failure, state: dict[str, object]) -> RemoteError:
    error = kind.__new__(kind)
    RemoteError.__init__(error, text, failure)
    error.__dict__.update(state)
    return error


class JobError(RemoteError):
    """A job failed.

    Attributes
    ----------
    index : int
        The job's number.
    slave : int
        The rank that ran it; 0 is the master.
    type_name, message, remote_traceback : str
        Of the exception there: its type's name, what `str()` of it says, its traceback. The exception itself is `__cause__`, where
        it could be pickled.
    attempts : list of (int, str)
        For a job whose slaves failed, or whose processes died: which slave, and how it ended, for every attempt.
    died : str or None
        How the process ended that ran it last, if that is why it failed.
    """

    def __init__(self, index: int, slave: int, failure: Failure, attempts: Sequence[tuple[int, str]] = ()) -> None:
        where = f"slave {slave}" if slave else "the master"
        text = f"job {index} failed on {where}: {failure.type_name}: {failure.message}"
        if attempts:
            told = "; ".join(f"slave {slave}: {how}" for slave, how in attempts)
            text = f"job {index} was given up after {len(attempts)} attempt{'s' * (len(attempts) > 1)} ({told})"
        super().__init__(text, failure)
        self.index = index
        self.slave = slave
        self.attempts = list(attempts)
        self.died = failure.died


class SlaveError(RemoteError):
    """A slave could not take part in the run, outside any job.

    Attributes
    ----------
    slave : int
        Its rank.
    type_name, message, remote_traceback : str
        As in `JobError`.
    """

    def __init__(self, slave: int, failure: Failure) -> None:
        super().__init__(f"slave {slave} failed outside a job: {failure.type_name}: {failure.message}", failure)
        self.slave = slave

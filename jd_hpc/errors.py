"""Every error that jd_hpc raises. Each message names the cause and the cure."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterable
from typing import NamedTuple


class JdError(Exception):
    """Base of all errors of this package."""


class PayloadError(JdError, ValueError):
    """A job or a result that cannot travel: wrong dtype, wrong shape, illegal NaN, too large, not picklable."""


class KernelError(JdError, ValueError):
    """What was given as a compiled kernel is none, or the kernel returned a number other than 0."""


class LaunchError(JdError, RuntimeError):
    """The ranks were not started as one MPI run."""


class FamilyError(JdError, ImportError):
    """No compiled core for the MPI that mpi4py runs on."""


class RanksDisagreeError(JdError, RuntimeError):
    """Master and slave run different versions, dispatchers or options."""


class ProtocolError(JdError, RuntimeError):
    """A message, or an event, that cannot be."""


class MPIError(JdError, RuntimeError):
    """An MPI call failed; the message is the one of MPI."""


class BeatError(JdError, OSError):
    """The connection by which the master knows that a slave is alive cannot be opened."""


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

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe an exception that was caught. The exception itself comes along if it survives pickling."""
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
        return cls(type(error).__qualname__, _shortened(text), _shortened(lines), pickled)

    @classmethod
    def of_all(cls, failures: Iterable[tuple[int, BaseException]]) -> dict[int, Failure]:
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
    """

    def __init__(self, index: int, slave: int, failure: Failure) -> None:
        where = f"slave {slave}" if slave else "the master"
        super().__init__(f"job {index} failed on {where}: {failure.type_name}: {failure.message}", failure)
        self.index = index
        self.slave = slave


class SlaveError(RemoteError):
    """A slave could not take part in the run, outside any job.

    Attributes
    ----------
    slave : int
        Its rank.
    """

    def __init__(self, slave: int, failure: Failure) -> None:
        super().__init__(f"slave {slave} failed outside a job: {failure.type_name}: {failure.message}", failure)
        self.slave = slave

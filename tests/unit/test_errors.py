"""Errors travel from a slave to the master with all that is known of them."""

from __future__ import annotations

import pickle
import threading
from typing import ClassVar

import pytest

from jd_hpc.errors import Failure, JobError, KernelError, PayloadError, RemoteError, SlaveError


def caught(error):
    """The exception with a traceback."""
    try:
        raise error
    except BaseException as caught_error:
        return caught_error


def test_failure_of_an_exception():
    failure = Failure.of(caught(KeyError("no such thing")))
    assert failure.type_name == "KeyError"
    assert failure.message == "'no such thing'"
    assert "in caught" in failure.traceback
    assert failure.traceback.rstrip().endswith("KeyError: 'no such thing'")
    again = pickle.loads(pickle.dumps(failure))
    assert again == failure
    assert isinstance(again.exception(), KeyError)
    assert again.exception().args == ("no such thing",)


def test_failure_shows_the_chain_of_causes():
    try:
        try:
            raise ValueError("the cause")
        except ValueError as cause:
            raise RuntimeError("the effect") from cause
    except RuntimeError as error:
        text = Failure.of(error).traceback
    assert text.index("the cause") < text.index("the effect")


class NeedsTwo(Exception):
    """Pickles, but cannot be rebuilt: its __init__ wants more than its args."""

    def __init__(self, one, two):
        super().__init__(one)


class HasALock(Exception):
    def __init__(self):
        super().__init__("has a lock")
        self.lock = threading.Lock()


class CannotBeSaid(Exception):
    def __str__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize("error", [NeedsTwo("one", 2), HasALock(), type("Local", (Exception,), {})("text")])
def test_failure_of_an_exception_that_cannot_travel(error):
    failure = Failure.of(caught(error))
    assert failure.pickled is None
    assert failure.exception() is None
    assert failure.message == str(error)
    assert failure.type_name == type(error).__qualname__
    assert "in caught" in failure.traceback
    pickle.dumps(failure)


def test_failure_of_an_exception_whose_str_raises():
    failure = Failure.of(caught(CannotBeSaid()))
    assert failure.type_name == "CannotBeSaid"
    assert failure.message == "<an exception whose str() raised>"
    assert "CannotBeSaid" in failure.traceback


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), ExceptionGroup("some", [ValueError(1)])])
def test_failure_of_unusual_exceptions(error):
    assert type(Failure.of(caught(error)).exception()) is type(error)


@pytest.mark.parametrize("pickled", [b"", b"garbage", pickle.dumps("no exception")])
def test_failure_with_a_pickle_that_is_no_exception(pickled):
    assert Failure("X", "", "", pickled).exception() is None


FAILURE = Failure.of(caught(ZeroDivisionError("by nought")))


class OwnError(JobError):
    """A user's own."""

    extra: ClassVar[str] = "kept"


@pytest.mark.parametrize(
    "error",
    [RemoteError("it failed", FAILURE), JobError(7, 3, FAILURE), SlaveError(4, FAILURE), OwnError(1, 2, FAILURE)],
)
def test_remote_errors_survive_pickling(error):
    error.add_note("a note")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert again.__notes__ == ["a note"]
    assert (again.type_name, again.message) == ("ZeroDivisionError", "by nought")


def test_job_error_says_who_and_what():
    error = JobError(7, 3, FAILURE)
    assert (error.index, error.slave) == (7, 3)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert str(error).startswith(
        "job 7 failed on slave 3: ZeroDivisionError: by nought\n\nTraceback there:\nTraceback (most"
    )
    assert "in caught" in error.remote_traceback
    assert str(JobError(7, 0, FAILURE)).startswith("job 7 failed on the master: ")
    assert str(SlaveError(4, FAILURE)).startswith("slave 4 failed outside a job: ZeroDivisionError: by nought")


def test_errors_can_be_caught_by_their_usual_kind():
    for kind in (PayloadError, KernelError):
        assert issubclass(kind, ValueError)

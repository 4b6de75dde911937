"""map_array on real ranks: the right results in the right places, whatever the rows, and errors that leave nobody waiting."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from mpi_helpers import Outcome, check_healthy, expect_no_error, portable, same

from jd_hpc import JobError, KernelError, LaunchError, MPIMachine, PayloadError, map_array
from jd_hpc.streams import stream

pytestmark = pytest.mark.mpi


@pytest.fixture
def folder(comm):
    path = comm.bcast(tempfile.mkdtemp(prefix="jd_hpc_map_array") if comm.rank == 0 else None)
    yield Path(path)
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path)


def outcomes_of(comm, function, rows, result_dtype="f8", **options):
    """What every rank got, on every rank. Only the master has the rows."""
    try:
        outcome = Outcome(map_array(function, rows if comm.rank == 0 else None, result_dtype, vm=comm, **options), None)
    except Exception as error:
        outcome = Outcome(None, portable(error))
    return comm.allgather(outcome)


def array_of(comm, *args, **options):
    """The master's array; slaves get None."""
    outcomes = outcomes_of(comm, *args, **options)
    expect_no_error(outcomes)
    assert all(outcome.value is None for outcome in outcomes[1:])
    return outcomes[0].value


def error_of(comm, *args, **options):
    """What the master raised; slaves leave quietly."""
    outcomes = outcomes_of(comm, *args, **options)
    expect_no_error(outcomes[1:])
    assert outcomes[0].error is not None, outcomes[0].value
    check_healthy(comm)
    return outcomes[0].error


def squared(row):
    return row * row


def summed(row):
    return row.sum()


RECORD = np.dtype([("x", "f8"), ("n", "i4")])
CASES = {
    "numbers": (squared, np.arange(1000.0), "f8", np.arange(1000.0) ** 2),
    "integers": (squared, np.arange(-50, 50, dtype="i2"), "i8", np.arange(-50, 50) ** 2),
    "rows": (summed, np.arange(600.0).reshape(200, 3), "f8", np.arange(600.0).reshape(200, 3).sum(1)),
    "rows to rows": (lambda row: 2 * row, np.arange(600.0).reshape(200, 3), ("f8", 3), np.arange(0, 1200.0, 2).reshape(200, 3)),
    "large rows": (summed, np.ones((9, 40_000)), "f8", np.full(9, 40_000.0)),
    "large results": (lambda x: np.full(40_000, x), np.arange(9.0), ("f8", 40_000), np.arange(9.0)[:, None].repeat(40_000, 1)),
    "records": (
        lambda r: (r["x"] * r["n"], r["n"]),
        np.array([(0.5, i) for i in range(99)], RECORD),
        RECORD,
        np.array([(0.5 * i, i) for i in range(99)], RECORD),
    ),
    "a list": (squared, [1, 2, 3], "f8", np.array([1.0, 4.0, 9.0])),
    "no rows": (squared, np.zeros((0, 3)), ("f8", 3), np.zeros((0, 3))),
    "one row": (squared, np.array([3.0]), "f8", np.array([9.0])),
    "a view with gaps": (squared, np.arange(100.0)[::-3], "f8", np.arange(100.0)[::-3] ** 2),
    "swapped bytes": (squared, np.arange(100.0).astype(">f8"), "f8", np.arange(100.0) ** 2),
    "complex": (squared, np.arange(10) * 1j, "c16", (np.arange(10) * 1j) ** 2),
}


@pytest.mark.parametrize("options", [{}, {"grain": 7}, {"grain": 7, "isolate": True}], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_results_are_in_the_order_of_the_rows(comm, case, options):
    function, rows, result_dtype, expected = CASES[case]
    found = array_of(comm, function, rows, result_dtype, **options)
    assert same(found, expected)


@pytest.mark.parametrize("grain", [None, 1, 64])
def test_a_function_of_a_block(comm, grain):
    rows = np.arange(3000.0).reshape(1000, 3)
    found = array_of(comm, lambda block: block.sum(1), rows, grain=grain, vectorized=True)
    assert same(found, rows.sum(1))


@pytest.mark.parametrize("grain", [None, 1, 1000])
def test_a_kernel(comm, kernels, grain):
    rows = np.linspace(0, 9, 30_000)
    assert same(array_of(comm, kernels.square, rows, grain=grain), rows**2)
    # a LowLevelCallable or a pair brings user data
    more = ctypes.c_double(0.5)
    assert same(array_of(comm, (kernels.square, ctypes.pointer(more)), rows[::2], grain=grain), rows[::2] ** 2 + 0.5)


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("grain", [None, 3])
def test_streams(comm, grain, vectorized):
    def draw(row, rng):
        return row + rng.random(2)

    def draw_all(rows, rngs):
        return np.array([draw(row, rng) for row, rng in zip(rows, rngs, strict=True)])

    found = array_of(
        comm, draw_all if vectorized else draw, np.arange(50.0), ("f8", 2), rng=True, seed=4, grain=grain, vectorized=vectorized
    )
    assert same(found, np.array([index + stream(4, index).random(2) for index in range(50)]))


def test_a_machine_and_options(comm, folder):
    machine = MPIMachine(comm)
    rows = np.arange(100.0)
    for _ in range(2):
        options = {"max_slaves": 2, "ordered": True, "journal": folder / "a.journal"}
        found = map_array(squared, rows if comm.rank == 0 else None, "f8", vm=machine, **options)
        assert same(comm.bcast(found), rows**2)
    assert (found is None) == (comm.rank > 0)


# ---- errors ----------------------------------------------------------------------------------------------------------


def bad_at_17(row):
    if row == 17:
        raise ZeroDivisionError("seventeen")
    return row


def test_the_error_names_the_row(comm):
    error = error_of(comm, bad_at_17, np.arange(100.0), grain=4)
    assert isinstance(error, JobError)
    assert error.index == 17
    assert "ZeroDivisionError: seventeen" in str(error)
    assert error.__notes__ == ["map_array: this was X[17]."]


def bad_block(rows):
    return rows if (rows != 17).all() else rows[1:]


def test_a_block_fails_as_a_whole(comm):
    error = error_of(comm, bad_block, np.arange(100.0), grain=4, vectorized=True)
    assert isinstance(error, JobError)
    assert error.index == 16
    assert "what the function returned for a block has shape (3,) where (4,) was declared" in str(error)
    assert error.__notes__ == ["map_array: this was X[16], or another row of its block."]


def test_failures_become_nan(comm, kernels):
    found = array_of(comm, bad_at_17, np.arange(100.0), on_failure="nan", grain=4)
    assert np.flatnonzero(np.isnan(found)).tolist() == [17]
    found = array_of(comm, bad_block, np.arange(100.0), on_failure="nan", grain=4, vectorized=True)
    assert np.flatnonzero(np.isnan(found)).tolist() == [16, 17, 18, 19]
    found = array_of(comm, lambda x: [1.0, x, x] if x < 3 else None, np.arange(5.0), ("f8", 3), on_failure="nan")
    assert np.isnan(found).all(1).tolist() == [False, False, False, True, True]


def test_a_kernel_that_fails(comm, kernels):
    error = error_of(comm, kernels.fails_on_odd, np.array([0, 2, 4, 5, 6]), "i8", grain=2)
    assert isinstance(error, JobError)
    assert (error.index, error.message) == (3, "the kernel returned 5")


WRONG_RESULTS = {
    "shape": (lambda row: [1.0, 2.0], "f8", r"has shape \(2,\) where \(\) was declared"),
    "dtype": (lambda row: 0.5, "i8", "has dtype float64 where int64 was declared"),
    "None": (lambda row: None, "f8", "has dtype object where float64 was declared"),
    "too large": (lambda row: 1000, "i1", "does not fit into int8"),
}


@pytest.mark.parametrize("case", WRONG_RESULTS)
def test_wrong_results(comm, case):
    function, result_dtype, message = WRONG_RESULTS[case]
    error = error_of(comm, function, np.arange(5.0), result_dtype)
    assert isinstance(error, JobError)
    with pytest.raises(JobError, match=message):
        raise error


WRONG_ROWS = {
    "None": (None, "X is None on the master"),
    "strings": (np.array(["a", "b"]), "must be numbers"),
    "objects": (np.array([None, 1]), "must be numbers"),
    "ragged": ([[1], [1, 2]], "cannot become an array"),
    "a number": (3.0, "X is a single float64"),
    "a generator": ((i for i in range(3)), "must be numbers"),
    "masked": (np.ma.masked_array([1, 2], [True, False]), "its mask cannot travel"),
    "empty rows": (np.zeros((3, 0)), "has no size"),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_rows_that_are_none(comm, case):
    """Slaves, which cannot know, leave quietly."""
    rows, message = WRONG_ROWS[case]
    error = error_of(comm, squared, rows)
    assert isinstance(error, PayloadError)
    assert message in str(error)


WRONG_CALLS = {
    "no result_dtype": (squared, None, {}, PayloadError, "needs a result_dtype"),
    "no dtype": (squared, "nonsense", {}, PayloadError, "no numpy dtype"),
    "no function": (3, "f8", {}, TypeError, "neither a function nor a compiled kernel"),
    "no kernel": ((squared, None), "f8", {}, KernelError, "is no compiled kernel"),
    "no NaN": (squared, "i8", {"on_failure": "nan"}, ValueError, "cannot be NaN"),
    "no choice": (squared, "f8", {"on_failure": "ignore"}, ValueError, "neither 'raise' nor 'nan'"),
    "no option": (squared, "f8", {"window": 3}, ValueError, "window needs ordered=True"),
    "no grain": (squared, "f8", {"grain": 0}, ValueError, "grain = 0 is out of range"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_calls_that_are_wrong_on_all_ranks(comm, case):
    function, result_dtype, options, kind, message = WRONG_CALLS[case]
    for outcome in outcomes_of(comm, function, np.arange(5.0), result_dtype, **options):
        assert isinstance(outcome.error, kind)
        assert message in str(outcome.error)
    check_healthy(comm)


def test_a_kernel_does_not_draw_and_takes_no_block(comm, kernels):
    for options, kind, message in (({"rng": True}, KernelError, "cannot draw"), ({"vectorized": True}, TypeError, "takes one row")):
        for outcome in outcomes_of(comm, kernels.square, np.arange(5.0), **options):
            assert isinstance(outcome.error, kind)
            assert message in str(outcome.error)
    check_healthy(comm)


def test_a_function_that_is_wrong_on_a_slave_only(comm):
    outcomes = outcomes_of(comm, squared if comm.rank == 0 else 3, np.arange(5.0))
    if comm.size > 1:
        assert "failed outside a job: TypeError: map_array: 3 is neither a function" in str(outcomes[0].error)
    check_healthy(comm)


def test_slaves_that_come_late(comm):
    for late in range(comm.size):
        if comm.rank == late:
            time.sleep(0.05)
        assert same(array_of(comm, squared, np.arange(30.0)), np.arange(30.0) ** 2)


def test_no_communicator():
    with pytest.raises(LaunchError, match="is no communicator"):
        map_array(squared, [1.0], "f8", vm="everywhere")


def test_old_news_is_passed_over(comm):
    """A rank that missed a run does not take what was told before it for what is told now."""
    channel = MPIMachine(comm).channel()
    heard = "new"
    if comm.rank == 0:
        channel.run -= 1
        channel.tell("old")
        channel.run += 1
        channel.tell("new")
    else:
        heard = channel.hear(0.5)
    assert comm.allgather(heard) == ["new"] * comm.size
    check_healthy(comm)

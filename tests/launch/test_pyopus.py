"""Scripts in the manner of PyOPUS: slaves stay in setVM, serve until the end, and leave with the master, whatever became of it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launch_helpers import Supervised

EXAMPLE = Path(__file__).parents[2] / "examples" / "from_pyopus.py"

WRONG = {
    "job raises": (1, ["Boom: 10 is wrong", "This was job 10 of dispatch.", "JobError: job 10 failed on slave"]),
    "spawned raises": (1, ["Boom: 10 is wrong", "failed on slave"]),
    "job exits": (1, ["JobError: job ", "SystemExit: 0", "This was job 3 of dispatch."]),
    "script raises": (1, ["Boom: the script is wrong"]),
    "script exits": (7, []),
    "not known there": (1, ["unknown", "AttributeError"]),
    "cannot travel": (1, ["CallError: job 3: an argument of square cannot be pickled"]),
    "collector raises": (1, ["CollectorError", "ended when it was given the result of job "]),
    "dispatcher": (1, ["LaunchError: the slaves have served cOS since setVM"]),
    "once more": (1, ["RuntimeError: setVM: finalize() has let the slaves go"]),
}


@pytest.mark.parametrize("size", [0, 1, 2, 4])
def test_the_example(launch, size):
    ended = launch(size, EXAMPLE).wait(60)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        "sweep: 100 gains, the largest at 0.96",
        "search: 1.0000 at 0.99",
        f"climb: 1.00 at 0.99; slaves were asked: {size > 1}",
    ]


@pytest.mark.parametrize(("size", "way"), [(0, "well"), (1, "no finalize"), (2, "well"), (4, "no finalize"), (4, "well")])
def test_all_that_is_promised(launch, size, way):
    ended = launch(size, "pyopus_ways.py", way).wait(60)
    assert (ended.code, ended.out, ended.err) == (0, "all is well\n", "")


@pytest.fixture(scope="module")
def wrong(launching):
    def end(way):
        with launching() as start:
            return start(3, "pyopus_ways.py", way).wait(60)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(WRONG, pool.map(end, WRONG), strict=True))


@pytest.mark.parametrize("way", WRONG)
def test_what_goes_wrong_ends_all_ranks(wrong, way):
    ended, (code, words) = wrong[way], WRONG[way]
    assert ended.code == code
    assert "all is well" not in ended.out
    for word in words:
        assert word in ended.err
    assert "a slave came back" not in ended.err
    assert ended.err.count("Traceback (most recent call last)") <= 4


def test_what_has_not_gone_out_is_not_waited_for(wrong):
    assert wrong["script raises"].seconds < 30  # it would be 50 s


def test_a_slave_that_dies_costs_no_result(launch):
    ended = launch(4, "pyopus_ways.py", "slave dies", kind=Supervised).wait(60)
    assert (ended.code, "all is well" in ended.out) == (0, True)


def test_when_the_time_is_over(launch):
    end = time.time() + 33  # and 30 s are kept free
    ended = launch(3, "pyopus_ways.py", "time is over", JD_HPC_WALLTIME=str(end)).wait(60)
    assert (ended.code, ended.out) == (85, "")
    assert (ended.err.count("jd_hpc: drained"), ended.err.count("Error")) == (1, 0), ended.err

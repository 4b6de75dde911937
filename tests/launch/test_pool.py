"""A Pool in scripts: bad input, deaths, Ctrl-C, every way to the end; and the libraries that take one, by the examples."""

from __future__ import annotations

import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from launch_helpers import SCRIPTS, Launch, Launched

EXAMPLES = SCRIPTS.parents[2] / "examples"
SQUARES = "then [0, 1, 4, 9, 16]\n"

BAD_INPUT = [
    r"PayloadError the function Unfriendly cannot be pickled, nor by cloudpickle: TypeError: no copies of me",
    r"PayloadError an argument of square cannot be pickled, nor by cloudpickle: TypeError: no copies of me",
    r"PayloadError the function Unfriendly cannot be pickled",
    r"PayloadError the result of unfriendly cannot be pickled.* JobError$",
    r"PayloadError a result was pickled, but cannot be rebuilt here: ValueError: invalid literal",
    r"ValueError no 13 JobError$",
    r"TypeError .*must be an iterable, not int JobError$",
    r"OSError the disk is gone",
    r"got 1$", r"got 4$", r"OSError the disk is gone$",
    r"got 1$", r"got 4$", r"OSError the disk is gone$",
    r"got 0$", r"got 1$", r"got 4$",
    r"ValueError no 13 JobError$",
    r"ValueError chunksize = 0 must be at least 1",
    r"TypeError 'int' object is not iterable",
    r"NotImplementedError a Pool cannot be pickled",
    r"ValueError the pool is still running: call close\(\) or terminate\(\) first",
    r"then \[0, 1, 4, 9, 16\]$",
    r"end$",
]  # fmt: skip


class Futures(Launch):
    def command(self, *words):
        return super().command("-m", "jd_hpc.futures", *words)


def lines_of(ended):
    assert (ended.code, ended.err) == (0, ""), ended
    return ended.out.splitlines()


def check_lines(lines, patterns):
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.match(pattern, line), (line, pattern)


@pytest.mark.parametrize("kind", [Launch, Futures])
@pytest.mark.parametrize("size", [0, 2, 4])
def test_bad_input(launch, size, kind):
    check_lines(lines_of(launch(size, "pool_target.py", "bad input", kind=kind).wait()), BAD_INPUT)


def test_what_is_too_large(launch):
    too_large = [
        r"PayloadError a call of 2\d{5} bytes is over payload_limit = 100000; raise it",
        r"PayloadError what process_job returned takes 2\d{5} bytes, over payload_limit = 100000.* JobError$",
        r"then \[90000, 90000, 90000\]$",
        r"end$",
    ]
    check_lines(lines_of(launch(3, "pool_target.py", "too large").wait()), too_large)


def test_lambdas_want_cloudpickle(launch):
    without, there = launch(2, "pool_target.py", "no cloudpickle"), launch(2, "pool_target.py", "lambda")
    hint = r"PayloadError the function main.<locals>.<lambda> cannot be pickled: .*`pip install cloudpickle` lambdas"
    check_lines(lines_of(without.wait()), [hint, r"then \[0, 1, 4, 9, 16\]$", "end$"])
    assert lines_of(there.wait()) == ["then [6, 7, 8, 9, 10]", "end"]


def test_a_slave_that_dies_costs_no_result(launch):
    ended = launch(4, "pool_target.py", "dies", kind=Launched).wait()
    assert ended.code == 0
    assert f"then {list(range(20))}\nend\n" in ended.out


def test_a_call_that_kills_every_slave_is_given_up(launch):
    ended = launch(4, "pool_target.py", "always dies", kind=Launched).wait()
    assert ended.code == 0
    assert re.search(r"JobError job \d+ was given up after 3 attempts \(slave ", ended.out)
    assert "returned [0, 1, 4, 9, 16]\nend\n" in ended.out  # the master goes on alone


def test_of_calls_that_travel_together_only_the_killer_is_given_up(launch):
    ended = launch(4, "executor_killer.py", kind=Launched).wait()
    assert ended.code == 0
    assert f"failed [1500] good {sum(range(3000)) - 1500} job 1500 was given up after 2 attempts" in ended.out


@pytest.mark.parametrize("size", [0, 3])
def test_ctrl_c_at_the_master(launch, size):
    ended = launch(size, "pool_target.py", "interrupt").wait()
    assert ended.code != 0
    assert "KeyboardInterrupt" in ended.err
    assert "end" not in ended.out.splitlines()
    assert ended.seconds < 15


@pytest.mark.parametrize("kind", [Launch, Futures])
def test_ctrl_c_at_all_ranks(launch, kind):
    running = launch(3, "pool_target.py", "ctrl-c", kind=kind)
    running.read("note.running")
    running.process.send_signal(signal.SIGINT)  # the launcher passes it on
    ended = running.wait()
    assert ended.code != 0
    assert "end" not in ended.out.splitlines()


@pytest.mark.parametrize("size", [0, 3])
def test_an_error_of_the_master_ends_the_pool(launch, size):
    ended = launch(size, "pool_target.py", "uncaught").wait()
    assert ended.code != 0
    assert "OSError: disk full" in ended.err
    assert ended.err.count("Traceback") == 1
    assert ended.seconds < 20  # the calls would have taken 100 s


@pytest.mark.parametrize("size", [0, 3])
def test_terminate(launch, size):
    lines = lines_of(launch(size, "pool_target.py", "terminate").wait())
    check_lines(lines, [r"(BrokenExecutor|RuntimeError) .*the pool was terminated", r"end$"])


def test_a_pool_that_was_closed(launch):
    lines = lines_of(launch(2, "pool_target.py", "after the end").wait())
    assert lines == ["ValueError the pool was closed: make another one, or close it later NoneType"] * 5 + ["end"]


def test_nobody_waits_for_slaves_that_have_left(launch):
    lines = lines_of(launch(3, "pool_target.py", "second pool").wait())
    check_lines(lines, [r"then \[0, 1", *[r"LaunchError the slaves have left the program"] * 3, r"then \[0, 1, 4, 9, 16\]"])


def test_slaves_that_left_on_their_own_are_lost(launch):
    """The master did not know that they would; it does the work itself."""
    ended = launch(3, "pool_target.py", "slaves have left").wait()
    assert (ended.code, ended.out) == (0, SQUARES)
    assert "slave 1 is lost: it has left the program" in ended.err


def test_a_local_pool_inside_a_call(launch):
    assert lines_of(launch(3, "pool_target.py", "nested").wait()) == ["then [[0, 1], [1, 4], [4, 9]]", "end"]


@pytest.mark.parametrize("size", [0, 3])
def test_a_pool_that_nobody_closes(launch, size):
    assert launch(size, "pool_target.py", "no with").wait()[:3] == (0, SQUARES, "")


def test_slaves_that_go_on(launch):
    running = launch(3, "pool_target.py", "slaves go on")
    assert [running.read(f"note.end{rank}") for rank in range(3)] == ["yes\n"] * 3
    assert "a slave runs calls and cannot hand out any: let it call wait()" in running.read("note.slave1")
    assert running.wait()[:3] == (0, SQUARES, "")


def test_slaves_that_do_not_wait_serve_all_the_same(launch):
    assert launch(3, "pool_target.py", "slaves do not wait").wait()[:3] == (0, SQUARES, "")


# ---- the libraries ---------------------------------------------------------------------------------------------------

ANSWERS = {
    "schwimmbad": r"64 parts, pi = 3.141593\n",
    "emcee": r"slope 2.0, offset -1.0\n",
    "scipy": r"depth 0.0000 after 5269 calls\n",
    "joblib": r"best \{'C': 1.0, 'gamma': 0.1\}, 0.980 of the flowers right\n",
    "pymoo": r"40 beams, the lightest 0.0004, the stiffest 628\n",
}


@pytest.fixture(scope="module")
def examples(launching):
    """What became of each, on no and on four ranks; two at a time."""

    def end(case):
        with launching() as start:
            return start(case[1], str(EXAMPLES / f"pool_{case[0]}.py")).wait(120)

    cases = [(name, size) for name in ANSWERS for size in (0, 4)]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(end, cases), strict=True))


def test_every_example_is_tried():
    assert {path.stem for path in EXAMPLES.glob("pool_*.py")} == {f"pool_{name}" for name in ANSWERS}


@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("name", ANSWERS)
def test_a_library(examples, name, size):
    ended = examples[name, size]
    assert (ended.code, ended.err) == (0, ""), ended
    assert re.fullmatch(ANSWERS[name], ended.out), ended

"""Scripts under `mpiexec python -m jd_hpc.futures`, and CPython's own tests of executors there."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from launch_helpers import SCRIPTS, Launch, Launched


class Futures(Launch):
    def command(self, *words):
        return super().command("-m", "jd_hpc.futures", *words)


class LaunchedFutures(Launched):
    def command(self, *words):
        return super().command("-m", "jd_hpc.futures", *words)


MANY = "[0, 1, 2, 3, 4]\n[100, 101, 102, 103, 104]\n1024\n2048\n"


@pytest.mark.parametrize("size", [0, 1, 2, 4])
def test_executors_one_after_the_other(launch, size):
    ended = launch(size, "futures_target.py", "many", kind=Futures).wait()
    assert (ended.code, ended.out, ended.err) == (0, MANY, "")


@pytest.mark.parametrize(
    ("what", "code", "out"),
    [("exit code", 7, "9\n"), ("nothing", 0, "nothing\n"), ("no shutdown", 0, "slept 0.5\n"), ("nested", 0, "[[0], [0, 1, 4]]\n")],
)
def test_the_script_ends(launch, what, code, out):
    ended = launch(3, "futures_target.py", what, kind=Futures).wait()
    assert (ended.code, ended.out) == (code, out)


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("two at once", "RuntimeError: another Executor is open"),
        ("broken", "failed outside a job: ValueError: no 1"),
        ("fails on slaves", "failed outside a job: OSError: no such node"),
        ("uncaught", "ValueError: no 1"),
        ("interrupt", "KeyboardInterrupt"),
    ],
)
def test_the_script_fails(launch, what, error):
    ended = launch(3, "futures_target.py", what, kind=Futures).wait()
    assert ended.code != 0
    assert error in ended.err


@pytest.mark.parametrize(("kind", "what"), [(Futures, "drained"), (LaunchedFutures, "drained"), (Futures, "drained pool")])
def test_a_script_that_is_drained(launch, kind, what):
    """USR2 comes to the main thread of the master, while the run is another thread's."""
    ended = launch(3, "futures_target.py", what, kind=kind).wait()
    assert ended.code == 85, ended
    assert "SIGUSR2 at rank 0" in ended.err


def test_a_script_without_a_guard(launch):
    ended = launch(3, "futures_unguarded.py", kind=Futures).wait()
    assert (ended.code, ended.out, ended.err) == (0, "0 1 4 9 16\n", "")


def test_a_slave_that_dies(launch):
    ended = launch(4, "futures_target.py", "slave dies", kind=LaunchedFutures).wait()
    assert ended.code == 0, ended
    assert ended.out == "JobError\n328350\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "no script"),
        (["-m"], "no script"),
        (["none.py"], "no such script: none.py"),
        (["-m", "no_such_module"], "no such module"),
    ],
)
def test_a_wrong_command_line(launch, words, error):
    class Words(Launch):
        def command(self, *_):
            return super().command("-m", "jd_hpc.futures", *words)

    ended = launch(0, "", kind=Words).wait()
    assert ended.code == 2
    assert error in ended.err


def folder_of_cpython_tests():
    """Where CPython's test_concurrent_futures.py is; .ci/cpython-tests fetches it."""
    if "JD_HPC_CPYTHON_TESTS" in os.environ:
        return Path(os.environ["JD_HPC_CPYTHON_TESTS"])
    spec = importlib.util.find_spec("test.test_concurrent_futures")
    if spec is None or spec.origin is None or Path(spec.origin).name == "__init__.py":
        pytest.skip("this Python has no test.test_concurrent_futures in one file; .ci/cpython-tests says where one is")
    return Path(spec.origin).parent


def test_the_tests_of_cpython(launch):
    folder = folder_of_cpython_tests()
    assert (folder / "test_concurrent_futures.py").is_file()
    ended = launch(4, "cpython_executor.py", folder, kind=Futures).wait(120)
    assert ended.code == 0, ended
    lines = ended.err.splitlines()
    assert not [line for line in lines if "Dangling thread" in line]
    assert sum(line.endswith("... ok") for line in lines) >= 27
    assert lines[-1] == "OK (skipped=3)"
    assert (SCRIPTS / "cpython_executor.py").is_file()

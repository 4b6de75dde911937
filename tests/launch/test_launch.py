"""Scripts as users start them: the exit code is honest, errors are printed once, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest
from launch_helpers import WRONG_WAYS, Launched

ANSWER = "answer 100 328350"


def test_success(launch, size):
    ended = launch(size, "ways_to_end.py", "well").wait()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(ANSWER)
    assert ended.out.count("\n") == 1


def test_success_with_rows_on_one_rank(launch):
    for one in [launch(size, "ways_to_end.py", "well", "rows") for size in (0, 1)]:
        ended = one.wait()
        assert (ended.code, ended.err) == (0, "")
        assert ended.out.startswith(ANSWER)


@pytest.mark.parametrize("way", WRONG_WAYS)
def test_errors(wrong_ways, way):
    ended, words = wrong_ways[way], WRONG_WAYS[way]
    assert ended.code != 0
    assert "answer" not in ended.out
    for word in words:
        assert word in ended.err
    assert ended.err.count(words[0]) == 1


def test_exit_code_of_a_hook(launch):
    ended = launch(4, "ways_to_end.py", "hook exits").wait()
    assert ended.code == 7
    assert "Traceback" not in ended.err


def test_error_while_others_work_and_large_results_are_on_their_way(launch):
    ended = launch(4, "ways_to_end.py", "job error while others work").wait()
    assert ended.code != 0
    assert "JobError: job 10 failed" in ended.err
    assert ended.seconds < 15


def test_error_is_caught(launch):
    ended = launch(4, "ways_to_end.py", "job error is caught").wait()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[0] == "caught 10"
    assert ended.out.splitlines()[1].startswith(ANSWER)


def test_a_crowded_node(launch, tmp_path):
    """Whoever yields waits until all others had their turn: clocks and signals are looked at all the same."""
    compiler = shutil.which("cc") or shutil.which("gcc") or pytest.skip("no C compiler")
    source, library = tmp_path / "crowd.c", tmp_path / "crowd.so"
    source.write_text("#include <unistd.h>\nint sched_yield(void) { return usleep(5000); }\n")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True, timeout=60)
    ended = launch(2, "crowded.py", LD_PRELOAD=str(library)).wait(60)
    assert ended.code == 0
    assert ended.err.count(" jobs done, ") >= 3, ended.err


def test_halves_of_the_world(launch):
    ended = launch(4, "ways_to_end.py", "world is split").wait()
    assert (ended.code, ended.err) == (0, "")
    assert sorted(ended.out.splitlines()) == ["answer (100, 328350)"] * 2 + ["answer None"] * 2


@pytest.mark.parametrize("debug", [1, 2])
def test_debug_goes_to_stderr(launch, debug):
    ended = launch(2, "ways_to_end.py", f"debug {debug}").wait()
    assert ended.code == 0
    assert ended.out.startswith(ANSWER)
    lines = ended.err.splitlines()
    assert all(" jd_hpc " in line for line in lines)
    assert sum("slave 1 gets job" in line for line in lines) == (100 if debug == 2 else 0)
    assert sum("slave 1 is ready" in line for line in lines) == (1 if debug == 2 else 0)
    assert sum("slave 1 has started" in line for line in lines) == 1
    assert len(lines) < 10 or debug == 2


def test_objects_that_live_until_the_interpreter_ends(launch):
    ended = launch(4, "left_behind.py").wait()
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "kept 300\n"


# ---- no mpiexec --------------------------------------------------------------------------------------------------------


def test_a_local_run_imports_no_mpi(launch):
    ended = launch(0, "alone.py", "local", PMI_SIZE="4", OMPI_COMM_WORLD_SIZE="4").wait()
    assert (ended.code, ended.out, ended.err) == (0, "answer 385\n", "")


def test_one_process_is_no_silent_singleton(launch):
    one = {"PMI_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"}
    launches = [launch(0, "alone.py", vm, **settings) for vm, settings in (("world", {}), ("machine", {}), ("world", one))]
    for ended in [started.wait() for started in launches]:
        assert (ended.code, ended.out) == (0, "answer 385\n")


def test_silent_singletons_are_refused(launch):
    cases = [
        ("machine", "PMI_SIZE", ["MPICH's mpiexec"]),
        ("world", "OMPI_COMM_WORLD_SIZE", ["Open MPI's mpiexec"]),
        ("world", "SLURM_STEP_NUM_TASKS", ["srun", "--mpi=pmi2", "--mpi=pmix"]),
    ]
    launches = [launch(0, "alone.py", vm, **{variable: "4"}) for vm, variable, _ in cases]
    for (_, _, words), ended in zip(cases, [started.wait() for started in launches], strict=True):
        assert ended.code != 0
        assert ended.out == ""
        for word in ["LaunchError: 4 processes were launched, but MPI sees only this one", "Cause: ", "Cure: ", *words]:
            assert word in ended.err


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("doing", "to"),
    [
        ("nothing", "slave"), ("python", "everybody"), ("sleeping", "master"), ("large", "master"), ("large", "everybody"),
        ("rows", "slave"), ("rows", "everybody"),
    ],
)  # fmt: skip
def test_interrupt(launch, doing, to):
    """The signal goes to processes of the run, and they end it; nobody else needs to."""
    one = launch(2, "interrupted.py", doing, "uncaught")
    pids = [int(one.read(f"note.pid{rank}")) for rank in (0, 1)]
    one.read("note.running")
    for pid in {"master": pids[:1], "slave": pids[1:], "everybody": pids}[to]:
        os.kill(pid, signal.SIGINT)
    begin = time.monotonic()
    ended = one.wait(15)
    assert time.monotonic() - begin < 8
    assert ended.code != 0
    assert "KeyboardInterrupt" in ended.err
    one.read("note.shutdown0", 0)
    assert "JobError" not in ended.err


@pytest.mark.parametrize(
    ("doing", "to"),
    [("nothing", "everybody"), ("python", "master"), ("large", "master"), ("large", "everybody"), ("rows", "everybody")],
)
def test_interrupt_that_is_caught(launch, doing, to):
    """The run has ended cleanly: the next one works."""
    one = launch(4, "interrupted.py", doing, "caught")
    pids = [int(one.read(f"note.pid{rank}")) for rank in range(4)]
    one.read("note.running")
    for pid in reversed(pids) if to == "everybody" else pids[:1]:
        os.kill(pid, signal.SIGINT)
    ended = one.wait(15)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(ANSWER)


def test_the_user_does_not_wait_for_a_slave_that_is_stuck(launch):
    """From the third Ctrl-C on, the master leaves without a goodbye; nobody waits in MPI_Finalize."""
    one = launch(2, "interrupted.py", "stuck", "uncaught", kind=Launched)
    pid = int(one.read("note.pid0"))
    one.read("note.stuck")
    for _ in range(4):
        os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
    ended = one.wait(20)
    assert ended.code != 0
    assert "KeyboardInterrupt" in ended.err


def test_a_slave_that_leaves_without_a_goodbye_and_lives_on(launch):
    ended = launch(2, "leaves_without_goodbye.py", kind=Launched).wait(15)
    assert ended.code != 0
    assert ended.out == "the run ended\n"
    assert "KeyboardInterrupt" in ended.err


@pytest.mark.parametrize("to", ["mpiexec", "its process group"])
def test_interrupt_of_mpiexec(launch, size, to):
    one = launch(size, "interrupted.py", "python", "uncaught")
    one.read("note.running")
    (os.killpg if to == "its process group" else os.kill)(one.process.pid, signal.SIGINT)
    begin = time.monotonic()
    ended = one.wait(25)
    assert ended.code != 0
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize("by", ["Ctrl-C", "a handler that raises"])
def test_interrupt_at_any_time(launch, size, by):
    """Whatever the ranks are doing when the signals come, the run ends on all of them, and the next one works."""
    rounds = 60
    one = launch(size, "interrupted_at_any_time.py", rounds, by)
    ended = one.wait(30)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"rounds {rounds}\n"
    if by == "Ctrl-C":
        assert [int(one.read(f"note.heard{rank}", 0)) for rank in range(size)] == [rounds] * size

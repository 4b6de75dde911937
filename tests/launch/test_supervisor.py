"""A rank dies, and the launcher leaves the others alone: by a supervisor alone, and by jd-hpc launch."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launch_helpers import Launched, Supervised, environment, mpiexec

RANKS = 4
VICTIM = 2
LIMIT_S = 30
FAILURES = ["SIGKILL", "SIGSTOP", "SEGV", "_exit0", "_exit3", "exception"]
# What a slave does, and the exit code of the master.
KINDS = [*((kind, 0) for kind in FAILURES), ("none", 0), ("none", 3), ("SIGKILL", 3)]
# Whose end is everybody's: the master's, and that of a slave which is part of no dispatcher's run yet.
NEEDED = ["master raises", "all raise", "master is killed", "slave raises", "slave is killed", "slave raises before MPI"]


class WithInput(Supervised):
    """With a pipe to write into."""

    stdin = subprocess.PIPE


@pytest.fixture(scope="module")
def ends(launching):
    """(way of starting, script, arguments) → what became of it, and what was left. An mpiexec mostly waits: four at a time."""

    def end(case):
        way, script, *arguments = case
        with launching() as start:
            one = start(RANKS, script, *arguments, kind=way)
            ended = one.wait(LIMIT_S)
            finished = {int(path.name.removeprefix("note.finished")) for path in one.folder.glob("note.finished*")}
            return ended, finished, ended.left_files

    scripts = [*(("loses_a_slave.py", *kind) for kind in KINDS), *(("ends_badly.py", way) for way in NEEDED)]
    cases = [(way, *script) for script in scripts for way in (Supervised, Launched)]
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(cases, pool.map(end, cases), strict=True))


@pytest.mark.parametrize(("kind", "code"), KINDS)
@pytest.mark.parametrize("way", [Supervised, Launched])
def test_survivors_finish(ends, way, kind, code):
    ended, finished, left_files = ends[way, "loses_a_slave.py", kind, code]
    lost = [] if kind == "none" else [VICTIM]
    assert finished == set(range(RANKS)) - set(lost), ended
    answer = json.loads(next(line for line in ended.out.splitlines() if line.startswith("{")))
    assert (answer["lost"], answer["finished"]) == (lost, RANKS - 1 - len(lost))
    if way is Launched or kind == "none":
        assert ended.code == code, ended
    assert not left_files
    assert ended.err.count("ValueError: a slave's own mistake") == (kind == "exception")
    if kind == "none" and way is Launched:
        assert not ended.err


# ---- other ends ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [Supervised, Launched])
@pytest.mark.parametrize("what", NEEDED)
def test_the_end_of_one_that_is_needed_is_everybodys(ends, what, way):
    ended = ends[way, "ends_badly.py", what][0]
    assert ended.code > 0
    if "raise" in what:
        assert ended.code == 1
        assert "Traceback (most recent call last)" in ended.err
        assert "runpy" not in ended.err
        assert "__main__.py" not in ended.err


def test_the_exit_code_of_a_plain_script(launch):
    ended = launch(2, "ends_badly.py", "fails, with a code").wait(LIMIT_S)
    assert ended.code == 3


@pytest.mark.parametrize("way", [Supervised, Launched])
def test_term_to_mpiexec_ends_everything(launch, way):
    one = launch(RANKS, "ends_badly.py", "handles TERM", kind=way)
    for rank in range(RANKS):
        one.read(f"note.ready{rank}")
    one.process.terminate()
    assert one.wait(LIMIT_S).code != 0  # wait() sees that no process is left


def test_the_rank_dies_with_its_supervisor(launch):
    one = launch(RANKS, "ends_badly.py", "sleeps", kind=Supervised)
    child = int(one.read("note.pid1"))
    os.kill(parent_of(child), signal.SIGKILL)
    assert one.wait(LIMIT_S).code != 0
    assert not is_alive(child)


def test_supervisors_do_not_outlive_the_launcher(launch):
    one = launch(2, "ends_badly.py", "sleeps", kind=Supervised)
    supervisors = [parent_of(int(one.read(f"note.pid{rank}"))) for rank in range(2)]
    os.kill(parent_of(supervisors[0]), signal.SIGKILL)
    one.wait(LIMIT_S)
    end = time.monotonic() + 10
    while any(map(is_alive, supervisors)):
        assert time.monotonic() < end
        time.sleep(0.05)


def state_and_parent(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]


def parent_of(pid):
    return int(state_and_parent(pid)[1])


def is_alive(pid):
    return Path(f"/proc/{pid}").exists() and state_and_parent(pid)[0] != "Z"


def test_stdin_reaches_rank_0(launch):
    one = launch(2, "ends_badly.py", "reads a line", "-x", kind=WithInput)
    one.process.stdin.write("a line\n")
    one.process.stdin.flush()
    ended = one.wait(LIMIT_S)
    assert (ended.code, ended.out.strip()) == (0, "got a line ['-x']")


# ---- one process, no launcher ----------------------------------------------------------------------------------------


def run(*words, **options):
    env = environment(**options.pop("env", {}))
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=LIMIT_S, env=env, **options)


def test_programs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, other; print(__name__, sys.argv, __file__); sys.exit(5)")
    (tmp_path / "other.py").write_text("import sys\nif __name__ == '__main__': print(sys.argv[1:], __name__)")
    ended = run("-m", "jd_hpc", str(script), "-a", "b")
    assert (ended.returncode, ended.stdout, ended.stderr) == (5, f"__main__ {[str(script), '-a', 'b']} {script}\n", "")
    assert run("-m", "jd_hpc", "-m", "other", "-a", cwd=tmp_path).stdout == "['-a'] __main__\n"
    assert run("-m", "jd_hpc", "-c", "import sys, os; print(sys.argv, __name__)", "-x").stdout == "['-c', '-x'] __main__\n"
    assert run("-m", "jd_hpc", "-", "y", input="import sys; print(sys.argv)").stdout == "['-', 'y']\n"


def test_words():
    assert "usage: python -m jd_hpc" in run("-m", "jd_hpc", "--help").stdout
    assert run("-m", "jd_hpc", "--version").stdout.startswith("jd_hpc ")
    for words, message in (
        ("", "no script"),
        ("--what", "unknown option --what"),
        ("-c", "-c wants"),
        ("x.py", "no such script: x.py"),
    ):
        ended = run("-m", "jd_hpc", *words.split())
        assert ended.returncode == 2
        assert message in ended.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit('why')", 1, "why\n"),
        ("1/0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.kill(os.getpid(), 9)", 137, ""),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt\n"),
    ],
)
def test_exit_codes_of_one_process_with_a_supervisor(rank, code, status, message):
    # LINGER=0: nobody who started this would end a supervisor that stays
    ended = run("-m", "jd_hpc", "-c", code, env={"PMI_RANK": rank, "JD_HPC_LINGER": "0"})
    in_order = "SystemExit" in code
    assert ended.returncode == (status if rank == "0" else 0 if in_order else 1)
    assert ended.stderr.endswith(message)
    assert "jd_hpc" not in ended.stderr


def test_no_mpi_is_imported():
    code = "import sys, jd_hpc.cli, jd_hpc.ending, jd_hpc.doctor, jd_hpc.trial; print([n for n in sys.modules if 'mpi4py' in n])"
    assert run("-c", code).stdout == "[]\n"


def test_signals_are_passed_on():
    code = "import os, signal, sys; signal.signal(15, lambda *_: sys.exit(4)); print(os.getppid(), flush=True); signal.pause()"
    env = environment(PMI_RANK="0")
    process = subprocess.Popen([sys.executable, "-m", "jd_hpc", "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    assert int(process.stdout.readline()) == process.pid
    process.send_signal(signal.SIGUSR1)  # does nothing
    time.sleep(0.1)
    process.terminate()
    assert process.wait(LIMIT_S) == 4
    process.stdout.close()


@pytest.mark.parametrize("by", ["terminal", "kill"])
def test_ctrl_c_comes_once(by):
    code = """if True:
        import signal, time
        seen = []
        signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        print("ready", flush=True)
        end = time.monotonic() + 10
        while not seen and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.5)
        print(len(seen), flush=True)"""
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "jd_hpc", "-c", code], env=environment(PMI_RANK="0"), stdin=terminal, stdout=subprocess.PIPE,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    if by == "terminal":
        os.write(master, b"\x03")
    else:
        process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "1\n"
    assert process.wait(LIMIT_S) == 0
    process.stdout.close()
    os.close(master)
    os.close(terminal)


# ---- the doctor ------------------------------------------------------------------------------------------------------


def test_doctor():
    ended = run("-m", "jd_hpc.cli", "doctor", "-n", "3")
    assert ended.returncode == 0, ended
    for words in ("launcher and MPI belong together", "MPI sees 3 of 3", mpiexec()):
        assert words in ended.stdout
    assert "python -m jd_hpc: survivors went on: yes" in ended.stdout
    assert "jd-hpc launch: survivors went on: yes; exit code right: yes (0)" in ended.stdout

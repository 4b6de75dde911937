"""Harm on demand: the same spec means the same harm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter

import pytest

from jd_hpc.chaos import KINDS, Chaos, strike


def test_a_spec_is_understood():
    assert Chaos.parse("kill=2, stop=1,seed=7,within=0.5,pause=2") == Chaos(("kill", "kill", "stop"), 7, 0.5, 2.0)


@pytest.mark.parametrize("spec", ["", "kill", "kill=x", "kill=-1", "kill=1.5", "tickle=1", "kill=1,,", "kill=1;stop=1"])
def test_a_spec_that_cannot_be_understood(spec):
    with pytest.raises(ValueError, match=r"cannot understand .* kinds kill, segv"):
        Chaos.parse(spec)


@pytest.mark.parametrize("seed", range(5))
def test_every_rank_works_out_the_same_lot(seed):
    chaos = Chaos.parse(f"kill=2,stop=1,seed={seed},within=3")
    fates = [chaos.fate(rank, 8) for rank in range(8)]
    assert fates[0] is None, "the master"
    assert Counter(fate[0] for fate in fates if fate) == {"kill": 2, "stop": 1}
    assert all(0 <= fate[1] <= 3 for fate in fates if fate)
    assert fates == [chaos.fate(rank, 8) for rank in range(8)]


def test_more_faults_than_slaves():
    assert all(Chaos.parse("kill=9").fate(rank, 4) for rank in (1, 2, 3))


def test_no_such_fault():
    with pytest.raises(ValueError, match="no fault 'tickle'"):
        strike("tickle")


@pytest.mark.parametrize(
    ("kind", "code"),
    [("kill", -signal.SIGKILL), ("segv", -signal.SIGSEGV), ("exit0", 0), ("exit3", 3), ("raise", 1), ("compute", 7)],
)
def test_a_fault_is_what_it_says(kind, code):
    program = f"import os; from jd_hpc.chaos import strike; strike({kind!r}, 0.1); os._exit(7)"
    assert subprocess.run([sys.executable, "-c", program], timeout=30).returncode == code


def test_raise_comes_to_the_main_thread():
    program = (
        "import time; from jd_hpc.chaos import Chaos; Chaos.parse('raise=1,within=0.1').arm(1, 2)\nwhile True: time.sleep(0.01)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    assert "jd_hpc chaos: raise of rank 1 after " in ended.stderr
    assert "ChaosError: an exception on demand" in ended.stderr


def test_stop_ends():
    program = "import os; from jd_hpc.chaos import strike; strike('stop', 0.2); os._exit(7)"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT).si_code == os.CLD_STOPPED
        assert process.wait(timeout=30) == 7
    finally:
        process.kill()
        process.wait()
    assert "freeze" in KINDS

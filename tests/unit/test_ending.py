"""How a process ends after a failure: what of it can be tried in a process that goes on."""

from __future__ import annotations

import mmap
import sys
import uuid
from pathlib import Path

import pytest

from jd_hpc import ending


@pytest.fixture(autouse=True)
def nothing_failed(monkeypatch):
    """Each test begins without a failure, and leaves none behind for the end of pytest itself."""
    for name, value in {"why": None, "pid": 0, "others_gone": None, "code": None, "was_drained": False}.items():
        monkeypatch.setattr(ending._Ending, name, value)
    monkeypatch.setattr(sys, "exit", sys.exit)
    monkeypatch.delattr(sys, "last_value", raising=False)


@pytest.mark.parametrize(("code", "status"), [(None, 0), (0, 0), (7, 7), (256, 0), (-1, 255), ("why", 1), ([], 1), (True, 1)])
def test_status(code, status):
    assert ending.status_of(code) == status


def test_the_first_reason_stays():
    assert ending.why_failed() is None
    ending.failed("lost 1")
    ending.failed("lost 2", others_gone=lambda: True, grace_s=1)
    assert ending.why_failed() == "lost 1"
    assert ending._Ending.grace_s == 1


def test_what_a_plain_script_exits_with():
    ending.failed("lost 1")
    assert ending._code_of_script() == 0
    with pytest.raises(SystemExit):
        sys.exit("no licence")
    assert ending._code_of_script() == 1
    ending.exit_with(5)
    assert ending._code_of_script() == 5


def test_what_a_drained_run_leaves_with():
    ending.drained()
    assert ending._code_of_script() == 85
    ending.exit_with(0)
    assert ending._code_of_script() == 0


@pytest.mark.parametrize("drained", [False, True])
@pytest.mark.parametrize(("error", "code"), [(ValueError(), 1), (KeyboardInterrupt(), 130)])
def test_uncaught_exceptions(monkeypatch, error, code, drained):
    if drained:  # and Unfinished was caught
        ending.drained()
    monkeypatch.setattr(sys, "last_value", error, raising=False)
    assert ending._code_of_script() == code


def test_only_files_that_are_mapped_here_are_removed():
    ours, foreign = (Path("/dev/shm", f"mpich_shm_{uuid.uuid4().hex}") for _ in range(2))
    other = Path("/dev/shm", f"other_{uuid.uuid4().hex}")
    try:
        for path in (ours, foreign, other):
            path.write_bytes(bytes(mmap.PAGESIZE))
        with ours.open("r+b") as a, other.open("r+b") as b, mmap.mmap(a.fileno(), 0), mmap.mmap(b.fileno(), 0):
            ending.remove_shared_memory()
        assert not ours.exists()
        assert foreign.exists()
        assert other.exists()
    finally:
        for path in (ours, foreign, other):
            path.unlink(missing_ok=True)

"""Who may write a journal: real processes that hold the lock, that are gone, and that are elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from journal_helpers import contents, names, squares

import jd_hpc
from jd_hpc import journal_lock
from jd_hpc.errors import JournalHeldError, JournalWriteError
from jd_hpc.journal_lock import FILE_BYTES, JournalLock, holder_of

HOLDER = """
import sys, time
from jd_hpc.journal_lock import JournalLock
lock = JournalLock(sys.argv[1])
print("held", flush=True)
while True:
    lock.renew()
    time.sleep(0.05)
"""


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "a.journal")


@pytest.fixture
def quick(monkeypatch):
    """Holders on other machines are watched for a short time."""
    monkeypatch.setattr(journal_lock, "STILL_S", 0.4)
    monkeypatch.setattr(journal_lock, "LOOK_S", 0.02)


@pytest.fixture
def holder(path):
    """A process that holds the lock and gives signs of life."""
    search = os.pathsep.join([str(Path(jd_hpc.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": search, "SLURM_JOB_ID": "77", "USER": "ada"}
    process = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate(timeout=20)


def rewrite(path, **changes):
    """Change what the lock says of its holder."""
    lock = Path(f"{path}.lock")
    lock.write_bytes(json.dumps(json.loads(lock.read_text()) | changes).encode().ljust(FILE_BYTES - 1) + b"\n")


def test_a_lock_is_made_and_given_back(path):
    lock = JournalLock(path)
    assert holder_of(path).startswith(f"process {os.getpid()} on ")
    assert Path(f"{path}.lock").stat().st_size == FILE_BYTES
    lock.check()
    lock.release()
    assert holder_of(path) is None
    assert names(Path(path).parent) == []


def test_a_second_one_is_told_who_holds_it(path, holder):
    told = f"held by process {holder.pid} on .* \\(user ada, Slurm job 77\\) since 2.*; `jd-hpc journal show`"
    with pytest.raises(JournalHeldError, match=told):
        JournalLock(path)
    holder.send_signal(signal.SIGSTOP)  # it does not count up, but anybody can see that it is there
    with pytest.raises(JournalHeldError, match=told):
        JournalLock(path)


def test_this_process_itself_can_hold_it(path):
    lock = JournalLock(path)
    with pytest.raises(JournalHeldError, match=f"process {os.getpid()}"):
        JournalLock(path)
    lock.release()


@pytest.mark.parametrize("waited_for", [False, True])
def test_a_holder_of_this_machine_that_is_gone_is_followed_at_once(path, holder, said, waited_for):
    holder.kill()
    if waited_for:
        holder.wait(20)
    else:  # its remains are still there
        while f"{holder.pid} (" in (stat := Path(f"/proc/{holder.pid}/stat").read_text()) and ") Z" not in stat:
            time.sleep(0.01)
    lock = JournalLock(path)
    assert f"process {holder.pid} on " in said()[0]
    assert "that process is gone; it is taken over" in said()[0]
    lock.release()
    assert names(Path(path).parent) == []


def test_another_process_with_the_same_number_is_another_process(path):
    JournalLock(path)
    rewrite(path, started="12345", token="other")
    JournalLock(path).release()


def test_a_job_that_was_started_again_follows_itself_at_once(path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    JournalLock(path)
    rewrite(path, space="another machine", token="other")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begin = time.monotonic()
    lock = JournalLock(path)
    assert time.monotonic() - begin < journal_lock.STILL_S / 2
    lock.release()


def test_another_task_of_the_same_start_does_not(path, monkeypatch, quick):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock = JournalLock(path)
    rewrite(path, space="another machine")
    with alive(lock), pytest.raises(JournalHeldError):
        JournalLock(path)


class alive:
    """A holder that gives signs of life."""

    def __init__(self, lock):
        self.lock, self.ended = lock, threading.Event()

    def __enter__(self):
        self.thread = threading.Thread(target=self.live)
        self.thread.start()

    def live(self):
        while not self.ended.wait(0.05):
            self.lock.renew()

    def __exit__(self, *error):
        self.ended.set()
        self.thread.join()


def elsewhere(path):
    """A lock of a process that seems to be on another machine, so that only its signs of life tell of it."""
    lock = JournalLock(path)
    lock._facts |= {"space": "another machine", "host": "elsewhere"}
    lock.renew()
    return lock


def test_a_holder_elsewhere_that_lives_is_left_alone(path, quick):
    lock = elsewhere(path)
    with alive(lock), pytest.raises(JournalHeldError, match=f"process {os.getpid()} on elsewhere"):
        JournalLock(path)
    lock.check()


def test_a_holder_elsewhere_that_stands_still_is_followed_and_writes_no_more(path, quick, said):
    old = elsewhere(path)
    begin = time.monotonic()
    new = JournalLock(path)
    assert time.monotonic() - begin >= 0.4
    assert "on elsewhere" in said()[0]
    assert "no sign of life for 0.4 s" in said()[0]
    with pytest.raises(JournalHeldError, match=f"was taken over by process {os.getpid()} on .*It writes no more"):
        old.check()
    old.renew()  # a late sign of life changes nothing
    new.check()
    old.release()
    new.check()
    new.release()


def test_a_lock_that_somebody_removed_is_lost(path):
    lock = JournalLock(path)
    Path(f"{path}.lock").unlink()
    with pytest.raises(JournalHeldError, match="is gone: somebody has removed it"):
        lock.check()
    lock.release()


def test_a_lock_without_a_name_gets_time(path, quick):
    """Its maker is just writing it, or died over it."""
    Path(f"{path}.lock").touch()
    with ThreadPoolExecutor(1) as pool:
        newcomer = pool.submit(JournalLock, path)
        time.sleep(0.15)
        Path(f"{path}.lock").write_text(json.dumps({"host": "elsewhere", "token": "x", "pid": 1, "user": "u", "since": "now"}))
        time.sleep(0.15)
        assert not newcomer.done() or newcomer.exception()
    Path(f"{path}.lock").write_text("")
    JournalLock(path).release()


def holds(lock):
    """What is asked before every block is written."""
    try:
        lock.check()
    except JournalHeldError:
        return False
    return True


def test_of_many_that_take_over_one_wins(path, quick):
    """Threads stand for machines: each comes to the same judgement at the same time."""
    elsewhere(path)
    gate = threading.Barrier(8)

    def come(number):
        gate.wait()
        try:
            lock = JournalLock(path)
        except JournalHeldError:
            return None
        return lock

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            won = [lock for lock in pool.map(come, range(8)) if lock is not None and holds(lock)]
        assert len(won) == 1
        rewrite(path, space="another machine", token="left behind")
        with pytest.raises(JournalHeldError):
            won[0].check()


def test_who_took_the_wrong_lock_gives_it_back(path, quick):
    """Between the last look and the taking somebody else was quicker."""
    judged = json.loads(Path(elsewhere(path).path).read_text())
    Path(f"{path}.lock").unlink()
    quicker = JournalLock(path)
    slow = object.__new__(JournalLock)
    slow.journal, slow.path, slow._facts = path, f"{path}.lock", journal_lock._facts()
    looked, real = [], journal_lock._read

    def look(at):
        looked.append(at)
        return judged if len(looked) == 1 else real(at)

    journal_lock._read = look
    try:
        assert not slow._rob(judged)
    finally:
        journal_lock._read = real
    quicker.check()
    assert names(Path(path).parent) == ["a.journal.lock"]


def test_a_folder_that_cannot_be_written(path, tmp_path):
    is_root = os.geteuid() == 0
    tmp_path.chmod(0o555)
    if is_root:
        os.seteuid(65534)
    try:
        with pytest.raises(JournalWriteError, match="its folder must be writable"):
            JournalLock(path)
    finally:
        if is_root:
            os.seteuid(0)
        tmp_path.chmod(0o755)


# ---- in a run --------------------------------------------------------------------------------------------------------


def test_a_run_that_was_robbed_ends_and_what_it_wrote_stays(path, monkeypatch):
    monkeypatch.setattr("jd_hpc.journal_writer.FLUSH_S", 0.05)
    sweep = squares(10_000)

    def rob(index, job, result):
        time.sleep(0.001)
        if index == 300:
            rewrite(path, token="another one", host="elsewhere")

    sweep.process_result = rob
    with pytest.raises(JournalHeldError, match=r"was taken over by process .* on elsewhere"):
        sweep.run(journal=path)
    assert Path(f"{path}.lock").exists(), "it is not ours to remove"
    there = contents(path)[0]
    assert 50 < len(there) < 9000
    assert sorted(there) == list(range(len(there)))


def test_a_run_notices_that_its_file_was_changed_or_removed(path, monkeypatch):
    monkeypatch.setattr("jd_hpc.journal_writer.FLUSH_S", 0.05)

    def harm(kind):
        def process_result(index, job, result):
            time.sleep(0.001)
            if index == 200 and kind == "append":
                with Path(path).open("ab") as file:
                    file.write(b"something")
            elif index == 200:
                Path(path).unlink()

        return process_result

    for kind, told in (("append", "somebody else has changed the journal"), ("remove", "was removed while the run was on")):
        sweep = squares(5000)
        sweep.process_result = harm(kind)
        with pytest.raises((JournalHeldError, JournalWriteError), match=told):
            sweep.run(journal=path)
        assert not Path(f"{path}.lock").exists()

"""The history of a run that loses a slave."""

from __future__ import annotations

import json
import subprocess
import sys

from launch_helpers import Launched, environment


def jd_hpc_check(path):
    words = [sys.executable, "-m", "jd_hpc.cli", "check", str(path)]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60)


def test_a_run_that_loses_a_slave(launch, tmp_path):
    path = tmp_path / "history.jsonl"
    ended = launch(4, "history_target.py", path, kind=Launched).wait(60)
    assert (ended.code, ended.out) == (0, "got True\n"), ended
    done = jd_hpc_check(path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 slaves, " in done.stdout
    assert "ended well" in done.stdout
    assert "60 jobs, 60 delivered, 0 failed" in done.stdout
    assert "slave 2 was lost at " in done.stdout
    assert "All promises hold." in done.stdout

    lines = path.read_text().splitlines(keepends=True)
    (lost,) = [at for at, line in enumerate(lines) if json.loads(line)["e"] == "lost"]
    path.write_text("".join(lines[:lost] + lines[lost + 1 :]))  # the same without its loss: its jobs went out twice for nothing
    done = jd_hpc_check(path)
    assert done.returncode == 1
    assert "sent to slave 2, and not answered" in done.stdout

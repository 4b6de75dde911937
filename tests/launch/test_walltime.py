"""Runs that are drained: by signals to each and all, at the end of the walltime; exit code 85, and the next start does the rest."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from launch_helpers import Launch, Launched, Supervised, mpiexec

from jd_hpc.launch import identify
from jd_hpc.signals import AGAIN_S

RANKS = 4
LIMIT_S = 60.0
SLACK_S = 20.0
"""What a drain may take on a busy machine, where it takes 1 to 5 s: jobs last for longer where it matters."""
JOBS = 2000
"""More than can be done before the signal, or within the walltime; the second start's jobs take no time."""
WALLTIME_S = 12
WALLTIME = ["--walltime", f"0:{WALLTIME_S}"]
MARGIN = {"walltime_margin_s": 2}


class SupervisedForATime(Supervised):
    def command(self, *words):
        return super().command(*WALLTIME, *words)


class LaunchedForATime(Launched):
    def command(self, *words):
        return super().command(*WALLTIME, *words)


class Case(NamedTuple):
    """A launch, and who gets which signals."""

    way: type[Launch]
    numbers: tuple[signal.Signals, ...] = ()
    to: object = None
    job_s: float = 0.1
    what: str = "sleep"
    options: tuple[tuple[str, object], ...] = ()


USR2, TERM = signal.SIGUSR2, signal.SIGTERM
DRAINED = [
    *(Case(Launch, (USR2,), to) for to in (0, 2, "all")),
    Case(Launch, (TERM,), 1),
    Case(Supervised, (TERM,), "all"),
    Case(Supervised, (USR2,), "supervisor of 3"),
    Case(Launched, (USR2,), "launcher"),
    Case(Launched, (TERM,), "launcher"),
    Case(Supervised, (USR2,), "launcher"),
    Case(Supervised, (TERM,), "launcher"),
    Case(Launch, (USR2,), 0, options=(("isolate", True),)),
    *(Case(way, options=tuple(MARGIN.items())) for way in (SupervisedForATime, LaunchedForATime)),
    Case(Launch, options=(("walltime", WALLTIME_S), *MARGIN.items())),
]
RESUMED = [DRAINED[0], *(case for case in DRAINED if not case.numbers or (case.way is Supervised and case.to == "launcher"))]
CUT_OFF = [
    *(Case(way, (TERM, TERM), 0, 300, "block") for way in (Launch, Supervised, Launched)),
    *(Case(way, (TERM, TERM), 2, 300, "sleep", (("isolate", True),)) for way in (Launch, Launched)),
]


def passes_on(family, number):
    """Whether the family's mpiexec passes a signal on and goes on itself."""
    return (family, number) in (("openmpi", USR2), ("mpich", TERM))


@pytest.fixture(scope="module")
def family():
    return identify(mpiexec()).family


@pytest.fixture(scope="module")
def ends(launching):
    """What became of each case, and of the second start of those that were drained. A launch mostly waits: three at a time."""

    def end(case):
        with launching() as start:
            options = json.dumps({**dict(case.options), "saves": case.way is Launch})
            one = start(RANKS, "drained.py", JOBS, case.job_s, case.what, options, kind=case.way)
            begin = send(one, case) if case.numbers else time.monotonic()
            ended = one.wait(LIMIT_S)
            seconds = time.monotonic() - begin
            notes = {path.name.removeprefix("note."): path.read_text() for path in one.folder.glob("note.*")}
            again = None
            if case in RESUMED:
                arguments = (JOBS, 0, "sleep", "{}")
                again = start(RANKS, "drained.py", *arguments, kind=Launch, DONE=str(one.folder / "note.done")).wait(LIMIT_S)
                notes["done"] = (one.folder / "note.done").read_text()
            return ended, seconds, notes, again

    cases = [*DRAINED, *CUT_OFF]
    with ThreadPoolExecutor(3) as pool:
        return dict(zip(cases, pool.map(end, cases), strict=True))


def send(one, case):
    """Send the signals in the middle of the run; return when."""
    # with CUT_OFF nothing ever ends: then all slaves have begun
    for name in ["running"] if case.job_s < 1 else [f"pid{rank}" for rank in range(1, RANKS)]:
        one.read(f"note.{name}")
    ranks = [int(one.read(f"note.rank{rank}")) for rank in range(RANKS)]
    if case.to == "launcher":
        to = [one.process.pid]
    elif case.to == "supervisor of 3":
        to = [int(Path(f"/proc/{ranks[3]}/stat").read_text().rpartition(")")[2].split()[1])]
    else:
        to = ranks if case.to == "all" else [ranks[case.to]]
    for at, number in enumerate(case.numbers):
        if at:
            time.sleep(AGAIN_S + 0.2)
        for pid in to:
            os.kill(pid, number)
    return time.monotonic()


def named(case):
    numbers = "-".join(number.name for number in case.numbers) or "walltime"
    return f"{case.way.__name__}-{numbers}-{case.to}-{case.what}{'-isolate' * bool(dict(case.options).get('isolate'))}"


@pytest.mark.parametrize("case", DRAINED, ids=named)
def test_a_run_is_drained_and_the_next_does_the_rest(ends, family, case):
    ended, seconds, notes, again = ends[case]
    done = list(map(int, notes["done"].split()))
    assert len(set(done)) == len(done)
    if again is not None:
        assert sorted(done) == list(range(JOBS))
        assert again.code == 0
        done = done[: JOBS - int(again.out.split()[1])]
    assert 4 <= len(done) < JOBS
    if case.way is Supervised and case.to == "launcher" and not passes_on(family, case.numbers[0]):
        assert ended.code not in (0, 85)  # it ends the ranks, or dies and they are ended: what was written stays
        return
    assert ended.code == 85, ended
    assert "Traceback" not in ended.err
    assert ended.out == ""
    lines = [line for line in ended.err.splitlines() if line.startswith("jd_hpc: drained")]
    assert len(lines) == 1
    assert f": {len(done)} jobs ended, " in lines[0]
    if case.numbers:  # the clock does not wait for a rank that waits for its core
        assert "cut off" not in lines[0]
        assert f"({case.numbers[0].name} at rank " in lines[0]
        assert seconds < SLACK_S
    if case.way is Launch:
        assert notes["saved"].startswith(f"{len(done)} ")


@pytest.mark.parametrize("case", CUT_OFF, ids=named)
def test_what_runs_for_ever_is_cut_off(ends, case):
    ended, seconds, notes, _ = ends[case]
    assert ended.code == 85, ended
    assert "Traceback" not in ended.err
    assert seconds < SLACK_S
    assert f"jd_hpc: drained (SIGTERM at rank {case.to}): 0 jobs ended, " in ended.err
    assert " were cut off; exit code 85" in ended.err
    assert notes["done"] == ""
    if case.way is Launch:
        assert notes["saved"].startswith("0 ")


@pytest.mark.parametrize("number", [USR2, TERM])
def test_a_signal_while_ranks_start(launch, tmp_path, number):
    """Where Python takes its time to start, there is nobody yet who could be drained."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "rank = os.environ.get('PMIX_RANK', os.environ.get('PMI_RANK'))\n"
        "if rank is not None:\n"
        "    open(f'note.starts{rank}', 'w').write('\\n')\n"
        "    time.sleep(2)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    one = launch(3, "drained.py", JOBS, 0.1, "sleep", "{}", kind=Launched, PYTHONPATH=path)
    for rank in range(3):
        one.read(f"note.starts{rank}")
    one.process.send_signal(number)
    ended = one.wait(LIMIT_S)
    assert ended.out == ""
    if number == USR2:  # is remembered for the run
        assert ended.code == 85, ended
        assert "jd_hpc: drained (SIGUSR2 at rank " in ended.err
    else:
        assert ended.code not in (0, 85), ended


@pytest.mark.parametrize("way", [Launch, Supervised])
def test_a_script_that_fails_after_it_was_drained_is_no_unfinished_one(launch, way):
    one = launch(RANKS, "drained.py", JOBS, 300, "sleep", json.dumps({"fails": True}), kind=way)
    send(one, Case(way, (TERM, TERM), 0, 300))
    ended = one.wait(LIMIT_S)
    assert ended.code == 1, ended
    assert " were cut off; exit code 85" in ended.err
    assert "OSError: cannot write the report" in ended.err


@pytest.mark.parametrize("number", [USR2, TERM])
def test_the_process_of_isolated_jobs_leaves_the_signals_to_the_rank(launch, number):
    one = launch(2, "drained.py", 40, 0.05, "sleep", json.dumps({"isolate": True, "max_attempts": 1}))
    one.read("note.running")
    os.kill(int(one.read("note.pid1")), number)
    ended = one.wait(LIMIT_S)
    assert (ended.code, ended.out) == (0, "ended 40\n"), ended


def test_times_that_are_none(launch):
    class Wrong(Launched):
        def command(self, *words):
            return super().command("--walltime", "soon", *words)

    ended = launch(2, "drained.py", kind=Wrong).wait(LIMIT_S)
    assert ended.code == 2
    assert "argument --walltime: 'soon' is no time. Cure: seconds, MM:SS" in ended.err

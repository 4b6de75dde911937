"""One slave, or more, meets a fault at the worst moment: every job ends once all the same, and nothing is left behind."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from launch_helpers import Launched, Supervised

RANKS = 4
LIMIT_S = 60.0
NOTICE_S = 0.05
"""What a death may take to be noticed, where the system tells of it and the master is not in a hook."""
SILENCE_S = 1.0 + 0.1
"""liveness_timeout_s and a beat, as in chaos_target.py; the job's deadline there is as long."""
SLACK_S = 5.0  # three launches at a time on a machine that may be busy with others too

DEATHS = [
    *(("kill", moment) for moment in ("first", "idle", "computing", "big_job", "big_result", "end")),
    ("segv", "first"), ("segv", "computing"), ("exit0", "idle"), ("exit0", "big_result"), ("exit3", "big_job"), ("exit3", "end"),
]  # fmt: skip
SILENCES = [
    ("stop", "computing"), ("stop", "big_result"), ("freeze", "idle"), ("freeze", "computing"), ("hang", "computing"),
    ("hold", "computing"), ("compute", "computing"),
]  # fmt: skip
ISOLATED = [(kind, "computing") for kind in ("kill", "segv", "exit0", "exit3", "eat", "hang")]
CASES = [
    *((Launched, kind, moment, "plain", 1) for kind, moment in [*DEATHS, *SILENCES]),
    *((Supervised, "kill", moment, "plain", 1) for moment in ("computing", "big_job", "end")),
    *((Launched, kind, moment, "isolate", 1) for kind, moment in ISOLATED),
    (Launched, "kill", "computing", "plain", 2),
    (Launched, "kill", "computing", "plain", 3),
    (Launched, "kill", "poison", "plain", 0),
    (Launched, "segv", "poison", "isolate", 0),
]


@pytest.fixture(scope="module")
def seen(launching):
    """What the master of each case saw, and how it ended. Most of the time a launch waits: three at a time."""

    def end(case):
        way, *arguments = case
        with launching() as start:
            ended = start(RANKS, "chaos_target.py", *arguments, kind=way).wait(LIMIT_S)
        lines = [line for line in ended.out.splitlines() if line.startswith("seen ")]
        return ended, json.loads(lines[0].removeprefix("seen ")) if lines else None

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(CASES, pool.map(end, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__}-{'-'.join(map(str, case[1:]))}")
def test_every_job_ends_once(seen, case):
    ended, facts = seen[case]
    assert facts is not None, ended
    way, kind, moment, where, victims = case
    assert facts["complete"], ended
    assert ended.code == 0 or way is Supervised, ended  # mpiexec's default flags may not know better
    stats = facts["stats"]
    if moment == "poison":
        assert [index for index, _ in facts["failed"]] == [31]
        assert len(facts["failed"][0][1]) == 2  # max_attempts, each with its slave and how it ended
    elif victims == RANKS - 1:  # nobody is left; the master does the rest, but not what killed a slave
        assert 1 <= len(facts["failed"]) <= victims
        assert all(len(attempts) == 1 for _, attempts in facts["failed"])
    else:
        assert not facts["failed"]
        assert facts["struck"] == victims
    if where == "isolate":
        assert stats["slaves lost"] == stats["slaves suspected"] == 0
    elif kind in ("kill", "segv", "exit0", "exit3") and moment in ("first", "computing"):
        assert stats["slaves lost"] == victims
        if kind != "segv":  # which writes its report first
            assert max(facts["latency"].values()) < NOTICE_S + SLACK_S
    elif kind in ("stop", "freeze", "hang", "hold") and moment == "computing":
        assert stats["slaves suspected"] >= 1
        assert max(facts["latency"].values()) < SILENCE_S + SLACK_S
        assert stats["slaves lost"] == 0 or kind not in ("stop", "hold")
    elif kind == "compute":
        assert stats["slaves suspected"] == stats["slaves lost"] == 0  # it beats, although it is in C code for 3 x the timeout


def test_the_master_does_not_go_on_alone(launch):
    ended = launch(RANKS, "chaos_target.py", "kill", "alone", "plain", 3, kind=Launched).wait(LIMIT_S)
    assert ended.code != 0
    assert "SlavesLostError: too few slaves are left: 3 were lost, 0 do not answer; local_fallback=True" in ended.err

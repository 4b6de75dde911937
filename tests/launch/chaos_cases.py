"""Runs in which slaves meet a fault: which there are, how one is run, and what must be true of it afterwards.

The rules it keeps:

- A run is told by its words alone: "kill:big_job:plain:2:launch" is a fault, when it comes, to what, to how many slaves, and how
  the ranks are started. Those words repeat it.
- Every run is checked for everything: values, losses, doubles, exit code, hangs, what it left behind.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from launch_helpers import Ended, Launched, Supervised, launches

from jd_hpc.check import check_file
from jd_hpc.errors import HistoryError

RANKS = 4
LIMIT_S = 60.0
NOTICE_S = 0.05
"""What a death may take to be noticed, where the system tells of it and the master is not in a hook."""
SILENCE_S = 1.0 + 0.1
"""liveness_timeout_s and a beat, as in chaos_target.py; a job's deadline there is as long."""
ISOLATED_MARGIN_S = 10.0
"""What the master gives a slave on top, which ends its jobs' process itself."""
SLACK_S = 5.0  # several launches at a time on a machine that may be busy with others too

DEATHS = ("kill", "segv", "exit0", "exit3")
SILENCES = ("stop", "freeze", "hang", "hold")
KINDS = (*DEATHS, "raise", *SILENCES, "compute", "eat")
MOMENTS = ("first", "idle", "computing", "big_job", "big_result", "end")
IN_CHILD = ("first", "computing", "big_job", "big_result")
"""With isolate these strike the jobs' process."""
WAYS = {"launch": Launched, "mpiexec": Supervised}
POISON = 31


class Case(NamedTuple):
    """A run: see above. Moments besides MOMENTS: the script before and after the run; a thread of the slave; a job that is poison;
    and all slaves, with local_fallback=False ("alone")."""

    kind: str
    moment: str
    where: str
    victims: int
    way: str = "launch"

    def __str__(self) -> str:
        return ":".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> Case:
        kind, moment, where, victims, way = text.split(":")
        return cls(kind, moment, where, int(victims), way)

    @property
    def strikes_child(self) -> bool:
        return self.where == "isolate" and self.moment in IN_CHILD

    @property
    def must_end_the_run(self) -> bool:
        """Whether it is right that the run ends with an error: a slave says that it cannot start, or none is left."""
        cannot_start = self.kind == "raise" and self.moment == "first" and not self.strikes_child
        return cannot_start or self.moment in ("alone", "before")

    @property
    def may_end_the_run(self) -> bool:
        """Whether that is right as well: what comes out of the blue may strike jd_hpc's own code, which then reports it.

        And who needs long to find out that it cannot start may find the run over.
        """
        moments = {"raise": ("idle",), "eat": ("first", "idle", "big_job", "big_result")}.get(self.kind, ())
        return self.must_end_the_run or (self.moment in moments and not self.strikes_child)


OTHERS = [
    *(Case(kind, "before", "plain", 1, way) for kind in ("raise", "kill", "exit0") for way in WAYS),
    Case("raise", "after", "plain", 1), Case("raise", "thread", "plain", 1), Case("kill", "after", "plain", 1),
    Case("kill", "poison", "plain", 0), Case("segv", "poison", "isolate", 0), Case("kill", "alone", "plain", 3),
]  # fmt: skip


def matrix() -> list[tuple[Case, ...]]:
    """Return all cells, each with 1, 2 and all slaves as victims."""
    cells = list(itertools.product(KINDS, MOMENTS, ("plain", "isolate"), ("launch",)))
    cells += itertools.product(DEATHS, MOMENTS, ("plain", "isolate"), ("mpiexec",))
    whole = [tuple(Case(kind, moment, where, victims, way) for victims in (1, 2, 3)) for kind, moment, where, way in cells]
    return whole + [(case,) for case in OTHERS]


def draw(seed: int, words: list[str]) -> Iterator[Case]:
    """Draw without end: every cell once, in random order, then every cell again with another number of victims.

    Parameters
    ----------
    seed : int
        Of the order.
    words : list of str
        Only cases that have one of these words in every field that a word names.
    """
    chance = random.Random(seed)
    cells = [list(cell) for cell in matrix() if is_wanted(cell[0], words)]
    for cell in cells:
        chance.shuffle(cell)
    for turn in itertools.count():
        chance.shuffle(cells)
        for cell in cells:
            yield cell[turn % len(cell)]


def is_wanted(case: Case, words: list[str]) -> bool:
    named = {field: {getattr(cell[0], field) for cell in matrix()} & set(words) for field in ("kind", "moment", "where", "way")}
    return all(getattr(case, field) in wanted for field, wanted in named.items() if wanted)


class Seen(NamedTuple):
    """What came of a run: the master's own facts (see scripts/chaos_target.py), if it came to telling them, and all complaints."""

    case: Case
    ended: Ended
    facts: dict[str, Any] | None
    wrong: dict[str, list[str]]


def run(case: Case) -> Seen:
    """Run a case and check it."""
    with launches() as start:
        one = start(RANKS, "chaos_target.py", *case[:4], kind=WAYS[case.way])
        ended = one.finish(LIMIT_S)
        broken = list(check_history(one.folder / "note.history")) if case.moment != "before" else []
    lines = [line for line in ended.out.splitlines() if line.startswith("seen ")]
    seen = check(case, ended, json.loads(lines[0].removeprefix("seen ")) if lines else None)
    return seen._replace(wrong=seen.wrong | {"history": broken}) if broken else seen


def check_history(path: Path) -> Iterator[str]:
    """As `jd-hpc check` does."""
    try:
        runs = check_file(str(path))
    except HistoryError as error:
        yield str(error)
        return
    if len(runs) != 1:
        yield f"{len(runs)} runs"
    for run in runs:
        yield from map(str, run.violations)


def check(case: Case, ended: Ended, facts: dict[str, Any] | None) -> Seen:
    """Say what is wrong."""
    wrong: dict[str, list[str]] = {}
    for what, complaint in itertools.chain(check_end(case, ended, facts), check_facts(case, facts) if facts else ()):
        wrong.setdefault(what, []).append(complaint)
    return Seen(case, ended, facts, wrong)


Complaints = Iterator[tuple[str, str]]
"""The column of the table that each belongs to, and what is wrong."""


def check_end(case: Case, ended: Ended, facts: dict[str, Any] | None) -> Complaints:
    if ended.hangs or "Timeout (0:" in ended.err:  # the latter is faulthandler's
        yield "hangs", f"not over after {ended.seconds:.0f} s"
    for path in ended.left_files if case.moment != "before" else ():  # there mpiexec kills all, and leaves what it ever leaves
        yield "leftovers", f"{path} remains"
    if ended.left_processes:
        yield "leftovers", f"processes {ended.left_processes} remain"
    if facts is None and case.moment != "before":
        yield "lost", "the master has told nothing"
    fails = facts is None or facts["error"] is not None
    if fails and not case.may_end_the_run:
        yield "wrong ends", f"the run ended: {facts and facts['error']}"
    if case.must_end_the_run and not fails:
        yield "wrong ends", "the run did not end"
    # mpiexec's default flags may make an error of a success, never the other way round
    if (ended.code == 0) == fails and (fails or case.way == "launch"):
        yield "wrong ends", f"exit code {ended.code}, error {facts and facts['error']}"


def check_facts(case: Case, facts: dict[str, Any]) -> Complaints:
    if facts["error"] is None and facts["lost"]:
        yield "lost", f"{facts['lost']} jobs"
    if facts["doubled"]:
        yield "doubled", f"{facts['doubled']} jobs"
    if facts["different"]:
        yield "wrong values", f"{facts['different']} results are not those of a local run"
    if not case.victims <= facts["struck"] and case.moment in ("computing", "idle"):
        yield "wrong ends", f"{facts['struck']} slaves were struck"
    yield from check_failures(case, facts)
    yield from check_notices(case, facts)


def check_failures(case: Case, facts: dict[str, Any]) -> Complaints:
    """Only those jobs fail whose own fault it is, or that nobody is left to try again."""
    failed, struck = facts["failed"], facts["struck"]
    types = {name for name, _ in failed.values()}
    attempts = [len(history) for _, history in failed.values()]
    if case.moment == "poison":
        right = list(failed) == [str(POISON)] and attempts == [2]  # max_attempts
    elif case.kind == "raise" and (case.strikes_child or case.moment in ("computing", "big_job", "big_result")):
        right = len(failed) == struck and types <= {"ChaosError", "PayloadError"} and not any(attempts)
    elif case.kind in ("raise", "eat") and not case.strikes_child:
        harmless = {"ChaosError", "MemoryError", "_ArrayMemoryError", "PayloadError"}  # the third one is numpy's
        right = types <= harmless and (case.kind == "eat" or len(failed) <= struck)
    elif case.strikes_child:  # a job may wander from victim to victim
        right = len(failed) <= struck // 3 and all(count == 3 for count in attempts)
    elif case.victims == RANKS - 1:  # nobody is left; the master does the rest, but not what has struck a slave
        right = len(failed) <= struck and all(attempts)
    else:
        right = not failed
    if not right:
        yield "wrong ends", f"failed: {failed}"


def check_notices(case: Case, facts: dict[str, Any]) -> Complaints:
    """What must be noticed is, by what tells it, and soon."""
    stats, notices = facts["stats"], facts["notices"]
    lost, suspected = stats["slaves lost"], stats["slaves suspected"]
    if case.strikes_child and (lost or suspected):
        yield "wrong ends", f"{lost} slaves lost, {suspected} suspected, although only their jobs' processes were struck"
    if case.kind == "compute" and (lost or suspected):
        yield "wrong ends", f"{lost} slaves lost, {suspected} suspected: it beats, although it is in C code for 3 x the timeout"
    if case.moment == "computing" and case.where == "plain":
        if case.kind in DEATHS and lost != case.victims:
            yield "wrong ends", f"{lost} slaves lost"
        if case.kind in SILENCES and not suspected:
            yield "wrong ends", "nobody was suspected"
        if case.kind in ("stop", "hold") and lost:
            yield "wrong ends", f"{lost} slaves lost that came back"
    limits_s = {"connection": NOTICE_S, "silence": SILENCE_S, "deadline": SILENCE_S + ISOLATED_MARGIN_S * (case.where == "isolate")}
    for by, latency_s in notices:
        late = latency_s > limits_s.get(by, SILENCE_S) + SLACK_S
        if late and case.kind != "segv":  # which writes its report first
            yield "wrong ends", f"noticed by {by} after {latency_s:.1f} s"

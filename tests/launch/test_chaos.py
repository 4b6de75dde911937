"""Slaves meet faults at the worst moments: a sample of what `make chaos` runs, with the same checks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
from chaos_cases import KINDS, MOMENTS, Case, check, draw, matrix, run

SAMPLE = [
    # every kind while jobs are computed, every moment with the plainest death; the rest is a choice of what differs
    *(f"{kind}:computing:plain:1:launch" for kind in KINDS if kind != "kill"),
    *(f"kill:{moment}:plain:1:launch" for moment in MOMENTS),
    *(f"{kind}:computing:isolate:1:launch" for kind in ("kill", "exit3", "raise", "hang", "eat")),
    *(f"kill:{moment}:plain:1:mpiexec" for moment in ("computing", "big_job", "end")),
    "exit0:big_result:plain:1:launch", "exit3:big_job:plain:1:launch", "freeze:idle:plain:2:launch",
    "raise:first:plain:1:launch", "raise:idle:plain:1:launch", "raise:big_result:plain:2:launch", "raise:end:plain:1:launch",
    "raise:thread:plain:1:launch", "raise:after:plain:1:launch", "raise:before:plain:1:launch", "kill:before:plain:1:mpiexec",
    "kill:first:isolate:2:launch", "kill:big_result:isolate:1:launch", "hang:big_job:isolate:1:launch",
    "kill:idle:isolate:1:launch", "kill:computing:plain:2:launch", "kill:computing:plain:3:launch",
    "kill:big_result:plain:3:launch", "kill:poison:plain:0:launch", "segv:poison:isolate:0:launch",
]  # fmt: skip


@pytest.fixture(scope="module")
def seen():
    """What came of each case. Most of the time a launch waits: three at a time."""
    with ThreadPoolExecutor(3) as pool:
        return dict(zip(SAMPLE, pool.map(run, map(Case.parse, SAMPLE)), strict=True))


@pytest.mark.parametrize("case", SAMPLE)
def test_every_job_ends_once(seen, case):
    assert not seen[case].wrong, seen[case]


def test_the_master_does_not_go_on_alone():
    seen = run(Case("kill", "alone", "plain", 3))
    assert not seen.wrong, seen
    assert "SlavesLostError: too few slaves are left: 3 were lost, 0 do not answer; local_fallback=True" in seen.ended.err


def test_what_an_exception_in_a_job_says(seen):
    assert [name for name, _ in seen["raise:computing:plain:1:launch"].facts["failed"].values()] == ["ChaosError"]
    assert [name for name, _ in seen["eat:computing:plain:1:launch"].facts["failed"].values()] == ["MemoryError"]


def test_the_checks_bite(seen):
    """A run is measured by what is right for another case."""

    def wrong(case, of):
        return check(Case.parse(case), seen[of].ended, seen[of].facts).wrong

    assert wrong("kill:computing:plain:1:launch", "kill:poison:plain:0:launch").keys() == {"wrong ends"}
    assert wrong("kill:computing:plain:1:launch", "kill:before:plain:1:mpiexec").keys() >= {"lost", "wrong ends"}
    assert wrong("compute:computing:plain:1:launch", "segv:computing:plain:1:launch").keys() == {"wrong ends"}
    assert wrong("raise:first:plain:1:launch", "kill:computing:plain:1:launch").keys() == {"wrong ends"}


def test_what_is_drawn():
    cells = matrix()
    assert len({cell[0][:3] for cell in cells}) >= 11 * 6 * 2
    drawn = list(islice(draw(7, []), 3 * len(cells)))
    assert drawn == list(islice(draw(7, []), 3 * len(cells)))
    assert set(drawn) == {case for cell in cells for case in cell}
    chosen = list(islice(draw(1, ["kill", "stop", "plain"]), 50))
    assert {(case.kind, case.where) for case in chosen} == {("kill", "plain"), ("stop", "plain")}
    assert all(Case.parse(str(case)) == case for case in drawn)

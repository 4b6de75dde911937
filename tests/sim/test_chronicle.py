"""Simulated runs through the checker of histories: it agrees with the simulator's books, and finds a scheduler's faults alone."""

from __future__ import annotations

from collections import Counter

import pytest
from books import Books
from chronicle import Chronicle
from simulator import Scenario, Simulation
from test_sim import MUTATIONS, NEW, PLANTED_RUNS

from jd_hpc import check

SEEDS = 500
UNSEEN = {
    "a retired slot of a lost slave is never free": "slots are the scheduler's own business",
    "a lost slave's credit is not taken back": "nobody gets more than his credit",
    "a suspect's credit is counted twice when it is back": "likewise",
    "a suspect that is back is still counted": "nothing goes wrong because of it",
    "a suspect that is lost is counted as up": "counts are the scheduler's own business",
    "a suspect that is lost is still counted": "likewise",
    "what a lost slave held counts as held": "likewise",
    "a slave that holds as much as it may keeps its turn": "a history does not tell to what the credit was limited",
    "a slave that may hold more gets no turn": "likewise",
    "a slave that answers gets more than is left to give": "likewise",
    "a slave that reports gets something when nothing goes out": "likewise",
    "a slave above its credit gives back too much": "likewise",
    "a returned slave stands in the queue twice": "it looks for a slave for ever, if the books do not stop it before",
    "who answered last gets the next batch": "turns are not promised",
}
"""Faults that break no promise which a history can tell of, or that come to no end."""


@pytest.fixture
def verdict(tmp_path, monkeypatch):
    """Simulates a run and returns what the checker says of its history."""
    path = tmp_path / "history.jsonl"
    monkeypatch.setattr(Chronicle, "path", str(path))

    def run(module, scenario):
        path.unlink(missing_ok=True)
        simulation, error = Simulation(module, scenario, Chronicle), None
        try:
            simulation.run()
        except Exception as caught:
            error = caught
        simulation.books.end(error)
        (found,) = check.check_file(str(path))
        return found, error

    return run


def test_random_runs_hold_all_promises(compiled, verdict):
    seen = Counter()
    for seed in [*NEW, *range(SEEDS)]:
        scenario = Scenario.random(seed)
        run, error = verdict(compiled, scenario)
        how = "drained" if scenario.drains else "ok"
        assert (error, run.how, run.violations) == (None, how, []), f"JD_HPC_SIM_SEEDS={seed}: {run.report()} {scenario}"
        assert scenario.drains or run.counts["delivered"] + run.counts["failed"] == scenario.jobs
        seen.update(run.counts)
    assert min(seen[kind] for kind in ("sent", "late", "refused", "up", "lost", "suspect", "apart", "given_up", "failed")) > 100


def test_a_large_run(compiled, verdict):
    scenario = Scenario(NEW[0], slaves=200, jobs=8000, grain=2, death_rate=0.05, doubt_rate=0.05, faults_until=10)
    run, error = verdict(compiled, scenario)
    assert (error, run.how, run.violations) == (None, "ok", [])
    assert len(run.slaves) > 50


@pytest.mark.parametrize("name", [name for name in MUTATIONS if name not in UNSEEN])
def test_the_checker_alone_finds_a_planted_fault(mutant, verdict, monkeypatch, name):
    monkeypatch.setattr(Books, "check", lambda *_: None)
    module = mutant(*MUTATIONS[name])
    for scenario in PLANTED_RUNS:
        run, _ = verdict(module, scenario)
        if run.violation_count:
            return
    pytest.fail(f"{len(PLANTED_RUNS)} histories did not show that {name}")

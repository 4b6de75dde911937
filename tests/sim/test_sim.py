"""Simulated runs with faults: nothing is lost, nothing comes twice, and everything ends.

Each test names its seeds. JD_HPC_SIM_SEEDS="17,18" adds the seeds it lists; otherwise every session adds a new one. It
is part of the test's name, so that a failure is replayed by setting the variable.
"""

from __future__ import annotations

import os
import random

import pytest
from simulator import Scenario, SimulationError, run

CHOSEN = [int(seed) for seed in os.environ.get("JD_HPC_SIM_SEEDS", "").split(",") if seed]
NEW = CHOSEN or [random.SystemRandom().randrange(1 << 32)]


def simulate(module, scenario):
    try:
        return run(module, scenario)
    except SimulationError as error:
        error.add_note(f"To replay it: JD_HPC_SIM_SEEDS={scenario.seed} pytest tests/sim -k {scenario.seed}")
        raise


@pytest.mark.parametrize("seed", [1, *NEW])
def test_a_thousand_slaves(compiled, seed):
    scenario = Scenario(seed, slaves=1000, jobs=8000, grain=2, death_rate=0.05, doubt_rate=0.05, faults_until=10)
    out = simulate(compiled, scenario)
    assert out.delivered + out.failed == 4000
    assert out.counters["lost"] > 100
    assert out.counters["resent"] > 100
    assert out.counters["late"] > 100
    # memory is bounded by the credit given out, however many jobs there are
    assert out.slots_most <= 1000 * scenario.credit + scenario.read_ahead


@pytest.mark.parametrize("seed", [3, *NEW])
def test_more_jobs_take_no_more_slots(compiled, seed):
    scenario = Scenario(seed, slaves=5, jobs=20000, grain=1, death_rate=0, doubt_rate=0, bogus_rate=0, twice_rate=0)
    out = simulate(compiled, scenario)
    assert out.slots_most <= 5 * scenario.credit + scenario.read_ahead
    assert out.counters == {"sent": 20000, "ended": 20000, "resent": 0, "late": 0, "refused": 0, "lost": 0}


@pytest.mark.parametrize("seed", [4, *NEW])
def test_a_thousand_slaves_wait_for_scarce_jobs(compiled, seed):
    """Turns matter when there are fewer jobs than slaves: all get some, none twice before all others."""
    out = simulate(compiled, Scenario(seed, slaves=1000, jobs=3000, grain=1, scarce=True, faults_until=2))
    assert out.waited_most > 500
    assert out.delivered + out.failed == 3000


@pytest.mark.parametrize("seed", [0, *NEW])
def test_many_small_runs(compiled, seed):
    """A hundred scenarios from one seed: of all sizes and with all faults."""
    seen = dict.fromkeys(("sent", "ended", "resent", "late", "refused", "lost", "failed"), 0)
    for number in range(100):
        out = simulate(compiled, Scenario.random(seed) if number == 0 else Scenario.random(1000 * seed + number))
        for name in seen:
            seen[name] += out.failed if name == "failed" else out.counters[name]
    assert min(seen.values()) > 50, f"the scenarios hardly tried some faults: {seen}"


@pytest.mark.parametrize("seed", [5, *NEW])
def test_uncompiled_takes_the_same_steps(compiled, uncompiled, seed):
    for scenario in (
        Scenario(seed, slaves=50, jobs=600),
        *(Scenario.random(seed + 1 + number) for number in range(10)),
    ):
        assert simulate(uncompiled, scenario) == simulate(compiled, scenario)


def test_a_seed_replays_its_run(compiled):
    assert run(compiled, Scenario(6)) == run(compiled, Scenario(6))
    assert run(compiled, Scenario(6)) != run(compiled, Scenario(7))


# ---- the checks bite ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "an answer to a batch that ended is delivered again": ("if state >= BATCH_ENDED:", "if state > BATCH_RETIRED:"),
    "an old answer matches a slot that was used again": (" or self.batch_first[slot] != first", ""),
    "answers of attempts never made are valid": ("self.batch_jobs[slot] != jobs or attempt > newest", "False"),
    "a lost slave's batches are forgotten": ("count += 1\n                self._again(slot)", "count += 1"),
    "a slot is used again while a live slave works on it": (
        "if self.batch_slave[slot] > 0:\n            self.batch_state[slot] = BATCH_RETIRED\n",
        "if False:\n            pass\n",
    ),
    "a retired slot is never free": ("if state == BATCH_RETIRED and self.batch_slave[slot] == 0:", "if False:"),
    "a retired slot of a lost slave is never free": (
        "if self.batch_state[slot] == BATCH_RETIRED:\n                self._free(slot)",
        "if False:\n                pass",
    ),
    "a batch that ended stays in the queue": ("self._unqueue_batch(slot)\n        self", "pass\n        self"),
    "a slave gets more than its credit": ("if self.slave_held[slave] < self.credit:", "if True:"),
    "a lost slave gets batches": (
        "if self.slave_state[slave] == SLAVE_UP:\n                self.ready",
        "if True:\n                self.ready",
    ),
    "a lost slave's credit is not taken back": ("self.free_credit -= self.credit - self.slave_held[slave]", "pass"),
    "who answered last gets the next batch": (
        "self.ready[tail] = slave\n",
        "self.ready_head = (self.ready_head or self.slave_count + 1) - 1; self.ready[self.ready_head] = slave\n",
    ),
    "one attempt too few": (
        "if self.batch_attempt[slot] < self.max_attempts:",
        "if self.batch_attempt[slot] < self.max_attempts - 1:",
    ),
    "one attempt too many": (
        "if self.batch_attempt[slot] < self.max_attempts:",
        "if self.batch_attempt[slot] <= self.max_attempts:",
    ),
    "a returned slave stands in the queue twice": ("if self.slave_queued[slave]:", "if False:"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_fault_is_found(mutant, name):
    module = mutant(*MUTATIONS[name])
    for seed in range(60):
        try:
            run(module, Scenario.random(seed, jobs=200))
        except SimulationError:
            return
    pytest.fail(f"60 runs did not notice that {name}")

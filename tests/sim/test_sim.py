"""Simulated runs with faults: nothing is lost, nothing comes twice, and everything ends.

Each test names its seeds. JD_HPC_SIM_SEEDS="17,18" adds the seeds it lists; otherwise every session adds a new one. It
is part of the test's name, so that a failure is replayed by setting the variable. Many more runs: soak.py.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import soak
from driver import Driver
from simulator import Scenario, SimulationError, run

import jd_hpc

CHOSEN = [int(seed) for seed in os.environ.get("JD_HPC_SIM_SEEDS", "").split(",") if seed]
NEW = CHOSEN or [random.SystemRandom().randrange(1 << 32)]
NO_FAULTS = {"death_rate": 0, "stop_rate": 0, "doubt_rate": 0, "bogus_rate": 0, "twice_rate": 0, "mute_rate": 0}


def simulate(module, scenario):
    try:
        return run(module, scenario)
    except SimulationError as error:
        error.add_note(f"To replay it: JD_HPC_SIM_SEEDS={scenario.seed} pytest tests/sim -k {scenario.seed}")
        raise


# ---- large runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, *NEW])
def test_a_thousand_slaves(compiled, seed):
    scenario = Scenario(seed, slaves=1000, jobs=8000, grain=2, death_rate=0.05, doubt_rate=0.05, faults_until=10)
    out = simulate(compiled, scenario)
    assert out.delivered + out.failed == 8000
    assert min(out.counters[name] for name in ("lost", "suspected", "reinstated", "resent", "late")) > 50
    # memory is bounded by the credit given out, however many jobs there are
    assert out.slots_most <= 1000 * scenario.credit + scenario.read_ahead


@pytest.mark.parametrize("seed", [3, *NEW])
def test_more_jobs_take_no_more_slots(compiled, seed):
    scenario = Scenario(seed, slaves=5, jobs=20000, grain=1, **NO_FAULTS)
    out = simulate(compiled, scenario)
    assert out.slots_most <= 5 * scenario.credit + scenario.read_ahead
    assert out.counters == dict.fromkeys(out.counters, 0) | {"sent": 20000, "ended": 20000}


@pytest.mark.parametrize("seed", [4, *NEW])
def test_a_thousand_slaves_wait_for_scarce_jobs(compiled, seed):
    """Turns matter when there are fewer jobs than slaves: all get some, none twice before all others."""
    out = simulate(compiled, Scenario(seed, slaves=1000, jobs=3000, grain=1, scarce=True, faults_until=2))
    assert out.waited_most > 500
    assert out.delivered + out.failed == 3000


# ---- one fault at a time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [10, *NEW])
@pytest.mark.parametrize("max_attempts", [2, 3, 6])
@pytest.mark.parametrize("hang_rate", [0, 1])
def test_a_poisonous_job_costs_max_attempts_slaves_and_nobody_elses_job(compiled, seed, max_attempts, hang_rate):
    scenario = Scenario(seed, slaves=8, jobs=300, grain=7, poison=1, max_attempts=max_attempts, hang_rate=hang_rate, **NO_FAULTS)
    out = simulate(compiled, scenario)
    assert list(out.hurt.values()) == [max_attempts]
    assert out.gave_up == list(out.hurt)


@pytest.mark.parametrize("seed", [17, *NEW])
def test_with_one_attempt_a_batch_fails_as_a_whole(compiled, seed):
    out = simulate(compiled, Scenario(seed, slaves=8, jobs=300, grain=5, poison=1, max_attempts=1, **NO_FAULTS))
    assert list(out.hurt.values()) == [1]
    assert out.gave_up == [next(iter(out.hurt)) // 5 * 5 + k for k in range(5)]


@pytest.mark.parametrize("seed", [11, *NEW])
def test_several_poisonous_jobs(compiled, seed):
    out = simulate(compiled, Scenario(seed, slaves=20, jobs=300, grain=5, poison=30, **NO_FAULTS))
    assert out.gave_up == sorted(out.hurt)
    assert len(out.gave_up) == 30
    assert max(out.hurt.values()) == 3


@pytest.mark.parametrize("seed", [12, *NEW])
def test_stopped_slaves_cost_no_job(compiled, seed):
    """They are suspected, their late answers count or do not, and they are taken on again."""
    faults = NO_FAULTS | {"stop_rate": 0.3}
    out = simulate(compiled, Scenario(seed, slaves=10, jobs=1000, max_attempts=200, for_good=0, **faults))
    assert out.delivered == 1000
    assert out.counters["late"] > 0
    assert out.counters["reinstated"] >= out.counters["suspected"] > 20


@pytest.mark.parametrize("seed", [13, *NEW])
def test_when_all_slaves_are_gone_the_master_runs_what_was_never_struck(compiled, seed):
    faults = NO_FAULTS | {"death_rate": 1}
    out = simulate(compiled, Scenario(seed, slaves=4, jobs=200, work_alone=True, gone_rate=1, **faults))
    assert out.counters["lost"] == 4
    assert out.delivered + out.failed == 200
    assert 0 < out.failed <= 4 * 3  # what they ran, in batches of three


@pytest.mark.parametrize("seed", [14, *NEW])
def test_a_batch_is_given_up_after_256_dispatches(compiled, seed):
    """Whatever its strikes: a header has one byte for the attempt."""
    scenario = Scenario(seed, slaves=1, jobs=1, poison=1, max_attempts=1000, **NO_FAULTS)
    out = simulate(compiled, scenario)
    assert out.gave_up == [0]
    assert (out.counters["sent"], sum(out.hurt.values())) == (256, 256)


@pytest.mark.parametrize("seed", [15, *NEW])
def test_floods_of_suspicion(compiled, seed):
    out = simulate(compiled, Scenario(seed, slaves=30, jobs=500, floods=40, flaps=500, max_attempts=200, **NO_FAULTS))
    assert out.counters["suspected"] > 2000
    assert out.delivered + out.failed == 500


# ---- all faults --------------------------------------------------------------------------------------------------

EACH_AT_LEAST = 100  # times that a fault must have happened in 20,000 runs


def test_twenty_thousand_random_runs(compiled):
    """The first ones of the endless row that `make soak` takes from; in processes of their own, not slowed down by coverage."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}
    env["PYTHONPATH"] = str(Path(jd_hpc.__file__).parent.parent)
    command = [sys.executable, soak.__file__, "--seed", "0", "--count", "20000"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    closing = done.stdout.splitlines()[-1]
    assert closing.startswith("20,000 schedules from seed 0 in ")
    facts = closing.partition(" failed; ")[2].split(", ")
    seen = {name: int(number.replace(",", "")) for name, number in (fact.rsplit(" ", 1) for fact in facts)}
    assert len(seen) == 35, f"a fault is missing among {seen}"
    assert min(seen.values()) > EACH_AT_LEAST, f"some faults were hardly tried: {seen}"


def test_a_schedule_that_fails_is_printed_with_its_replay(monkeypatch, capfd):
    def fails_at_seven(module, scenario):
        if scenario.seed == 7:
            raise SimulationError("planted")
        return run(module, scenario)

    monkeypatch.setattr(soak, "run", fails_at_seven)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--seed", "1", "--count", "20", "--processes", "1"])
    assert soak.main() == 1
    said = capfd.readouterr().out
    assert "planted\nFAILED. Replay: python tests/sim/soak.py --seed 7 --count 1\n" in said
    assert "20 schedules from seed 1 in " in said
    assert ": 1 failed; events " in said


@pytest.mark.parametrize("seed", [5, *NEW])
def test_uncompiled_takes_the_same_steps(compiled, uncompiled, seed):
    for scenario in (Scenario(seed, slaves=50, jobs=600), *(Scenario.random(seed + 1 + number) for number in range(100))):
        assert simulate(uncompiled, scenario) == simulate(compiled, scenario)


def test_a_seed_replays_its_run(compiled):
    assert run(compiled, Scenario(6)) == run(compiled, Scenario(6))
    assert run(compiled, Scenario(6)) != run(compiled, Scenario(7))


# ---- the checks bite ---------------------------------------------------------------------------------------------

MUTATIONS = {
    "an answer to a batch that ended is delivered again": ("if state >= BATCH_ENDED:", "if state > BATCH_RETIRED:"),
    "an old answer matches a slot that was used again": (" or self.batch_first[slot] != first", ""),
    "answers of attempts never made are valid": ("self.batch_jobs[slot] != jobs or attempt > newest", "False"),
    "a lost slave's batches are forgotten": ("self.batch_strikes[slot] += 1\n                self._again(slot)", "pass"),
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
    "a slave gets more than its credit": (
        "if self.slave_held[slave] < self.credit:\n            self._queue_slave(slave)\n        return slot",
        "if True:\n            self._queue_slave(slave)\n        return slot",
    ),
    "a lost slave gets batches": (
        "if self.slave_state[slave] == SLAVE_UP:\n                self.ready",
        "if self.slave_state[slave] != SLAVE_SUSPECT:\n                self.ready",
    ),
    "a lost slave's credit is not taken back": ("self.free_credit -= max(0, self.credit - self.slave_held[slave])", "pass"),
    "who answered last gets the next batch": (
        "self.ready[tail] = slave\n",
        "self.ready_head = (self.ready_head or self.slave_count + 1) - 1; self.ready[self.ready_head] = slave\n",
    ),
    "one attempt too few": ("if strikes >= self.max_attempts or", "if strikes >= self.max_attempts - 1 or"),
    "one attempt too many": ("if strikes >= self.max_attempts or", "if strikes > self.max_attempts or"),
    "a returned slave stands in the queue twice": ("if self.slave_queued[slave]:", "if False:"),
    # ---- survival
    "a suspect gets batches": (
        "if self.slave_state[slave] == SLAVE_UP:\n                self.ready",
        "if self.slave_state[slave] != SLAVE_LOST:\n                self.ready",
    ),
    "a suspect's batches are not sent again": (
        "count = self._take_back(slave)\n        self.slave_state[slave] = SLAVE_SUSPECT",
        "self.up_count -= 1; self.free_credit -= self.credit; self.ready_count -= self.slave_queued[slave]; count = 0\n"
        "        self.slave_state[slave] = SLAVE_SUSPECT",
    ),
    "every batch that the slave held is struck": ("if slot == struck:", "if True:"),
    "the newest batch is struck": (
        "self.batch_order[slot] < self.batch_order[found]",
        "self.batch_order[slot] > self.batch_order[found]",
    ),
    "a batch is not taken apart": ("elif strikes > 0 and strikes == self.max_attempts - 1", "elif False"),
    "a batch of one job is taken apart": (" and self.batch_jobs[slot] > 1:", ":"),
    "the jobs of one that was taken apart have no strikes": ("self.batch_strikes[slot] = strikes", "self.batch_strikes[slot] = 0"),
    "a struck batch runs on the master": ("if struck_too or self.batch_strikes[slot] == 0:", "if True:"),
    "a struck batch is forgotten when no slave is left": (
        "            self._give_up(slot)\n        return -1",
        "            pass\n        return -1",
    ),
    "a suspect's credit is counted twice when it is back": (
        "self.reinstated += 1\n",
        "self.reinstated += 1; self.free_credit += self.credit\n",
    ),
    "a suspect that is lost is counted as up": ("self.suspect_count -= 1\n", "self.suspect_count -= 1; self.up_count += 1\n"),
    "a suspect that is lost is still counted": ("self.suspect_count -= 1\n", "pass\n"),
    "a suspect that is back is still counted": ("self.suspect_count -= self.slave_state[slave] == SLAVE_SUSPECT", "pass"),
    "a suspect that is back does not stand in the queue": (
        "self.suspect_count -= self.slave_state[slave] == SLAVE_SUSPECT",
        "if self.slave_state[slave] == SLAVE_SUSPECT and not self.slave_queued[slave]:\n"
        "                self.slave_state[slave] = SLAVE_UP\n"
        "                self.suspect_count -= 1; self.up_count += 1; self.free_credit += self.credit\n"
        "                return 0",
    ),
    # ---- drain
    "a slave that holds as much as it may keeps its turn": (
        "if self.slave_held[slave] < credit:\n                self._queue",
        "if True:\n                self._queue",
    ),
    "a slave that may hold more gets no turn": (
        "if not self.slave_queued[slave]:\n                    self._queue_slave(slave)\n        return 0",
        "pass\n        return 0",
    ),
    "a slave that answers gets more than is left to give": (
        "if self.slave_held[slave] < self.credit:\n            self.free_credit",
        "if True:\n            self.free_credit",
    ),
    "a slave that reports gets something when nothing goes out": ("elif self.credit > 0:", "else:"),
    "what a lost slave held counts as held": ("self.held_count -= self.slave_held[slave]", "pass"),
    "a slave above its credit gives back too much": (
        "max(0, self.credit - self.slave_held[slave])",
        "self.credit - self.slave_held[slave]",
    ),
    "attempts do not grow": ("self.batch_attempt[slot] += 1", "pass"),
}


PLANTED_RUNS = [Scenario.random(seed, jobs=60) for seed in range(60)]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_fault_is_found(mutant, name):
    module = mutant(*MUTATIONS[name])
    for scenario in PLANTED_RUNS:
        try:
            run(module, scenario)
        except (SimulationError, IndexError):  # its own rings may overflow before the books notice
            return
    pytest.fail(f"{len(PLANTED_RUNS)} runs did not notice that {name}")


def test_without_a_planted_fault_the_same_runs_pass(uncompiled):
    for scenario in PLANTED_RUNS:
        run(uncompiled, scenario)


# ---- careless masters, and bounds that hold only where they are checked --------------------------------------------

SUBMIT, FETCH = Driver._submit, Driver._fetch


def forgets_strikes(self, slot, first, jobs, strikes):
    SUBMIT(self, slot, first, jobs, 0)


def fetches_new_jobs_first(self):
    while self.next_job < self.available and (slot := self.s.open()) >= 0:
        jobs = min(self.scenario.grain, self.available - self.next_job)
        self._submit(slot, self.next_job, jobs, 0)
        self.next_job += jobs
    FETCH(self)


def fails_what_it_could_take_apart(self):
    while (slot := self.s.next_given_up()) >= 0:
        self.books.given_up(slot, self.is_alone())
        self._end(slot, "failed")


@pytest.mark.parametrize(
    ("method", "careless", "complaint"),
    [
        ("_submit", forgets_strikes, "a job was struck 4 times"),
        ("_fetch", fetches_new_jobs_first, "jobs are in memory"),
        ("_settle", fails_what_it_could_take_apart, "jobs .* ended otherwise than they were given up"),
    ],
)
def test_a_careless_master_is_found(compiled, monkeypatch, method, careless, complaint):
    monkeypatch.setattr(Driver, method, careless)
    with pytest.raises(SimulationError, match=complaint):
        run(compiled, Scenario(16, slaves=4, jobs=400, grain=4, poison=100, **NO_FAULTS))


@pytest.mark.parametrize(
    ("scenario", "complaint"),
    [
        (Scenario(0, death_rate=0.6, max_attempts=2), "innocent jobs were given up"),
        (
            Scenario(1, slaves=4, jobs=100, poison=5, stop_rate=0.5, death_rate=0.3, mute_rate=1, max_attempts=2),
            "slaves that poisonous jobs cost",
        ),
    ],
)
def test_with_other_faults_the_bounds_on_poison_alone_do_not_hold(compiled, monkeypatch, scenario, complaint):
    """So they are checked, and can fail."""
    run(compiled, scenario)
    monkeypatch.setattr(Scenario, "only_poison", True)
    with pytest.raises(SimulationError, match=complaint):
        run(compiled, scenario)

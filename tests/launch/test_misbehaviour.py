"""A slave that sends what no slave sends, that stays in a hook, or that stops for a while: its own loss, and nobody else's."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from launch_helpers import SCRIPTS, Launched, Supervised

NONSENSE = re.findall(r'^        "(.*?)": ', (SCRIPTS / "says_nonsense.py").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def nonsense(launching):
    """What became of each. A launch mostly waits: three at a time."""

    def end(what):
        with launching() as start:
            return start(3, "says_nonsense.py", what, kind=Launched).wait()

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(NONSENSE, pool.map(end, NONSENSE), strict=True))


def test_all_nonsense_is_tried():
    assert len(NONSENSE) == 32


@pytest.mark.parametrize("what", NONSENSE)
def test_a_sender_of_nonsense_is_lost(nonsense, what):
    ended = nonsense[what]
    assert ended.code == 0, ended
    assert ended.out.splitlines() == ["failed 1", "answer 100 328350 1"], ended
    assert ended.err.count("rank 1 is not believed any more: ") == 1, ended


@pytest.mark.parametrize("hook", ["startup", "shutdown"])
def test_nobody_waits_for_a_slave_that_stays_in_a_hook(launch, hook):
    ended = launch(3, "stays_too_long.py", hook, kind=Launched).wait()
    assert ended.code == 0, ended
    assert f"answer 100 328350 {int(hook == 'startup')} 0" in ended.out, ended


def test_a_slow_start_is_no_loss(launch):
    ended = launch(3, "stays_too_long.py", "slow startup", kind=Launched).wait()
    assert ended.code == 0, ended
    assert "started 1\n" in ended.out
    assert "answer 100 328350 1 1" in ended.out
    assert "MPI_Abort" not in ended.err  # all ranks are there in the end


def test_a_job_waits_for_the_only_slave_to_come_back(launch):
    ended = launch(2, "stops_a_while.py", kind=Launched).wait()
    assert ended.code == 0, ended
    assert "answer 100 328350 1" in ended.out, ended  # and no job was given up


def test_a_hook_that_raises_at_a_loss_hides_no_other_loss(launch):
    ended = launch(4, "cannot_bear_losses.py", kind=Supervised).wait()
    assert ended.code != 0, ended
    assert sorted(ended.out.splitlines()) == ["failed 2", "failed 3"], ended
    assert "OSError: a slave too few" in ended.err


def test_a_slave_that_reports_for_a_run_and_dies_before_it_begins(launch):
    ended = launch(3, "dies_between_runs.py", kind=Supervised).wait()
    assert ended.code == 0, ended
    assert "answer 100 328350 1\n" in ended.out, ended

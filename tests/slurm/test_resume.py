"""A run that is cut into turns: by the end of the time, and by preemption. Each result comes once, and no job runs twice."""

from __future__ import annotations

from cluster import wait_for

JOBS = 80


def ends_well(user, job, turns):
    assert user.cluster.wait_over(job, limit_s=100) == 0, user.printed()
    assert user.cluster.facts(job)["Restarts"] == str(turns - 1)
    assert user.result()["each job once"], user.result()
    assert user.ran() == list(range(JOBS)), user.printed()
    shown = user.jd_hpc("journal", "show", "sweep.journal")
    assert shown.code == 0, shown.out


def test_signal_drain_requeue_resume(user):
    job = user.submit("resume.sbatch", JOBS, 0.1)
    for turn in range(2):
        wait_for(f"results of turn {turn}", lambda turn=turn: user.has_progress(turn, 8 * (turn + 1)), 60)
        user.cluster.command("scancel", "--batch", "--signal=USR2", job)
        user.cluster.run_now(job)
    ends_well(user, job, turns=3)


def test_preemption(user):
    job = user.submit("resume.sbatch", JOBS, 0.1)
    wait_for("results", user.has_progress, 60)
    urgent = user.submit("--partition=urgent", "--nodes=4", "--exclusive", "--output=urgent", "--wrap=sleep 1")
    assert user.cluster.wait_over(urgent) == 0
    user.cluster.run_now(job)
    ends_well(user, job, turns=2)

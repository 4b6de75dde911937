"""What may happen to a run on a cluster: no launcher's word for the MPI, a rank that dies, a node that is lost."""

from __future__ import annotations

import pytest
from cluster import wait_for

JOBS = 80


@pytest.mark.parametrize("how", [["-m", "jd_hpc"], []], ids=["supervised", "plain"])
def test_silent_singletons_are_refused(user, how):
    done = user.run("srun", "-N2", "-n4", "--mpi=none", "--time=1", user.python, *how, "sweep.py", JOBS, 0)
    assert done.code == 1, done.out
    assert "4 processes were launched, but MPI sees only this one" in done.out
    assert f"--mpi={user.mpi_type}" in done.out
    assert "jd-hpc slurm env" in done.out
    assert user.ran() == []


def finished_without(user, job, lost):
    """Every job ended once, and the exit code is 0, though these ranks were lost."""
    code = user.cluster.wait_over(job, limit_s=100)
    result = user.result()
    assert code == 0, user.printed()
    assert user.cluster.state(job) == "COMPLETED"
    assert result["each job once"], result
    assert result["lost"] == lost or len(result["lost"]) == lost, user.printed()


def test_a_rank_is_killed(user):
    job = user.submit("survive.sbatch", JOBS, 0.05, JD_TEST_KILL="7")
    finished_without(user, job, lost=1)
    assert (user.folder / "killed").exists()


@pytest.mark.parametrize("how", ["declared down", "power cut"])
def test_a_node_is_lost(user, how):
    job = user.submit("survive.sbatch", JOBS, 0.1)
    wait_for("results", user.has_progress, 60)
    if how == "declared down":
        user.cluster.command("scontrol", "update", "nodename=n3", "state=down", "reason=trial")
    else:
        user.cluster.power_off("n3")
    finished_without(user, job, lost=[4, 5])
    assert user.result()["hosts"] == ["n1", "n2", "n3"]


def test_the_master_is_killed(user):
    (user.folder / "suicide.py").write_text(
        "import os, signal, time\nfrom mpi4py import MPI\nfrom jd_hpc import JobDispatcher\n"
        "class Dies(JobDispatcher):\n"
        "    def next_job(self):\n        return 1\n"
        "    def process_job(self, job):\n        time.sleep(0.05)\n"
        "    def process_result(self, index, job, result):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Dies(vm=MPI.COMM_WORLD).run()\n"
    )
    job = user.submit("basic.sbatch", SCRIPT="suicide.py")
    assert user.cluster.wait_over(job, limit_s=60) != 0, user.printed()

"""Every template runs as it is shipped, for both MPI families; so does one that was rendered."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from slurm_helpers import FAMILIES, TEMPLATES

SIZES = {"basic": 4, "resume": 4, "array": 2, "survive": 6, "big": 16, "rendered": 3}
"""The ranks that each of them has, or its tasks have."""
JOBS = 60


def test_no_template_is_forgotten():
    assert {path.stem for path in TEMPLATES.glob("*.sbatch")} == set(SIZES) - {"rendered"}


@pytest.fixture(scope="module")
def runs(whole_cluster, as_user):
    """(family, template) → the user, and what became of ``sbatch -W``. It mostly waits: three at a time."""

    def run(case):
        user = as_user(case[0], f"as-is-{case[1]}")
        if case[1] == "rendered":
            numbers = ["--nodes", 3, "--tasks-per-node", 1, "--time", "10:00", "--partition", "main", "--script", "sweep.py"]
            done = user.jd_hpc("slurm", "render", *numbers, "-o", "rendered.sbatch")
            assert done.code == 0, done.out
        return user, user.run("sbatch", "-W", f"{case[1]}.sbatch", JOBS, 0.02)

    whole_cluster.repair()
    cases = [(family, template) for family in FAMILIES for template in SIZES]
    with ThreadPoolExecutor(3) as pool:
        return dict(zip(cases, pool.map(run, cases), strict=True))


@pytest.mark.parametrize("template", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_runs_as_it_is(runs, family, template):
    user, done = runs[family, template]
    said = done.out + user.printed()
    assert done.code == 0, said
    tasks = range(4) if template == "array" else range(1)
    results = [user.result(task) for task in tasks]
    assert sorted(job for result in results for job in result["jobs"]) == list(range(JOBS)), said
    assert {result["size"] for result in results} == {SIZES[template]}, said
    assert not any(result["lost"] for result in results), said
    assert "Traceback" not in said
    assert "WARN" not in said.upper(), said


@pytest.mark.parametrize("family", FAMILIES)
def test_the_journals_of_an_array_make_one(runs, family):
    user = runs[family, "array"][0]
    journals = sorted(path.name for path in user.folder.glob("sweep.[0-9]*.journal"))
    assert len(journals) == 4
    merged = user.jd_hpc("journal", "merge", "--append", "sweep.journal", *journals)
    assert merged.code == 0, merged.out
    exported = user.jd_hpc("journal", "export", "sweep.journal", "sweep.csv")
    assert exported.code == 0, exported.out
    assert len((user.folder / "sweep.csv").read_text().splitlines()) == JOBS + 1

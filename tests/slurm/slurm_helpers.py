"""A user of the cluster: a folder with sweep.py and the templates in it, and an environment of one MPI family."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from cluster import Cluster, Done

PROJECT = Path(__file__).parents[2]
TEMPLATES = PROJECT / "slurm"
SWEEP = Path(__file__).parent / "scripts/sweep.py"
FAMILIES = ("openmpi", "mpich")


def refuse(why: str) -> None:
    """Skip the test, or fail where skipping is not allowed."""
    if os.environ.get("JD_HPC_SLURM") == "required":
        pytest.fail(f"no Slurm here, though it is required: {why}", pytrace=False)
    pytest.skip(why)


class User:
    """Somebody with a folder, who has an environment of one MPI family active, and in the folder sweep.py and the templates."""

    def __init__(self, cluster: Cluster, family: str, python: str, name: str) -> None:
        self.cluster, self.family, self.python = cluster, family, python
        self.mpi_type = {"openmpi": "pmix", "mpich": "pmi2"}[family]
        self.folder = Path(tempfile.mkdtemp(prefix=f"{name}-{family}-", dir=cluster.folder))
        for path in (SWEEP, *TEMPLATES.glob("*.sbatch")):
            shutil.copy(path, self.folder)
        self.settings = {"PATH": f"{Path(python).parent}:{os.environ['PATH']}"}

    def run(self, *words: object, limit_s: float = 150.0, **settings: str) -> Done:
        """Run a command in the folder."""
        return self.cluster.command(*words, limit_s=limit_s, cwd=self.folder, **(self.settings | settings))

    def jd_hpc(self, *words: object) -> Done:
        """Run the command jd-hpc."""
        return self.run(self.python, "-m", "jd_hpc.cli", *words)

    def submit(self, *words: object, **settings: str) -> str:
        """Give a job to sbatch, and return its number."""
        return self.cluster.submit("--output=out", *words, cwd=self.folder, **(self.settings | settings))

    def result(self, task: int = 0) -> dict:
        """What sweep.py found at its end."""
        path = self.folder / f"result.{task}.json"
        assert path.exists(), self.printed()
        return json.loads(path.read_text())

    def ran(self) -> list[int]:
        """The jobs that slaves began, in all turns."""
        return sorted(int(line) for path in self.folder.glob("ran.*") for line in path.read_text().splitlines())

    def printed(self) -> str:
        """What the jobs printed."""
        return "".join(f"{path.name}:\n{path.read_text(errors='replace')}\n" for path in self.folder.glob("*out*"))

    def has_progress(self, turn: int = 0, jobs: int = 4) -> bool:
        """Whether some results are there."""
        path = self.folder / f"progress.{turn}"
        return path.exists() and int(path.read_text() or 0) >= jobs

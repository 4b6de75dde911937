"""What several tests share: the scheduler compiled, its source uncompiled, and the same with a fault planted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import jd_hpc
import jd_hpc.scheduler

SOURCE = Path(jd_hpc.__file__).parent / "scheduler.py"


def load_uncompiled() -> ModuleType:
    """Import scheduler.py as plain Python, next to the compiled module of that name."""
    spec = importlib.util.spec_from_file_location("scheduler_uncompiled", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiled() -> ModuleType:
    """The scheduler as it is installed."""
    assert not str(jd_hpc.scheduler.__file__).endswith(".py"), "jd_hpc.scheduler is not compiled"
    return jd_hpc.scheduler


@pytest.fixture(scope="session")
def uncompiled() -> ModuleType:
    """The scheduler's source, run as plain Python."""
    return load_uncompiled()


@pytest.fixture(scope="session", params=["compiled", "uncompiled"])
def scheduler_module(request) -> ModuleType:
    """Either of the two."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def mutant():
    """A function that returns the uncompiled scheduler with one piece of its source replaced."""

    def make(old: str, new: str) -> ModuleType:
        text = SOURCE.read_text()
        assert text.count(old) == 1, f"scheduler.py holds {text.count(old)} times {old!r}: adapt the mutation"
        module = ModuleType("scheduler_mutant")
        # a name of its own, so that coverage does not count a mutant's lines as the scheduler's
        exec(compile(text.replace(old, new), "<scheduler mutant>", "exec"), vars(module))
        return module

    return make

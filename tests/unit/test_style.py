"""House rules that a program can check."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import jd_hpc

PACKAGE = Path(jd_hpc.__file__).parent
SOURCES = sorted(path for end in ("py", "pyx", "pxd", "pxi", "pyi") for path in PACKAGE.glob(f"*.{end}"))
MODULES = [name for _, name, _ in pkgutil.iter_modules([str(PACKAGE)]) if not name.startswith("_")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_file_can_be_read_in_one_go(path):
    assert len(path.read_text().splitlines()) <= 650


@pytest.mark.parametrize("name", jd_hpc.__all__)
def test_public_names_exist_and_are_described(name):
    assert name.startswith("__") or inspect.getdoc(getattr(jd_hpc, name))


def described(thing, name):
    """The names of what is public in a module or class and has no docstring."""
    missing = [] if thing.__doc__ else [name]
    for key, value in vars(thing).items():
        inner = getattr(value, "__func__", value.fget if isinstance(value, property) else value)
        own = getattr(inner, "__module__", None) == getattr(thing, "__module__", thing.__name__)
        if key.startswith("_") or not own:
            continue
        if inspect.isclass(inner):
            missing += described(inner, f"{name}.{key}")
        elif inspect.isroutine(inner) and not inner.__doc__:
            missing.append(f"{name}.{key}")
    return missing


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    module = importlib.import_module(f"jd_hpc.{name}")
    assert described(module, name) == []


def test_the_docstring_check_bites():
    def public(self):
        pass

    public.__module__ = "nowhere"
    kind = type("Kind", (), {"public": public, "_private": public, "__doc__": "Said.", "__module__": "nowhere"})
    assert described(kind, "Kind") == ["Kind.public"]

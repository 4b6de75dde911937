"""House rules that a program can check."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
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


def shadowed(source):
    """Attributes of compiled classes that a derived class has again: Cython makes two of them, and says nothing."""
    owned, parents, kind = {}, {}, None
    for line in source.splitlines():
        if found := re.match(r"cdef class (\w+)(?:\((\w+)\))?:", line):
            kind = found[1]
            parents[kind] = found[2]
            owned[kind] = set()
        elif kind and (found := re.match(r"    cdef [\w \*\[\]:]*[\s\*](\w+) *(?:#.*)?$", line)):
            owned[kind].add(found[1])
    wrong = []
    for kind, names in owned.items():
        parent = parents[kind]
        while parent in owned:
            wrong += [f"{kind}.{name} hides {parent}.{name}" for name in sorted(names & owned[parent])]
            parent = parents[parent]
    return wrong


def test_no_compiled_class_hides_an_attribute():
    core = "".join((PACKAGE / name).read_text() for name in ("_core.pyx", *sorted(path.name for path in PACKAGE.glob("*.pxi"))))
    assert "cdef class Master(" in core
    assert shadowed(core) == []


def test_the_check_for_hidden_attributes_bites():
    classes = "cdef class A:\n    cdef public int *one  # for each\ncdef class B(A):\n    cdef int two\n"
    classes += "cdef class C(B):\n    cdef int[::1] one\n"
    assert shadowed(classes) == ["C.one hides A.one"]

"""The layout that wire.py tells is the one that is compiled."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jd_hpc
from jd_hpc import wire
from jd_hpc.machine import load_core


@pytest.fixture(scope="module")
def layout():
    pytest.importorskip("mpi4py")
    return load_core().layout()


def test_header_has_32_bytes_without_gaps():
    assert wire.HEADER_DTYPE.itemsize == wire.HEADER_BYTES == 32
    assert sum(wire.HEADER_DTYPE[name].itemsize for name in wire.HEADER_DTYPE.names) == 32
    aligned = np.dtype([(name, wire.HEADER_DTYPE[name]) for name in wire.HEADER_DTYPE.names], align=True)
    assert aligned.fields == wire.HEADER_DTYPE.fields  # as C lays it out


def test_numbers_are_the_compiled_ones(layout):
    assert layout.pop("sizeof") == wire.HEADER_DTYPE.itemsize
    assert {name: getattr(wire, name) for name in layout} == layout


def test_fields_are_those_of_the_struct():
    text = (Path(jd_hpc.__file__).parent / "wire.pxd").read_text()
    in_c = re.findall(r"^    (u?int\d+)_t (\w+)", text[text.index("cdef struct Header") :], re.MULTILINE)
    assert [(name, np.dtype(kind)) for kind, name in in_c] == [
        (name, wire.HEADER_DTYPE[name]) for name in wire.HEADER_DTYPE.names
    ]


def test_limits():
    assert wire.INLINE_BYTES == wire.MESSAGE_BYTES - wire.HEADER_BYTES
    assert wire.MESSAGE_BYTES <= 4096, "over the smallest eager limit"
    assert wire.TAG_MESSAGE < wire.TAG_BODY
    assert wire.TAG_BODY + wire.TAG_BODY_COUNT - 1 <= 32767, "MPI promises no larger tags"
    assert wire.UNIT_FROM_BYTES % wire.UNIT_BYTES == 0
    assert len(set(wire.KINDS.values())) == len(wire.KINDS)
    assert 0 not in wire.KINDS.values(), "memory that nobody wrote to must not look like a message"


@given(st.integers(0, 1 << 50))
def test_padded_bytes(body_bytes):
    padded = wire.padded_bytes(body_bytes)
    if body_bytes < wire.UNIT_FROM_BYTES:
        assert padded == body_bytes
    else:
        assert padded % wire.UNIT_BYTES == 0
        assert 0 <= padded - body_bytes < wire.UNIT_BYTES


@pytest.mark.parametrize("change", [-1, 0, 1])
def test_padded_bytes_at_the_edge(change):
    padded = wire.padded_bytes(wire.UNIT_FROM_BYTES + change)
    assert padded - wire.UNIT_FROM_BYTES == {-1: -1, 0: 0, 1: wire.UNIT_BYTES}[change]

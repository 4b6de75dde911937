"""map_array without MPI; tests/mpi has the rest."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from jd_hpc import JobError, Unfinished, map_array
from jd_hpc.arrays import BLOCK_BYTES, MapArray
from jd_hpc.machine import LocalMachine
from jd_hpc.wire import INLINE_BYTES


def test_a_function():
    assert map_array(abs, [-1.0, 2.0], "f8").tolist() == [1.0, 2.0]
    assert map_array(np.cumsum, np.ones((4, 3)), ("f8", 3)).tolist() == [[1, 2, 3]] * 4


def test_a_block():
    rows = np.arange(10_000.0)
    sizes = []

    def root(block):
        assert not block.flags.writeable
        sizes.append(len(block))
        return np.sqrt(block)

    assert np.array_equal(map_array(root, rows, "f8", vectorized=True), np.sqrt(rows))
    assert max(sizes) == 10_000 // 64


def test_the_rows_are_left_alone():
    rows = np.arange(5.0)
    with pytest.raises(JobError, match="read-only"):
        map_array(lambda block: block.sort(), rows, "f8", vectorized=True)
    assert rows.flags.writeable


@pytest.mark.parametrize(
    ("vectorized", "row_bytes", "count", "grain"),
    [
        (False, 8, 10**6, INLINE_BYTES // 8),
        (False, 8, 6400, 100),
        (False, 8, 63, 1),
        (False, 10_000, 10**4, 1),
        (True, 8, 10**7, BLOCK_BYTES // 8),
    ],
)
def test_the_grain_that_is_chosen(vectorized, row_bytes, count, grain):
    dispatcher = MapArray(abs, "i1", LocalMachine(), vectorized, False, "raise", None, {})
    rows = np.broadcast_to(np.zeros(row_bytes, "i1"), (count, row_bytes))  # takes no memory
    assert dispatcher._look_at(rows) == (np.dtype(("i1", row_bytes)), grain)


def test_no_mpi_is_imported():
    program = "import sys, jd_hpc; jd_hpc.map_array(abs, [1.0], 'f8'); assert 'mpi4py' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_options_are_passed_on(tmp_path):
    with pytest.raises(Unfinished):
        map_array(abs, [1.0], "f8", walltime=1.0, walltime_margin_s=0.9999999)
    assert map_array(abs, [1.0], "f8", journal=tmp_path / "a.journal").tolist() == [1.0]
    assert (tmp_path / "a.journal").exists()
    with pytest.raises(TypeError, match="nonsense"):
        map_array(abs, [1.0], "f8", nonsense=1)

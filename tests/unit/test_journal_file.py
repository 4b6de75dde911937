"""The file of a journal: cut anywhere, flipped anywhere, read while it grows."""

from __future__ import annotations

import os

import numpy as np
import pytest
from journal_helpers import block_bounds, contents, squares

from jd_hpc.errors import JournalFormatError, JournalMismatchError, JournalWriteError, PayloadError
from jd_hpc.journal_file import (
    BLOCK_MAGIC,
    FACTS,
    FILE_MAGIC,
    HEAD,
    OBJECTS,
    ROWS,
    JournalReader,
    Table,
    beginning,
    dtype_of,
    dtype_text,
    encode_block,
    load,
)
from jd_hpc.journal_writer import JournalWriter, make_file, new_facts, write_all

DTYPES = [
    "f8", ">f8", "<i2", "?", "c16", "U5", "S3", "M8[ns]", ("f8", 3), (">i4", (2, 3)), [("x", "f8"), ("n", "i4")],
    [("x", "f8", (2,)), ("in", [("a", ">u2"), ("b", "S2")])], np.dtype([("c", "i1"), ("x", "f8")], align=True),
    (np.dtype([("c", "i1"), ("x", "f8")], align=True), (2,)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dtype_survives_as_text(dtype):
    assert dtype_of(dtype_text(np.dtype(dtype), "result_dtype")) == np.dtype(dtype)


def test_a_dtype_that_no_text_describes_is_refused():
    overlapping = np.dtype({"names": ["a", "b"], "formats": ["f8", "i4"], "offsets": [0, 0]})
    with pytest.raises(PayloadError, match="a journal cannot keep"):
        dtype_text(overlapping, "result_dtype")


def facts(result="f8"):
    return new_facts(dtype_text(np.dtype(result), "result_dtype"), dtype_text(np.dtype("f8"), "job_dtype"), "Test")


def rows_block(first, values, synced=0):
    count = len(values)
    body = [np.arange(first, first + count).tobytes(), np.arange(count, dtype="u8").tobytes(), np.asarray(values, "f8").tobytes()]
    return b"".join(encode_block(ROWS, count, body, synced))


@pytest.fixture
def three_blocks(tmp_path):
    """A journal of three blocks, written as if the first had reached the disk before the others were written."""
    path = tmp_path / "three"
    make_file(str(path), facts())
    with path.open("ab") as file:
        file.write(rows_block(0, [1.0, 2.0]))
        file.flush()
        synced = path.stat().st_size
        file.write(rows_block(2, [3.0, 4.0, 5.0], synced))
        file.write(rows_block(5, [6.0, 7.0], synced))
    return path


def test_what_was_written_is_read(three_blocks):
    with JournalReader(str(three_blocks)) as reader:
        table, end = load(reader)
        assert end == three_blocks.stat().st_size
        assert table.count == table.end == 7
        offsets = table.offsets[:7]
        assert reader.rows(offsets).tolist() == [1, 2, 3, 4, 5, 6, 7]
        assert reader.rows(offsets[::-1].copy()).tolist() == [7, 6, 5, 4, 3, 2, 1]
        assert reader.rows(offsets[[5, 0, 5]]).tolist() == [6, 1, 6]
        assert reader.rows(offsets[:0]).tolist() == []


def test_far_and_large_results_are_read(tmp_path):
    """Results that lie far apart, and such as take several reads."""
    path, length = tmp_path / "large", 300_000
    make_file(str(path), facts(("f8", length)))
    written = np.arange(6.0)[:, None] + np.arange(length)
    with path.open("ab") as file:
        for at in (3, 1, 0, 2, 5, 4):
            body = [np.array([at]).tobytes(), np.zeros(1, "u8").tobytes(), written[at].tobytes()]
            file.write(b"".join(encode_block(ROWS, 1, body, 0)))
    with JournalReader(str(path)) as reader:
        table, _ = load(reader)
        assert np.array_equal(reader.rows(table.offsets[:6]), written)
        assert np.array_equal(reader.rows(table.offsets[[4, 0]]), written[[4, 0]])


def test_the_first_result_of_an_index_counts():
    table = Table(False)
    block = _block_of([3, 1], offset=100)
    table.add(block)
    table.add(_block_of([1, 2], offset=900))
    assert (table.count, table.end) == (3, 4)
    assert table.offsets[:4].tolist() == [-1, 108, 908, 100]
    assert table.missing() == [(0, 0)]


def _block_of(indices, offset):
    from jd_hpc.journal_file import Block

    count = len(indices)
    offsets, sizes = offset + 8 * np.arange(count), np.full(count, 8)
    return Block(0, 0, 0, np.array(indices), np.zeros(count, "u8"), offsets, sizes)


def test_a_file_cut_at_every_byte_of_its_last_block(three_blocks):
    data = three_blocks.read_bytes()
    (_, _, (last, end)) = block_bounds(three_blocks)
    assert end == len(data)
    for length in range(last, end):
        three_blocks.write_bytes(data[:length])
        writer = JournalWriter(str(three_blocks), facts())
        table = writer.take_table()
        assert table.indices().tolist() == [0, 1, 2, 3, 4], length
        writer.add(1, [np.array([5]).tobytes(), np.array([0], "u8").tobytes(), np.array([60.0]).tobytes()])
        writer.close()
        found, damage = contents(three_blocks)
        assert sorted(found) == [0, 1, 2, 3, 4, 5], length
        assert damage == []


def test_a_bit_flipped_in_any_byte_of_the_last_block(three_blocks):
    data = bytearray(three_blocks.read_bytes())
    last = block_bounds(three_blocks)[-1][0]
    for at in range(last, len(data)):
        data[at] ^= 1 << at % 8
        three_blocks.write_bytes(data)
        with JournalReader(str(three_blocks)) as reader:
            table, end = load(reader)
        assert (table.indices().tolist(), end) == ([0, 1, 2, 3, 4], last), at
        data[at] ^= 1 << at % 8


def test_damage_in_what_was_on_the_disk_is_an_error(three_blocks):
    data = bytearray(three_blocks.read_bytes())
    (first, second), *_ = block_bounds(three_blocks)
    for at in range(first, second):
        data[at] ^= 1 << at % 8
        three_blocks.write_bytes(data)
        with pytest.raises(JournalFormatError, match=f"damaged from byte {first} to {second}.* 5 results are whole, 5 .*merge NEW"):
            JournalWriter(str(three_blocks), facts())
        assert three_blocks.read_bytes() == data, "a damaged file is left as it is"
        data[at] ^= 1 << at % 8


def test_damage_behind_what_was_on_the_disk_is_a_torn_end(three_blocks):
    """A machine that loses power may have written a later page and not an earlier one."""
    data = bytearray(three_blocks.read_bytes())
    bounds = block_bounds(three_blocks)
    data[bounds[1][0] + HEAD.size + 3] ^= 1
    three_blocks.write_bytes(data)
    JournalWriter(str(three_blocks), facts()).close()
    assert sorted(contents(three_blocks)[0]) == [0, 1]


def test_a_beginning_that_is_cut_or_damaged(tmp_path):
    path = tmp_path / "begun"
    whole = beginning(facts())
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        told = "no journal of jd_hpc" if length < len(FILE_MAGIC) else "damaged at its beginning"
        with pytest.raises(JournalFormatError, match=told):
            JournalReader(str(path))
    path.write_bytes(b"")  # nothing is lost: as if it were not there
    JournalWriter(str(path), facts()).close()
    assert contents(path) == ({}, [])


def test_other_files_are_refused(tmp_path):
    other = tmp_path / "other"
    other.write_text("index,result\n" * 20)
    with pytest.raises(JournalFormatError, match="no journal of jd_hpc"):
        squares(3).run(journal=other)
    assert other.read_text() == "index,result\n" * 20
    assert not (tmp_path / "other.lock").exists()
    with pytest.raises(JournalWriteError, match="cannot be opened"):
        JournalReader(str(tmp_path / "none"))
    with pytest.raises(JournalWriteError, match="is no plain file"):
        squares(3).run(journal=tmp_path)
    with pytest.raises(JournalWriteError, match=r"needs the folder .*nowhere, which is not there"):
        squares(3).run(journal=tmp_path / "nowhere" / "a")


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "newer"
    path.write_bytes(beginning(facts()._replace(version=2)))
    with pytest.raises(JournalFormatError, match="has format 2, and this jd_hpc knows 1"):
        squares(3).run(journal=path)


def test_other_dtypes_are_refused(tmp_path):
    path = tmp_path / "f8"
    JournalWriter(str(path), facts()).close()
    told = r"its results are \('<f8', \(\)\) \(Test, begun .*those of Test are \('<f8', \(3,\)\)"
    with pytest.raises(JournalMismatchError, match=told):
        JournalWriter(str(path), facts(("f8", 3)))


def test_a_payload_that_looks_like_a_block(tmp_path):
    """Behind damage the next block is looked for; what stands inside a result does not count as one unless it is whole."""
    path = tmp_path / "nested"
    make_file(str(path), new_facts("objects", "objects", "Test"))
    inner = BLOCK_MAGIC + HEAD.pack(BLOCK_MAGIC, OBJECTS, 1, 20, 0, 1, 2) + b"x" * 50
    body = [np.array([0]).tobytes(), np.zeros(1, "u8").tobytes(), np.array([len(inner)]).tobytes(), inner]
    block = b"".join(encode_block(OBJECTS, 1, body, 0))
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        begin = file.tell()
        file.write(block[:50] + b"?" + block[51:] + block)
    found, damage = contents(path)
    assert list(found) == [0]
    assert damage == [(begin, begin + len(block))]


def test_blocks_of_another_kind_do_not_count(tmp_path):
    path = tmp_path / "kinds"
    make_file(str(path), facts())
    with path.open("ab") as file:
        file.write(b"".join(encode_block(FACTS, 0, [b"{}"], 0)))
        file.write(b"".join(encode_block(OBJECTS, 1, [bytes(24)], 0)))
        file.write(b"".join(encode_block(ROWS, 9, [bytes(24)], 0)))
        file.write(rows_block(4, [1.0]))
    found, damage = contents(path)
    assert list(found) == [4]
    assert len(damage) == 1


def test_write_all_writes_all(tmp_path):
    """Also when the system takes only a part at a time, as a pipe does."""
    out, into = os.pipe()
    os.set_blocking(into, True)
    pieces = [b"a" * 70_000, b"", b"b" * 100_000, bytearray(b"c")]
    child = os.fork()
    if child == 0:
        try:
            write_all(into, pieces)
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        assert pipe.read() == b"".join(pieces)
    os.waitpid(child, 0)

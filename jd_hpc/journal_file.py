"""The file of a journal: how results lie in it, and how they are found again. No lock, no thread, no run.

The rules it keeps:

- A file only grows, by blocks. A block is whole, which its checksums say, or it counts for nothing.
- Every block says up to where the file was on the disk for certain when it was written. What is broken behind that was being
  written when its writer or its machine died, and may be cut; what is broken before it was damaged later, and is an error.
- Numbers of the format are little endian; results lie as they lay in memory, and the facts at the beginning say their dtype.
- Whoever reads needs no lock, and may do it while a run writes.

File: FILE_MAGIC, a block of facts, blocks of results. Block: HEAD, then int64 indices, uint64 fingerprints, for objects the uint64
lengths of their pickles, and the results one behind the other.
"""

from __future__ import annotations

import ast
import contextlib
import os
import pickle
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from jd_hpc.errors import JournalFormatError, JournalWriteError, PayloadError

VERSION = 1
FILE_MAGIC = b"\x89jd_hpc_journal\n"
BLOCK_MAGIC = b"\x89JDHPC\x1a\n"
HEAD = struct.Struct("<8sIIQQII")
"""Magic, kind, results, bytes of the body, offset known to be on the disk, CRC32 of the body, CRC32 of all that."""
FACTS, ROWS, OBJECTS = range(3)  # kinds of blocks
CHUNK_BYTES = 1 << 22
"""How much is read at a time."""
NEAR_BYTES = 4096
"""Results that lie no further apart are read in one go."""
OBJECT = "objects"

Piece = bytes | bytearray | memoryview
Indices = NDArray[np.int64]
Fingerprints = NDArray[np.uint64]


# ---- dtypes and facts ------------------------------------------------------------------------------------------------


def dtype_text(dtype: np.dtype[Any] | None, name: str) -> str:
    """Return `dtype` as a text that `dtype_of` understands.

    Raises
    ------
    PayloadError
        If no text tells all that it is.
    """
    if dtype is None:
        return OBJECT
    text = ""
    with contextlib.suppress(ValueError, SyntaxError, TypeError):
        text = repr((np.lib.format.dtype_to_descr(dtype.base), dtype.shape))
        if dtype_of(text) == dtype:
            return text
    raise PayloadError(f"{name}: a journal cannot keep {dtype}; use plain numbers and fields in their order")


def dtype_of(text: str) -> np.dtype[Any] | None:
    """Return the dtype that `dtype_text` described; None for objects."""
    if text == OBJECT:
        return None
    descr, shape = ast.literal_eval(text)
    base: np.dtype[Any] = np.lib.format.descr_to_dtype(descr)
    return np.dtype((base, shape)) if shape else base


class Facts(NamedTuple):
    """What stands at the beginning of a journal: whose results these are."""

    version: int
    result: str
    """The results' dtype, as `dtype_text` says it."""
    job: str
    name: str
    """The class that ran the jobs: for messages only."""
    created: str
    host: str
    seed: int | None = None
    """Of the jobs' random streams, where they have any."""

    def encode(self) -> bytes:
        """Return the body of the block of facts."""
        return repr(self._asdict()).encode()


# ---- blocks ----------------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A block of results that was found whole.

    Attributes
    ----------
    at, end : int
        Offsets of its first byte and of the first one behind it.
    synced : int
        Up to where the file was on the disk for certain when this block was written.
    indices, fingerprints : numpy.ndarray
        Of its jobs: int64 and uint64.
    offsets, sizes : numpy.ndarray
        int64: where in the file each result lies, and its bytes.
    """

    at: int
    end: int
    synced: int
    indices: Indices
    fingerprints: Fingerprints
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]


class Damage(NamedTuple):
    """A part of the file that is no whole block; `until` is where the next one begins, None if there is none."""

    at: int
    until: int | None


def encode_block(kind: int, count: int, body: Sequence[Piece], synced: int) -> list[Piece]:
    """Return the pieces of a block: its head and its body."""
    size = crc = 0
    for piece in body:
        size += len(piece)
        crc = zlib.crc32(piece, crc)
    head = HEAD.pack(BLOCK_MAGIC, kind, count, size, synced, crc, 0)[:-4]
    return [head + struct.pack("<I", zlib.crc32(head)), *body]


def beginning(facts: Facts) -> bytes:
    """Return the first bytes of a new journal."""
    return b"".join([FILE_MAGIC, *encode_block(FACTS, 0, [facts.encode()], 0)])


class JournalReader:
    """Reads a journal, also while somebody writes it.

    Parameters
    ----------
    path : str
        The file.
    fd : int, optional
        The file, if it is open already; it stays the caller's.

    Raises
    ------
    JournalFormatError
        If it is no journal, or one of a newer version.
    JournalWriteError
        If it cannot be opened.

    Attributes
    ----------
    facts : Facts
        What stands at its beginning.
    dtype : numpy.dtype or None
        Of the results; None for objects.
    first_at : int
        Where the blocks of results begin.
    damage : list of Damage
        What the last `blocks` passed over.
    """

    def __init__(self, path: str, fd: int | None = None) -> None:
        self.path = path
        self._own = fd is None
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if fd is None else fd
        except OSError as error:
            raise JournalWriteError(f"the journal {path} cannot be opened: {error.strerror}") from error
        self.damage: list[Damage] = []
        try:
            self.facts, self.first_at = self._read_facts()
            self.dtype = dtype_of(self.facts.result)
        except BaseException:
            self.close()
            raise
        self._row_bytes = None if self.dtype is None else self.dtype.itemsize

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._own:
            os.close(self.fd)
            self._own = False

    def _read(self, at: int, size: int) -> bytes:
        """Read so many bytes, or up to the end of the file."""
        parts = []
        try:
            while size > 0 and (part := os.pread(self.fd, min(size, 1 << 30), at)):
                parts.append(part)
                at += len(part)
                size -= len(part)
        except OSError as error:
            raise JournalFormatError(f"the journal {self.path} cannot be read: {error.strerror}") from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_facts(self) -> tuple[Facts, int]:
        if self._read(0, len(FILE_MAGIC)) != FILE_MAGIC:
            raise JournalFormatError(f"{self.path} is no journal of jd_hpc; name another file, it is left as it is")
        at = len(FILE_MAGIC)
        head = self._head(at)
        body = self._read(at + HEAD.size, head[2]) if head is not None and head[2] <= CHUNK_BYTES else b""
        if head is None or head[0] != FACTS or zlib.crc32(body) != head[4]:
            raise JournalFormatError(f"the journal {self.path} is damaged at its beginning: nothing tells what lies in it")
        given = ast.literal_eval(body.decode())
        if given["version"] > VERSION:
            raise JournalFormatError(
                f"the journal {self.path} has format {given['version']}, and this jd_hpc knows {VERSION}: a newer one wrote it; "
                f"use that"
            )
        return Facts(**given), at + HEAD.size + len(body)

    def _head(self, at: int) -> tuple[int, int, int, int, int] | None:
        """Read a block's head: kind, count, bytes of the body, synced, CRC of the body; None if there is none."""
        head = self._read(at, HEAD.size)
        if len(head) < HEAD.size:
            return None
        magic, *numbers, crc = HEAD.unpack(head)
        return tuple(numbers) if magic == BLOCK_MAGIC and crc == zlib.crc32(head[:-4]) else None

    def _block(self, at: int, size: int) -> Block | None:
        """Read the block at this offset, if it is whole. Results are only passed over."""
        head = self._head(at)
        if head is None:
            return None
        kind, count, body_bytes, synced, crc = head
        body_at, end = at + HEAD.size, at + HEAD.size + body_bytes
        table_bytes = count * (16 if kind == ROWS else 24)
        if end > size or kind != (OBJECTS if self._row_bytes is None else ROWS) or table_bytes > body_bytes:
            return None
        table = self._read(body_at, table_bytes)
        found = zlib.crc32(table)
        for part_at in range(body_at + table_bytes, end, CHUNK_BYTES):
            found = zlib.crc32(self._read(part_at, min(CHUNK_BYTES, end - part_at)), found)
        if found != crc:
            return None
        indices, fingerprints = np.frombuffer(table, "<i8", count), np.frombuffer(table, "<u8", count, 8 * count)
        sizes = np.frombuffer(table, "<i8", count, 16 * count) if kind == OBJECTS else np.full(count, self._row_bytes, "i8")
        offsets = body_at + table_bytes + np.cumsum(sizes) - sizes
        return Block(at, end, synced, indices, fingerprints, offsets, sizes)

    def blocks(self) -> Iterator[Block]:
        """Find all whole blocks of results. What is broken is passed over, and noted in `damage`."""
        self.damage = []
        at, size = self.first_at, os.fstat(self.fd).st_size
        while at < size:
            block = self._block(at, size)
            if block is None:
                block = self._next_block(at + 1, size)
                self.damage.append(Damage(at, None if block is None else block.at))
                if block is None:
                    return
            yield block
            at = block.end

    def _next_block(self, at: int, size: int) -> Block | None:
        """Look for the next whole block, byte by byte."""
        while at < size:
            data = self._read(at, CHUNK_BYTES)
            found = data.find(BLOCK_MAGIC)
            while found >= 0:
                if (block := self._block(at + found, size)) is not None:
                    return block
                found = data.find(BLOCK_MAGIC, found + 1)
            at += max(1, len(data) - len(BLOCK_MAGIC) + 1)
        return None

    # ---- results -------------------------------------------------------------------------------------------------

    def rows(self, offsets: NDArray[np.int64]) -> NDArray[Any]:
        """Read the results that lie at these offsets, as rows of `dtype`."""
        assert self.dtype is not None
        assert self._row_bytes is not None
        row_bytes = self._row_bytes
        if len(offsets) and (np.diff(offsets) == row_bytes).all():  # they lie in a row, as most do
            return np.ndarray((len(offsets),), self.dtype, self._all(int(offsets[0]), len(offsets) * row_bytes))
        out = np.empty((len(offsets), row_bytes), "u1")
        order = np.argsort(offsets, kind="stable")
        in_order = offsets[order]
        cuts = np.flatnonzero(np.diff(in_order) > row_bytes + NEAR_BYTES) + 1
        for part in np.split(np.arange(len(offsets)), cuts):
            for some in np.array_split(part, 1 + len(part) * row_bytes // CHUNK_BYTES):
                if len(some):
                    begin = int(in_order[some[0]])
                    data = np.frombuffer(self._all(begin, int(in_order[some[-1]]) + row_bytes - begin), "u1")
                    windows = np.lib.stride_tricks.sliding_window_view(data, row_bytes)
                    out[order[some]] = windows[in_order[some] - begin]
        return np.ndarray((len(offsets),), self.dtype, out)

    def pickle_at(self, offset: int, size: int) -> bytes:
        """Read the pickle of a result that is an object."""
        return self._all(offset, size)

    def object(self, index: int, offset: int, size: int) -> Any:
        """Rebuild the result of job `index`, an object whose pickle lies there."""
        data = self._all(offset, size)
        try:
            return pickle.loads(data)
        except Exception as error:
            raise JournalFormatError(
                f"the result of job {index} in the journal {self.path} cannot be rebuilt ({type(error).__name__}: {error}): what "
                "it is made of must be importable as it was when it was written"
            ) from error

    def _all(self, at: int, size: int) -> bytes:
        data = self._read(at, size)
        if len(data) != size:
            raise JournalFormatError(f"the journal {self.path} has become shorter while it was read: somebody else has cut it")
        return data


class Table:
    """Where each job's result lies. 16 bytes for each job, 24 for objects; jobs are numbered from 0, so the index is the place.

    Attributes
    ----------
    fingerprints : numpy.ndarray
        uint64, for each index.
    offsets : numpy.ndarray
        int64: where in the file the result lies, -1: nowhere.
    sizes : numpy.ndarray or None
        int64, bytes of each pickle, where results are objects.
    count : int
        Results that there are.
    """

    def __init__(self, of_objects: bool) -> None:
        self.count = 0
        self.end = 0
        self.fingerprints = np.zeros(0, "u8")
        self.offsets = np.zeros(0, "i8")
        self.sizes: NDArray[np.int64] | None = np.zeros(0, "i8") if of_objects else None

    def add(self, block: Block) -> None:
        """Note the results of a block. The first one for an index counts."""
        if not len(block.indices):
            return
        self._make_room(int(block.indices.max()) + 1)
        new = np.flatnonzero(self.offsets[block.indices] < 0)
        indices = block.indices[new]
        self.fingerprints[indices] = block.fingerprints[new]
        self.offsets[indices] = block.offsets[new]
        if self.sizes is not None:
            self.sizes[indices] = block.sizes[new]
        self.count += len(indices)

    def _make_room(self, end: int) -> None:
        self.end = max(self.end, end)
        if end <= len(self.offsets):
            return
        length = end + end // 4
        self.fingerprints = _longer(self.fingerprints, length, 0)
        self.offsets = _longer(self.offsets, length, -1)
        if self.sizes is not None:
            self.sizes = _longer(self.sizes, length, 0)

    def indices(self) -> Indices:
        """Return the indices that there are, in their order."""
        return np.flatnonzero(self.offsets[: self.end] >= 0)

    def missing(self) -> list[tuple[int, int]]:
        """Return the runs of indices below the highest one that are not there: (first, last)."""
        holes = np.flatnonzero(self.offsets[: self.end] < 0)
        runs = np.split(holes, np.flatnonzero(np.diff(holes) > 1) + 1)
        return [(int(run[0]), int(run[-1])) for run in runs if len(run)]


def _longer(array: NDArray[Any], length: int, value: int) -> NDArray[Any]:
    out = np.full(length, value, array.dtype)
    out[: len(array)] = array
    return out


def load(reader: JournalReader) -> tuple[Table, int]:
    """Read a journal that is to be continued: what it has, and its length without a torn end.

    Raises
    ------
    JournalFormatError
        If it is damaged where it was on the disk already.
    """
    table = Table(reader.dtype is None)
    synced, good, end, beyond = 0, 0, reader.first_at, 0
    for block in reader.blocks():
        synced = max(synced, block.synced)
        if reader.damage:
            beyond += len(block.indices)
        else:
            table.add(block)
            end = block.end
        good += len(block.indices)
    if reader.damage and reader.damage[0].at < synced:
        at, until = reader.damage[0]
        where = f"from byte {at} to {until}" if until is not None else f"from byte {at} on"
        raise JournalFormatError(
            f"the journal {reader.path} is damaged {where}, in what was on the disk for certain. {good} results are whole, "
            f"{beyond} of them behind the damage: `jd-hpc journal merge NEW {reader.path}` saves them; go on with NEW, the other "
            f"jobs are computed again"
        )
    return table, end

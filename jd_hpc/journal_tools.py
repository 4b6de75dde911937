"""The command ``jd-hpc journal``: looks into journals, also while a run writes them, and makes one of several.

The rules it keeps: a journal that is read stays as it is, and needs no lock; what cannot be read is never passed over in silence.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from jd_hpc.errors import JournalError, JournalMismatchError, JournalWriteError
from jd_hpc.journal_file import OBJECT, OBJECTS, ROWS, Block, JournalReader, Piece, Table, encode_block
from jd_hpc.journal_lock import holder_of
from jd_hpc.journal_writer import make_file, new_facts, write_all

PART_BYTES = 1 << 24
"""How many bytes of results are in memory at a time."""
COLUMNS_MOST = 10_000
RUNS_SHOWN = 10

Columns = list[tuple[str, Callable[[NDArray[Any]], NDArray[Any]]]]


def add_commands(commands: Any) -> None:
    """Tell the parser of ``jd-hpc`` what there is."""
    one = commands.add_parser("journal", help="show, export or merge journals, also while a run writes them", allow_abbrev=False)
    actions = one.add_subparsers(dest="action", required=True, metavar="show | export | merge")
    show = actions.add_parser("show", help="say what is in a journal", allow_abbrev=False)
    show.add_argument("file")
    export = actions.add_parser("export", help="write the results, in the order of the jobs' numbers", allow_abbrev=False)
    export.add_argument("file")
    export.add_argument("out", nargs="?", help="ends in .csv, .npy or .parquet; without it CSV goes to stdout")
    merge = actions.add_parser(
        "merge",
        help="make one journal of several, or a whole one of a damaged one",
        description="Without an option the files are of one job set, and its jobs keep their numbers.",
        allow_abbrev=False,
    )
    merge.add_argument("out")
    merge.add_argument("files", nargs="+", metavar="file")
    how = merge.add_mutually_exclusive_group()
    how.add_argument(
        "--append", action="store_true", help="job sets one behind the other: a file's jobs come behind those of the files before"
    )
    how.add_argument(
        "--interleave", action="store_true", help="task k of n had the jobs k, k + n, k + 2n, ...: job i of file k is job k + n * i"
    )


def run(options: argparse.Namespace) -> int:
    """Do what was asked for and return the exit code."""
    try:
        if options.action == "show":
            show(options.file, sys.stdout)
        elif options.action == "export":
            export(options.file, options.out)
        else:
            merge(options.out, options.files, "append" if options.append else "interleave" if options.interleave else "same")
    except JournalError as error:
        print(f"jd-hpc journal {options.action}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


# ---- show ------------------------------------------------------------------------------------------------------------


def show(path: str, out: TextIO) -> None:
    """Print what is in a journal.

    Raises
    ------
    JournalError
        If it cannot be read.
    """
    with JournalReader(path) as reader:
        table, facts = _load(reader), reader.facts
        missing = table.missing()
        lines = [
            ("results", f"{table.count}, numbers up to {table.end - 1}" if table.count else "0"),
            ("missing below", f"{table.end - table.count}{_runs(missing)}"),
            ("results are", _plain(facts.result)),
            ("jobs are", _plain(facts.job)),
            ("class", facts.name),
            *([] if facts.seed is None else [("seed", str(facts.seed))]),
            ("begun", f"{facts.created} on {facts.host}"),
            ("bytes", str(os.fstat(reader.fd).st_size)),
            ("written by", holder_of(os.path.realpath(path)) or "nobody now"),
        ]
        lines += [("not whole", _damaged(damage)) for damage in reader.damage]
    for name, text in lines:
        print(f"{name + ':':15} {text}", file=out)


def _plain(text: str) -> str:
    return "Python objects" if text == OBJECT else text


def _runs(runs: list[tuple[int, int]]) -> str:
    if not runs:
        return ""
    told = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs[:RUNS_SHOWN])
    return f": {told}{', ...' if len(runs) > RUNS_SHOWN else ''}"


def _damaged(damage: tuple[int, int | None]) -> str:
    at, until = damage
    return f"bytes {at} to {until}" if until is not None else f"from byte {at} on (being written now, or torn)"


def _load(reader: JournalReader) -> Table:
    """Find all results that are whole."""
    table = Table(reader.dtype is None)
    for block in reader.blocks():
        table.add(block)
    return table


# ---- export ----------------------------------------------------------------------------------------------------------


def export(path: str, out: str | None) -> None:
    """Write the results of a journal as CSV, .npy or Parquet, in the order of the jobs' numbers.

    Raises
    ------
    JournalError
        If the journal cannot be read, or not be written in that way.
    """
    writers = {".csv": _write_csv, ".npy": _write_npy, ".parquet": _write_parquet}
    end = ".csv" if out is None else Path(out).suffix
    if end not in writers:
        raise JournalWriteError(f"{out}: the name must end in {', '.join(writers)}, which says how it is written")
    with JournalReader(path) as reader:
        table = _load(reader)
        if out is not None and Path(out).exists() and Path(out).samefile(path):
            raise JournalWriteError(f"{out} is the journal itself; name another file")
        try:
            writers[end](reader, table, out)
        except (OverflowError, ValueError) as error:
            raise JournalWriteError(f"the results do not fit into {out}: {error}; export them as .csv") from error
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            raise JournalWriteError(f"{out or 'stdout'} cannot be written: {error.strerror}") from error
        missing = table.missing()
        if missing:
            print(f"{table.end - table.count} jobs have no result{_runs(missing)}", file=sys.stderr)
        for damage in reader.damage:
            print(f"{path}: passed over what is not whole: {_damaged(damage)}", file=sys.stderr)


def _parts(reader: JournalReader, table: Table) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Give the results in parts: indices, and rows or an array of objects."""
    indices = table.indices()
    sizes = table.sizes[indices] if table.sizes is not None else np.full(len(indices), reader.dtype.itemsize if reader.dtype else 0)
    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // PART_BYTES)) + 1
    for part in np.split(indices, cuts):
        offsets = table.offsets[part]
        if table.sizes is None:
            yield part, reader.rows(offsets)
            continue
        objects = np.empty(len(part), object)
        for at, index in enumerate(part.tolist()):
            objects[at] = reader.object(index, int(offsets[at]), int(table.sizes[index]))
        yield part, objects


def columns(dtype: np.dtype[Any] | None) -> Columns:
    """Return the columns that rows of `dtype` are flattened into: names, and what takes a column out of an array of rows.

    Raises
    ------
    JournalWriteError
        If they are too many.
    """
    found: Columns = []

    def walk(name: str, dtype: np.dtype[Any], take: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        if dtype.subdtype is not None:
            base, shape = dtype.subdtype
            for place in np.ndindex(shape):
                walk(f"{name}[{','.join(map(str, place))}]", base, partial(_part, take, (slice(None), *place)))
        elif dtype.names is not None:
            for field in dtype.names:
                walk(f"{name}.{field}" if name else field, dtype[field], partial(_part, take, field))
        elif len(found) < COLUMNS_MOST:
            found.append((name or "result", take))
        else:
            raise JournalWriteError(f"the results have more than {COLUMNS_MOST} numbers each: too many columns; take .npy")

    if dtype is None:
        return [("result", lambda rows: rows)]
    walk("" if dtype.base.names else "result", dtype, lambda rows: rows)
    return found


def _part(take: Callable[[NDArray[Any]], NDArray[Any]], which: Any, rows: NDArray[Any]) -> NDArray[Any]:
    part: NDArray[Any] = take(rows)[which]
    return part


def _cell(value: Any) -> Any:
    """What stands in a table for an object."""
    return value if isinstance(value, bool | int | float | str) or value is None else repr(value)


def _write_csv(reader: JournalReader, table: Table, out: str | None) -> None:
    taken = columns(reader.dtype)
    with contextlib.ExitStack() as stack:
        file = sys.stdout if out is None else stack.enter_context(Path(out).open("w", newline=""))
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["index", *(name for name, _ in taken)])
        for indices, rows in _parts(reader, table):
            cells = [take(rows).tolist() for _, take in taken]
            if reader.dtype is None:
                cells = [[_cell(value) for value in column] for column in cells]
            writer.writerows(zip(indices.tolist(), *cells, strict=True))
        file.flush()


def _write_npy(reader: JournalReader, table: Table, out: str | None) -> None:
    """Write an array of records: index, result."""
    assert out is not None
    dtype = reader.dtype
    if dtype is None:
        given = [(indices, _numbers(objects, reader.path)) for indices, objects in _parts(reader, table)]
        whole = np.concatenate([array for _, array in given])
        dtype = np.dtype((whole.dtype, whole.shape[1:]))
        parts: Any = [(table.indices(), whole)]
    else:
        parts = _parts(reader, table)
    record = np.dtype([("index", "<i8"), ("result", dtype)])
    with Path(out).open("wb") as file:
        np.lib.format.write_array_header_2_0(
            file, {"descr": np.lib.format.dtype_to_descr(record), "fortran_order": False, "shape": (table.count,)}
        )
        for indices, rows in parts:
            records = np.zeros(len(indices), record)
            records["index"], records["result"] = indices, rows
            file.write(records.tobytes())


def _numbers(objects: NDArray[Any], path: str) -> NDArray[Any]:
    with contextlib.suppress(ValueError):
        array = np.array(objects.tolist())
        if not array.dtype.hasobject:
            return array
    raise JournalWriteError(f"the results in {path} are objects that make no array; export them as .csv")


def _write_parquet(reader: JournalReader, table: Table, out: str | None) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise JournalWriteError("Parquet needs pyarrow, which is not there: pip install pyarrow, or take .csv or .npy") from error
    if reader.dtype is None:
        cells = [_cell(value) for _, objects in _parts(reader, table) for value in objects]
        if len({type(cell) for cell in cells}) > 1:  # a column has one type
            cells = [None if cell is None else str(cell) for cell in cells]
        pyarrow.parquet.write_table(pyarrow.table({"index": table.indices(), "result": cells}), out)
        return
    taken = columns(reader.dtype)
    with contextlib.ExitStack() as stack:
        writer = None
        for indices, rows in _parts(reader, table):
            part = pyarrow.table({"index": indices} | {name: _arrow_ready(take(rows)) for name, take in taken})
            if writer is None:
                writer = stack.enter_context(pyarrow.parquet.ParquetWriter(out, part.schema))
            writer.write_table(part)


def _arrow_ready(column: NDArray[Any]) -> Any:
    """What Parquet has no type for goes as text."""
    if column.dtype.kind in "cV":
        return [str(value) for value in column.tolist()]
    return np.ascontiguousarray(column.astype(column.dtype.newbyteorder("=")))


# ---- merge -----------------------------------------------------------------------------------------------------------


def merge(out: str, paths: list[str], numbering: str) -> None:
    """Make one journal of several.

    Parameters
    ----------
    out : str
        The new file.
    paths : list of str
        The journals.
    numbering : {"same", "append", "interleave"}
        Which number a job gets: its own, the next one behind the files before, or those that tasks take in turn.

    Raises
    ------
    JournalError
        If `out` is there, or one of the others is no journal, or they do not fit.
    """
    if os.path.lexists(out):
        raise JournalWriteError(f"{out} is there already; name a new file")
    made = f"{out}.{os.getpid()}.merged"
    try:
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(JournalReader(path)) for path in paths]
            facts = readers[0].facts
            for reader in readers[1:]:
                if (reader.facts.result, reader.facts.job) != (facts.result, facts.job):
                    raise JournalMismatchError(f"{paths[0]} and {reader.path} are of different dtypes: keep them apart")
                if numbering == "same" and reader.facts.seed != facts.seed:
                    raise JournalMismatchError(f"{paths[0]} and {reader.path} are of different seeds: keep them apart")
            seed = facts.seed if numbering == "same" else None  # a random stream belongs to a job's number
            make_file(made, new_facts(facts.result, facts.job, facts.name, seed))
            fd = os.open(made, os.O_WRONLY | os.O_APPEND)
            stack.callback(os.close, fd)
            merged = _Merged(fd, facts.result == OBJECT)
            for number, reader in enumerate(readers):
                first, step = {"append": (merged.table.end, 1), "interleave": (number, len(readers))}.get(numbering, (0, 1))
                merged.take_over(reader, first, step)
            os.fsync(fd)
        Path(made).rename(out)
    except OSError as error:
        raise JournalWriteError(f"{out} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(made).unlink()
    print(f"{out}: {merged.table.count} results, {merged.table.end - merged.table.count} missing{_runs(merged.table.missing())}")


class _Merged:
    """The journal that is being made: copies results without looking into them."""

    def __init__(self, fd: int, of_objects: bool) -> None:
        self.table = Table(of_objects)
        self._fd = fd
        self._kind = OBJECTS if of_objects else ROWS

    def take_over(self, reader: JournalReader, first: int, step: int) -> None:
        for block in reader.blocks():
            indices = first + step * block.indices
            new = self._new(indices, block, reader.path)
            if len(new):
                self.table.add(block._replace(indices=indices))
                for some in np.array_split(new, 1 + int(block.sizes[new].sum()) // PART_BYTES):
                    self._copy(reader, indices, block, some)
        for damage in reader.damage:
            print(f"{reader.path}: passed over what is not whole: {_damaged(damage)}", file=sys.stderr)

    def _new(self, indices: NDArray[np.int64], block: Block, path: str) -> NDArray[np.int64]:
        """Tell which results of the block are not there yet."""
        inside = np.flatnonzero(indices < self.table.end)
        there = inside[self.table.offsets[indices[inside]] >= 0]
        wrong = there[self.table.fingerprints[indices[there]] != block.fingerprints[there]]
        if len(wrong):
            raise JournalMismatchError(
                f"job {indices[wrong[0]]} of {path} is another one than in the files before: these are different job sets. "
                f"Journals of array tasks, each with a part of the jobs numbered from 0, take --interleave or --append"
            )
        is_new = np.ones(len(indices), bool)
        is_new[there] = False
        return np.flatnonzero(is_new)

    def _copy(self, reader: JournalReader, indices: NDArray[np.int64], block: Block, some: NDArray[np.int64]) -> None:
        if not len(some):
            return
        body: list[Piece] = [indices[some].astype("<i8").tobytes(), block.fingerprints[some].tobytes()]
        if self._kind == ROWS:
            body.append(reader.rows(block.offsets[some]).tobytes())
        else:
            body.append(block.sizes[some].tobytes())
            body.append(b"".join(reader.pickle_at(int(block.offsets[at]), int(block.sizes[at])) for at in some))
        write_all(self._fd, encode_block(self._kind, len(some), body, 0))

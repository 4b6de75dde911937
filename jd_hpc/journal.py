"""The journal of a run: results that are there already are delivered first, and whatever is delivered is written down.

The rules it keeps:

- The user is asked for jobs as ever, in the same order. A job's number is its index; a fingerprint of its bytes says whether it is
  still the same job. If it is not, the journal is another job set's, and the run ends.
- What the journal has goes to the user from here and never to a slave. What it lacks below its highest index (what was in flight,
  or failed) is handed back with its index. Beyond that the master asks the user itself, and nothing of this is in the way.
- A result is laid down before the user's hook gets it: what a hook does, or raises, costs no result.
- Failures are not written down: such a job has another try in the next run.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from jd_hpc._batch import Rows, fingerprints
from jd_hpc.errors import JobError, JournalMismatchError, PayloadError
from jd_hpc.journal_file import CHUNK_BYTES, Fingerprints, Indices, Piece, Table, dtype_text
from jd_hpc.journal_writer import JournalWriter, new_facts
from jd_hpc.payload import as_rows, block_length, check_finite, pack, pick

if TYPE_CHECKING:
    from jd_hpc.dispatcher import JobDispatcher
    from jd_hpc.plan import Plan

VARIABLE = "JD_HPC_JOURNAL"
REPLAY_JOBS = 4096
REPLAY_BYTES = 1 << 20
"""So many jobs, or so many bytes of jobs or results, are looked up at a time."""
HOLES_MOST = 10_000
HOLES_BYTES = 1 << 26
"""So many jobs, or so many bytes of them, may wait for slaves while stored results are still being delivered."""

_named_by_environment = itertools.count(1)


def path_of(given: str | os.PathLike[str] | None) -> str | None:
    """Return the file that run() is to use: what the script names, else what the environment does, else none.

    The environment's name stands for the first run of the process that names none itself; the second one gets NAME.2, and so on.
    """
    if given is None:
        name = os.environ.get(VARIABLE)
        if not name:
            return None
        number = next(_named_by_environment)
        given = name if number == 1 else f"{name}.{number}"
    return os.path.realpath(os.fspath(given))  # one file, one lock, whatever it is called


def byte_mask(dtype: np.dtype[Any]) -> NDArray[np.bool_]:
    """Tell for each byte of a row whether it means anything: what pads a record may be different in every run."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return np.tile(byte_mask(base), int(np.prod(shape)))
    mask = np.full(dtype.itemsize, dtype.names is None)
    for name in dtype.names or ():
        inner, offset = dtype.fields[name][:2]  # type: ignore[index]
        mask[offset : offset + inner.itemsize] = byte_mask(inner)
    return mask


class Journal:
    """The journal of one run, on the master. To be used in a `with` statement.

    Parameters
    ----------
    path : str
        The file.
    plan : Plan
        The run's hooks. Where jobs are objects, some are replaced by ones that note fingerprints.
    dispatcher : JobDispatcher
        Whose `from_journal` is set while stored results are delivered.

    Raises
    ------
    JournalError
        One of its kinds: if the file is held, belongs to others, is none, or cannot be written.

    Attributes
    ----------
    next_index : int
        Number of the next job that the user will be asked for.
    replays : bool
        Whether there may be stored results still to be delivered.
    holes_most : int
        How many jobs that are not stored may wait meanwhile.
    """

    def __init__(self, path: str, plan: Plan, dispatcher: JobDispatcher) -> None:
        self._path = path
        self._dispatcher = dispatcher
        self._next_job, self._next_jobs, self._process_failure = plan.next_job, plan.next_jobs, plan.process_failure
        self._process_result, self._process_results = plan.process_result, plan.process_results
        self._job_rows, self._result_rows = plan.job_rows, plan.result_rows
        self._allow_nan = plan.allow_nan
        self._order = plan.order
        self._history = plan.history if plan.order is None else None  # the order tells it what it hands over
        self._mask: NDArray[np.bool_] | None = None
        self._noted: dict[int, int] = {}
        row_bytes = [0 if rows is None else rows.row_bytes for rows in (plan.job_rows, plan.result_rows)]
        self._block_jobs = max(1, min(REPLAY_JOBS, REPLAY_BYTES // max(*row_bytes, 256)))
        self.holes_most = HOLES_MOST
        if self._job_rows is not None:
            self.holes_most = max(1, min(HOLES_MOST, HOLES_BYTES // self._job_rows.row_bytes))
            mask = byte_mask(self._job_rows.dtype)
            self._mask = None if mask.all() else mask
        self.next_index = self._delivered = 0
        job, result = dtype_text(plan.job_dtype, "job_dtype"), dtype_text(plan.result_dtype, "result_dtype")
        seed = plan.seed if plan.gives_rng else None
        self._writer = JournalWriter(path, new_facts(result, job, type(dispatcher).__qualname__, seed))
        self._table, self._reader = self._writer.take_table(), self._writer.reader
        self.replays = self._table.end > 0
        if self._job_rows is None:
            plan.next_job = self._noting_next_job
            plan.next_jobs = None if self._next_jobs is None else self._noting_next_jobs
            plan.process_failure = self._forgetting_failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()

    # ---- fingerprints ----------------------------------------------------------------------------------------------

    def _prints_of_rows(self, rows: NDArray[Any]) -> Fingerprints:
        rows = np.ascontiguousarray(rows)
        if self._mask is not None:
            rows = np.ascontiguousarray(rows.reshape(-1).view("u1").reshape(len(rows), -1)[:, self._mask])
        return fingerprints(rows)

    def _print_of_object(self, index: int, job: Any) -> int:
        """Jobs may be changed by whoever runs them, so theirs are noted as soon as they come."""
        key = self._dispatcher.job_key(job)
        if isinstance(key, bytes):
            frames, size = [memoryview(key)], len(key)
        else:
            frames, size = pack(key, f"job {index}, or its job_key,")
        digest = hashlib.blake2b(digest_size=8)
        for frame in frames:
            digest.update(frame)
        self._noted[index] = found = int.from_bytes(digest.digest(), "little")
        self.holes_most = max(1, min(self.holes_most, HOLES_BYTES // max(1, size)))
        return found

    def _noting_next_job(self) -> Any:
        job = self._next_job()
        if job is not None:
            self._print_of_object(self.next_index, job)
            self.next_index += 1
        return job

    def _noting_next_jobs(self, count: int) -> Any:
        assert self._next_jobs is not None
        block = self._next_jobs(count)
        for job in block if block_length(block, count) else ():
            self._print_of_object(self.next_index, job)
            self.next_index += 1
        return block

    def _forgetting_failure(self, index: int, job: Any, error: JobError) -> None:
        del self._noted[index]
        self._process_failure(index, job, error)

    # ---- what is delivered is written down ------------------------------------------------------------------------

    def record(self, indices: Indices, jobs: Any, results: Any) -> None:
        """Lay down results that are about to be delivered.

        Parameters
        ----------
        indices : numpy.ndarray
            int64, the jobs' numbers.
        jobs, results : numpy.ndarray or list
            As many rows, or objects.

        Raises
        ------
        JournalError
            If an earlier one could not be written.
        PayloadError
            If a result cannot be pickled.
        """
        if self._job_rows is not None:
            prints = self._prints_of_rows(jobs)
        else:
            prints = np.array([self._noted.pop(index) for index in indices.tolist()], "u8")
        pieces: list[Piece] = [indices.tobytes(), prints.tobytes()]
        if self._result_rows is not None:
            pieces.append(results.tobytes())
        else:
            pickles = [_pickled(index, result) for index, result in zip(indices.tolist(), results, strict=True)]
            pieces += [np.array([len(one) for one in pickles], "u8").tobytes(), b"".join(pickles)]
        self._writer.add(len(indices), pieces)

    @property
    def delivered(self) -> int:
        """How many stored results the user's hooks have had."""
        return self._delivered - (0 if self._order is None else self._order.held_stored)

    # ---- what is there is delivered -------------------------------------------------------------------------------

    def replay(self, most: int) -> tuple[list[tuple[int, Any]], bool]:
        """Ask the user for up to `most` jobs, and deliver those results that are there.

        Returns
        -------
        list of (int, job)
            What is to be computed.
        bool
            Whether the user has no job now, and nothing was delivered since.

        Raises
        ------
        JournalMismatchError
            If a job is not the one whose result is stored.
        """
        first = self.next_index
        jobs, is_none = self._pull(max(1, min(most, self._block_jobs, self._table.end - first)))
        count = len(jobs)
        if self._job_rows is not None:
            prints = self._prints_of_rows(jobs) if count else np.zeros(0, "u8")
        else:
            prints = np.array([self._print_of_object(first + at, job) for at, job in enumerate(jobs)], "u8")
        stored = self._table.offsets[first : first + count] >= 0
        wrong = np.flatnonzero(stored & (self._table.fingerprints[first : first + count] != prints))
        if len(wrong):
            raise self._mismatch(first + int(wrong[0]))
        self.next_index = first + count
        places = np.flatnonzero(stored)
        if len(places):
            self._deliver(first + places, pick(jobs, places))
        holes = [(first + at, self._own(self._job_rows, jobs, at)) for at in np.flatnonzero(~stored).tolist()]
        self.replays = self.next_index < self._table.end
        if not self.replays:
            self._table = Table(False)  # it may have been large
        return holes, is_none and not len(places)

    def _pull(self, count: int) -> tuple[Any, bool]:
        """Ask for up to `count` jobs: rows or a list, and whether the user had fewer."""
        if self._next_jobs is not None:
            block = self._next_jobs(count)
            length = block_length(block, count)
            if self._job_rows is None or length == 0:
                return list(block) if length else [], length == 0
            rows = as_rows(block, self._job_rows.dtype, (length,), "what next_jobs returned").copy()
            is_none = False
        else:
            jobs: list[Any] = []
            rows = np.empty(0 if self._job_rows is None else count, "u1" if self._job_rows is None else self._job_rows.dtype)
            length = 0
            while length < count and (job := self._next_job()) is not None:
                if self._job_rows is None:
                    jobs.append(job)
                else:
                    try:
                        self._job_rows.write(rows, length, job, "what next_job returned")
                    except PayloadError as error:
                        error.add_note(f"This was job {self.next_index + length}.")
                        raise
                length += 1
            is_none = length < count
            if self._job_rows is None:
                return jobs, is_none
            rows = rows[:length]
        if not self._allow_nan:
            check_finite(rows, "what next_job returned")
        rows.flags.writeable = False
        return rows, is_none

    def _deliver(self, indices: Indices, jobs: Any) -> None:
        """Hand stored results to the user's hooks."""
        for part, results in self._stored(indices):
            some = jobs if len(part) == len(indices) else jobs[part.start : part.stop]
            numbers = indices[part.start : part.stop]
            if self._history is not None:
                self._history.event("stored", jobs=spans(numbers))
            self._dispatcher.from_journal = True
            try:
                if self._process_results is not None:
                    numbers.flags.writeable = False
                    self._process_results(numbers, some, results)
                else:
                    for at, index in enumerate(numbers.tolist()):
                        job, result = self._own(self._job_rows, some, at), self._own(self._result_rows, results, at)
                        self._process_result(index, job, result)
            finally:
                self._dispatcher.from_journal = False
            self._delivered += len(part)
        for index in indices.tolist() if self._job_rows is None else ():
            del self._noted[index]

    def _stored(self, indices: Indices) -> Iterable[tuple[range, Any]]:
        """Read results: parts of `indices` that are not too large at once, with their rows or objects."""
        offsets, sizes = self._table.offsets[indices], self._table.sizes
        if sizes is None:
            rows = self._reader.rows(offsets)
            rows.flags.writeable = False
            yield range(len(indices)), rows
            return
        lengths = sizes[indices]
        parts = np.flatnonzero(np.diff(np.cumsum(lengths) // CHUNK_BYTES)) + 1
        for begin, end in itertools.pairwise([0, *parts.tolist(), len(indices)]):
            places = zip(indices[begin:end].tolist(), offsets[begin:end].tolist(), lengths[begin:end].tolist(), strict=True)
            yield range(begin, end), [self._reader.object(*place) for place in places]

    @staticmethod
    def _own(rows: Rows | None, batch: Any, at: int) -> Any:
        """One row or object out of a batch; a copy, so that keeping it does not keep the others."""
        return batch[at] if rows is None else rows.read(batch, at)

    def _mismatch(self, index: int) -> JournalMismatchError:
        facts = self._reader.facts
        cure = "next_job must give the same jobs in the same order in every run: seed what is random"
        if self._job_rows is None:
            cure += ", and equal jobs must pickle to the same bytes (sets of strings do not; job_key can say what identifies a job)"
        return JournalMismatchError(
            f"the journal {self._path} belongs to another set of jobs: job {index} is not the one whose result it holds (it was "
            f"begun {facts.created} on {facts.host} by {facts.name}). For new jobs give the run a journal of its own, or move this "
            f"one away; if these are the same jobs, {cure}"
        )


def spans(numbers: Indices) -> list[tuple[int, int]]:
    """Cut growing numbers where they have gaps: the first of each piece, and how many it has."""
    ends = [*(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    return [(int(numbers[begin]), end - begin) for begin, end in itertools.pairwise([0, *ends])]


def _pickled(index: int, result: Any) -> bytes:
    try:
        return pickle.dumps(result, 5)
    except Exception as error:
        raise PayloadError(
            f"the result of job {index} cannot be pickled, and so not be written to the journal: {type(error).__name__}: {error}"
        ) from error

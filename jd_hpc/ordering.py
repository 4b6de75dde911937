"""Results in the order of their jobs: what comes in before its turn is held back. No MPI, no clock.

The rules it keeps:

- It stands between whoever delivers (the core, local.py, the journal) and the user's hooks: three calls in, the same three out,
  each job once, by growing number. The history is told when a hook gets a job, not before.
- What is handed over is what would have been without it: `from_journal` goes with every result, blocks stay blocks where they can.
- It holds no more than was fetched: whoever fetches asks for no job from number `window_end` on. That one moves when results are
  handed over, so memory is bounded however long the oldest job takes. Jobs that go out again do not wait for it: the oldest is one.
- A held piece of an array that is small is a copy: a row must not keep the message in which it came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jd_hpc.errors import JobError

if TYPE_CHECKING:
    from jd_hpc.dispatcher import JobDispatcher
    from jd_hpc.history import History

CREDITS = 8
"""By default the window is as many times what the slaves may hold."""
BLOCK_BYTES = 1 << 20
BLOCK_JOBS = 8192
"""Held pieces are joined to blocks of about this size; arrays up to this size are copied when they are held."""

Hook = Callable[..., Any]


@dataclass(slots=True, frozen=True)
class Piece:
    """Consecutive jobs that came in before their turn: results for one of the two hooks, or a failure."""

    count: int
    jobs: Any
    results: Any
    is_block: bool
    is_stored: bool
    error: JobError | None = None


class Order:
    """Hands over by growing number what comes in any order.

    Parameters
    ----------
    process_result, process_results, process_failure : callable
        The user's hooks.
    dispatcher : JobDispatcher
        Whose `from_journal` tells, and is told, which results are stored ones.
    window : int
        How many jobs may be fetched and not handed over.

    Attributes
    ----------
    next_index : int
        Number of the oldest job that was not handed over.
    held, held_stored : int
        Jobs that came in and wait for their turn, and how many of them are out of a journal.
    history : History or None
        Told of everything that is handed over.
    """

    def __init__(
        self,
        process_result: Hook,
        process_results: Hook | None,
        process_failure: Hook,
        dispatcher: JobDispatcher,
        window: int,
    ) -> None:
        self._process_result, self._process_results, self._process_failure = process_result, process_results, process_failure
        self._dispatcher = dispatcher
        self._window = window
        self._pieces: dict[int, Piece] = {}  # by their first job
        self.next_index = self.held = self.held_stored = 0
        self.history: History | None = None

    @property
    def window_end(self) -> int:
        """Number of the first job that must not be fetched yet."""
        return self.next_index + self._window

    # ---- in ----------------------------------------------------------------------------------------------------------

    def take_result(self, index: int, job: Any, result: Any) -> None:
        """Take what `process_result` is to get."""
        piece = Piece(1, job, result, False, self._dispatcher.from_journal)
        if index == self.next_index:
            self._hand_over(piece)
            self._go_on()
        else:
            self._hold(index, piece)

    def take_results(self, indices: NDArray[np.int64], jobs: Any, results: Any) -> None:
        """Take what `process_results` is to get: cut where numbers are missing."""
        if len(indices) > 1 and (np.diff(indices) != 1).any():
            places = np.argsort(indices)
            indices, jobs, results = indices[places], _arranged(jobs, places), _arranged(results, places)
        cuts = np.flatnonzero(np.diff(indices) != 1) + 1
        begin = 0
        for end in [*cuts.tolist(), len(indices)]:
            first = int(indices[begin])
            piece = Piece(end - begin, jobs[begin:end], results[begin:end], True, self._dispatcher.from_journal)
            if first == self.next_index and first + piece.count not in self._pieces:
                self._hand_over(piece)  # no copy, and nothing to join it with
            else:
                self._hold(first, replace(piece, jobs=_own(piece.jobs), results=_own(piece.results)))
            begin = end
        self._go_on()

    def take_failure(self, index: int, job: Any, error: JobError) -> None:
        """Take what `process_failure` is to get."""
        self._hold(index, Piece(1, job, None, False, False, error))
        self._go_on()

    def _hold(self, first: int, piece: Piece) -> None:
        self._pieces[first] = piece
        self.held += piece.count
        self.held_stored += piece.count * piece.is_stored

    # ---- out ---------------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Hand over all whose turn has come."""
        while (piece := self._pieces.pop(self.next_index, None)) is not None:
            self.held -= piece.count
            self.held_stored -= piece.count * piece.is_stored
            self._hand_over(self._joined(piece) if piece.is_block else piece)

    def _joined(self, piece: Piece) -> Piece:
        """Make one block of those that follow each other."""
        parts, count, size = [piece], piece.count, _bytes_of(piece)
        while size < BLOCK_BYTES and count < BLOCK_JOBS:
            following = self._pieces.get(self.next_index + count)
            if following is None or not following.is_block or following.is_stored != piece.is_stored:
                break
            del self._pieces[self.next_index + count]
            self.held -= following.count
            self.held_stored -= following.count * following.is_stored
            parts.append(following)
            count += following.count
            size += _bytes_of(following)
        if len(parts) == 1:
            return piece
        jobs, results = _one_behind_the_other([one.jobs for one in parts]), _one_behind_the_other([one.results for one in parts])
        return replace(piece, count=count, jobs=jobs, results=results)

    def _hand_over(self, piece: Piece) -> None:
        first = self.next_index
        self.next_index = first + piece.count
        if self.history is not None:
            self._tell(self.history, first, piece)
        before, self._dispatcher.from_journal = self._dispatcher.from_journal, piece.is_stored
        try:
            if piece.error is not None:
                self._process_failure(first, piece.jobs, piece.error)
            elif piece.is_block:
                assert self._process_results is not None
                indices = np.arange(first, self.next_index)
                indices.flags.writeable = False
                self._process_results(indices, piece.jobs, piece.results)
            else:
                self._process_result(first, piece.jobs, piece.results)
        finally:
            self._dispatcher.from_journal = before

    @staticmethod
    def _tell(history: History, first: int, piece: Piece) -> None:
        if piece.error is not None:
            history.failed(piece.error)
        elif piece.is_stored:
            history.event("stored", jobs=[(first, piece.count)])
        else:
            history.lines.delivered(first, piece.count)


def _arranged(batch: Any, places: NDArray[np.int64]) -> Any:
    """The rows or objects in another order."""
    if isinstance(batch, list):
        return [batch[at] for at in places.tolist()]
    rows = batch[places]
    rows.flags.writeable = False
    return rows


def _own(batch: Any) -> Any:
    """What may be kept."""
    if isinstance(batch, list) or batch.nbytes > BLOCK_BYTES:
        return batch
    rows = batch.copy()
    rows.flags.writeable = False
    return rows


def _bytes_of(piece: Piece) -> int:
    return max(0 if isinstance(batch, list) else int(batch.nbytes) for batch in (piece.jobs, piece.results))


def _one_behind_the_other(batches: list[Any]) -> Any:
    if isinstance(batches[0], list):
        return [one for batch in batches for one in batch]
    rows = np.concatenate(batches)
    rows.flags.writeable = False
    return rows

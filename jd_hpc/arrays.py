"""map_array: a function of every row of an array, in one call.

The rules it keeps:

- It is a dispatcher like any other, made of the block hooks: what the engine does at full speed, and nothing beside it.
- Only the master's X counts. Before the run it tells the slaves what rows there will be, and that there will be a run at all: where
  its X is none, it raises and they leave quietly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jd_hpc import kernel as kernels
from jd_hpc.dispatcher import JobDispatcher
from jd_hpc.errors import JobError, PayloadError
from jd_hpc.machine import MPIMachine
from jd_hpc.payload import as_rows, check_dtype
from jd_hpc.plan import Plan
from jd_hpc.wire import INLINE_BYTES

PIECES_PER_SLAVE = 64
"""So many messages at least for each slave, where there are as many rows: at the end nobody waits long for the last one."""
BLOCK_BYTES = 1 << 16
"""A function of a block gets so many bytes at most: numpy's calls cost more than a message. For others a message goes whole."""


def map_array(
    function: Any,
    X: ArrayLike | None,  # noqa: N803 - what everybody calls it
    result_dtype: Any,
    *,
    vm: Any = None,
    vectorized: bool = False,
    rng: bool = False,
    on_failure: str = "raise",
    grain: int | None = None,
    journal: Any = None,
    **options: Any,
) -> NDArray[Any] | None:
    """Apply a function to every row of an array, on all slaves. Every rank of the vm must call it.

    Parameters
    ----------
    function : callable or compiled kernel
        Takes one row of `X` (a number, a record or an array) and returns one row of results. With `vectorized` it takes a block of
        rows and returns as many results. Or a compiled kernel (see `jd_hpc.kernel`): a ctypes or cffi pointer, a numba.cfunc, ...
    X : array-like
        Rows of numbers or of records of numbers: row ``X[i]`` is job i. Only the master's counts; slaves may pass None.
    result_dtype : dtype-like
        Of one result; ``("f8", 3)`` is an array of three.
    vm : None, mpi4py.MPI.Intracomm or MPIMachine
        Where the slaves are. None: this process.
    vectorized : bool
        `function` takes and returns blocks.
    rng : bool
        Give the function the row's random stream as a second argument; with `vectorized` a list of streams, one for each row. The
        option `seed` says which.
    on_failure : {"raise", "nan"}
        What becomes of rows that fail. "raise": the run ends with a JobError, which names the row. "nan": their results are NaN. A
        block fails as a whole.
    grain : int, optional
        Rows per message, and per call with `vectorized`. Default: as fits their size and number.
    journal : path, optional
        See `JobDispatcher.run`.
    **options
        Any other option of `JobDispatcher`.

    Returns
    -------
    numpy.ndarray or None
        On the master ``len(X)`` results of `result_dtype`, in the order of `X`; None on slaves.

    Raises
    ------
    PayloadError
        On the master, if `X` has no rows of numbers; on all ranks, if `result_dtype` cannot travel.
    JobError
        On the master, if a row fails, also by a result of another shape or dtype.
    KernelError, TypeError, ValueError
        If `function` or an option is none.
    Exception
        Whatever else `JobDispatcher.run` raises.
    """
    return MapArray(function, result_dtype, vm, vectorized, rng, on_failure, grain, options).map(X, journal)


class MapArray(JobDispatcher):
    """The dispatcher of `map_array`, which describes the parameters."""

    def __init__(
        self,
        function: Any,
        result_dtype: Any,
        vm: Any,
        vectorized: bool,
        rng: bool,
        on_failure: str,
        grain: int | None,
        options: dict[str, Any],
    ) -> None:
        super().__init__(vm, rng=rng, grain=grain, **options)
        if result_dtype is None:
            raise PayloadError("map_array needs a result_dtype, such as 'f8'; results that are objects are for JobDispatcher")
        self.result_dtype = check_dtype(result_dtype, "result_dtype")
        self._function = function
        self._vectorized = vectorized
        self._picks_grain = grain is None
        self._fills_nan = on_failure == "nan"
        if on_failure not in ("raise", "nan"):
            raise ValueError(f"on_failure = {on_failure!r} is neither 'raise' nor 'nan'")
        if self._fills_nan and self.result_dtype.base.kind not in "fc":
            raise ValueError(f"on_failure = 'nan': results of {self.result_dtype} cannot be NaN")

    def map(self, given: ArrayLike | None, journal: Any) -> NDArray[Any] | None:
        """Agree on the rows with the other ranks, and run."""
        channel = self.machine.channel() if isinstance(self.machine, MPIMachine) and self.machine.size > 1 else None
        if channel is None or self.machine.is_master:
            told = None
            try:
                told = self._look_at(given)
            finally:
                if channel is not None:
                    channel.tell(told)
        else:
            told = channel.hear(self.heartbeat_s)
        if told is None:
            return None
        self.job_dtype, self.grain = told
        result: NDArray[Any] | None = self.run(journal)
        return result

    def _look_at(self, given: ArrayLike | None) -> tuple[np.dtype[Any], int]:
        """Master: return the dtype of a row, and how many of them go into a message."""
        self._rows = rows_of(given)
        job_dtype = check_dtype((self._rows.dtype, self._rows.shape[1:]), "X")
        assert job_dtype is not None
        if not self._picks_grain:
            return job_dtype, self.grain
        slaves = self.machine.slots if not self.max_slaves else min(self.max_slaves, self.machine.slots)
        most = (BLOCK_BYTES if self._vectorized else INLINE_BYTES) // max(job_dtype.itemsize, self.result_dtype.itemsize)
        return job_dtype, max(1, min(most, len(self._rows) // (PIECES_PER_SLAVE * slaves)))

    def _plan(self) -> Plan:
        """Have the function as the engine wants it. What is wrong with it shows here, where the other ranks can be told."""
        if kernels.is_one(self._function):
            if self._vectorized:
                raise TypeError("vectorized=True: a compiled kernel takes one row, and is called for each")
            self.kernel = self._function
        elif not callable(self._function):
            raise TypeError(f"map_array: {self._function!r} is neither a function nor a compiled kernel")
        elif self._vectorized:
            self.process_jobs = self._process_block  # type: ignore[method-assign]
        else:
            self.process_job = self._function  # type: ignore[method-assign]
        return super()._plan()

    # ---- hooks -------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Begin at the first row."""
        self._at = 0
        self._out = np.empty(len(self._rows), self.result_dtype)

    def next_jobs(self, count: int) -> NDArray[Any] | None:
        """Give the next rows."""
        begin, self._at = self._at, min(self._at + count, len(self._rows))
        return self._rows[begin : self._at] if begin < self._at else None

    def _process_block(self, jobs: NDArray[Any], results: NDArray[Any]) -> None:
        if self.gives_rng:
            returned = self._function(jobs, [self.rng(self.first_index + at) for at in range(len(jobs))])
        else:
            returned = self._function(jobs)
        results[...] = as_rows(returned, self.result_dtype, (len(jobs),), "what the function returned for a block")

    def process_results(self, indices: NDArray[np.int64], jobs: Any, results: Any) -> None:
        """Put results where they belong."""
        self._out[indices] = results

    def process_failure(self, index: int, job: Any, error: JobError) -> None:
        """Fill with NaN, or end the run."""
        if self._fills_nan:
            self._out[index] = np.nan
            return
        error.add_note(f"map_array: this was X[{index}]{', or another row of its block' if self._vectorized else ''}.")
        super().process_failure(index, job, error)

    def postprocess(self) -> NDArray[Any]:
        """Return all results."""
        return self._out


def rows_of(given: ArrayLike | None) -> NDArray[Any]:
    """Return what was given as X as an array of rows of numbers, itself if it is one.

    Raises
    ------
    PayloadError
        If it is none.
    """
    if given is None:
        raise PayloadError("map_array: X is None on the master; only slaves may leave it out")
    if isinstance(given, np.ma.MaskedArray):
        raise PayloadError("map_array: X is a masked array, and its mask cannot travel; use filled()")
    try:
        rows = np.asarray(given)
    except Exception as error:  # ragged lists and the like
        raise PayloadError(f"map_array: X cannot become an array ({error}); give it one dtype and shape") from error
    if rows.dtype.hasobject or (rows.dtype.fields is None and rows.dtype.kind not in "biufcmM"):
        raise PayloadError(f"map_array: X has dtype {rows.dtype}: its rows must be numbers; for objects use JobDispatcher")
    if rows.ndim == 0:
        raise PayloadError(f"map_array: X is a single {rows.dtype}; give an array of rows")
    return rows.astype(rows.dtype.newbyteorder("="), copy=False)

"""joblib over MPI: what uses joblib.Parallel, such as scikit-learn, runs on a Pool. joblib is imported here only."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from joblib.parallel import AutoBatchingMixin, ParallelBackendBase, SequentialBackend
from joblib.parallel import register_parallel_backend as register_with_joblib

from jd_hpc.pool import Pool


class JoblibBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs joblib's batches on a pool.

    Parameters
    ----------
    pool : Pool, optional
        Which one. Default: the open pool that was made last; if there is none, one is made and stays open until the program ends.
    **options
        joblib's.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = False
    supports_sharedmem = False
    uses_threads = False
    default_n_jobs = -1

    def __init__(self, pool: Pool | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._pool = pool
        self._futures: set[Future[Any]] = set()

    @property
    def pool(self) -> Pool:
        """The pool. A slave that asks for one which is yet to be made serves it, and does not come back."""
        if self._pool is None:
            self._pool = Pool.current or Pool()
        return self._pool

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        """Note who asks, and return how many slaves there are for it."""
        self.parallel = parallel
        self.reset_batch_stats()
        return self.effective_n_jobs(n_jobs)

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return how many slaves there are for `n_jobs`: all if it is negative or None."""
        if n_jobs == 0:
            raise ValueError("n_jobs = 0 means nothing: give the number of slaves, or -1 for all")
        size = self.pool.size
        return size if n_jobs is None or n_jobs < 0 else min(n_jobs, size)

    def submit(self, func: Callable[[], Any], callback: Callable[[Future[Any]], object] | None = None) -> Future[Any]:
        """Have a batch run; `callback` gets the future when it has ended."""
        future = self.pool.submit(func)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """Return the result of a batch, or raise what it raised."""
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Forget the batches that no slave has begun."""
        for future in list(self._futures):
            future.cancel()

    def get_nested_backend(self) -> tuple[Any, int | None]:
        """Return what parallel calls on a slave use: nothing but the slave."""
        return SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None


def register() -> None:
    """Make the backend known to joblib, by the name of "jd_hpc"."""
    register_with_joblib("jd_hpc", JoblibBackend)

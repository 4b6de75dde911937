"""A run's hooks and options, resolved once: what dispatcher, local run and compiled core all go by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from jd_hpc import kernel as kernels
from jd_hpc._batch import Evaluator, Rows
from jd_hpc.errors import KernelError, PayloadError
from jd_hpc.messages import NoPost
from jd_hpc.ordering import CREDITS, Order
from jd_hpc.payload import check_dtype
from jd_hpc.wire import PROTOCOL

if TYPE_CHECKING:
    from jd_hpc.dispatcher import JobDispatcher
    from jd_hpc.groups import Team
    from jd_hpc.history import History
    from jd_hpc.journal import Journal
    from jd_hpc.messages import LocalPost
    from jd_hpc.progress import Progress
    from jd_hpc.sharing import Sharing

Hook = Callable[..., Any]

READ_AHEAD_BATCHES = 256
"""How far next_jobs is asked ahead, for small batches: enough to make one call for many messages, and still in the cache."""
READ_AHEAD_JOBS = 8192
READ_AHEAD_BYTES = 1 << 20


class Plan:
    """What one run goes by.

    Parameters
    ----------
    dispatcher : JobDispatcher
        Whose hooks and options these are.
    overridden : callable
        Tells whether the hook of that name is the user's own.

    Raises
    ------
    PayloadError, KernelError
        If a dtype cannot travel, or the kernel is none or has nothing to work on.
    """

    def __init__(self, dispatcher: JobDispatcher, overridden: Callable[[str], bool]) -> None:
        self.grain: int = dispatcher.grain
        self.credit: int = dispatcher.credit
        self.min_slaves: int = dispatcher.min_slaves
        self.max_attempts: int = dispatcher.max_attempts
        self.local_fallback: bool = dispatcher.local_fallback
        self.isolate: bool = dispatcher.isolate
        self.heartbeat_s: float = dispatcher.heartbeat_s
        self.job_timeout_s: float | None = dispatcher.job_timeout_s
        self.memory_limit: int | None = dispatcher.memory_limit
        self.payload_limit: int = dispatcher.payload_limit
        self.allow_nan: bool = bool(dispatcher.allow_nan)
        self.owner = dispatcher
        self.gives_rng: bool = dispatcher.gives_rng
        self.seed: int = dispatcher._seed
        self.job_dtype = check_dtype(dispatcher.job_dtype, "job_dtype")
        self.result_dtype = check_dtype(dispatcher.result_dtype, "result_dtype")
        self.job_rows: Rows | None = None if self.job_dtype is None else Rows(self.job_dtype)
        self.result_rows: Rows | None = None if self.result_dtype is None else Rows(self.result_dtype)
        for name, rows in (("job_dtype", self.job_rows), ("result_dtype", self.result_rows)):
            if rows is not None and self.grain * rows.row_bytes > self.payload_limit:
                raise PayloadError(
                    f"{name}: a message of {self.grain} times {rows.row_bytes} bytes is over payload_limit = {self.payload_limit}; "
                    f"lower grain, or raise payload_limit"
                )

        def own(name: str) -> Hook | None:
            return getattr(dispatcher, name) if overridden(name) else None

        self.next_job: Hook = dispatcher.next_job
        self.process_job: Hook = dispatcher.process_job
        self.process_result: Hook = dispatcher.process_result
        self.process_failure: Hook = dispatcher.process_failure
        self.next_jobs = own("next_jobs")
        self.process_jobs = own("process_jobs")
        self.process_results = own("process_results")
        self.shared = own("shared")
        if self.shared is not None and not callable(self.shared):
            raise PayloadError(
                f"shared is a {type(self.shared).__name__} where a method was expected, which returns what all slaves share; give "
                f"your attribute another name"
            )
        self.sharing: Sharing | None = None  # on the master, if shared() is overridden
        self.team: Team | None = None  # of this rank, if a slave is a group of ranks
        self.fellows: dict[int, list[int]] = {}  # on the master: rank → the ranks of its group
        self.on_slave_started = own("on_slave_started")
        self.on_slave_idle = own("on_slave_idle")
        self.on_slave_failed = own("on_slave_failed")
        self.on_job_sent = own("on_job_sent")
        self.on_result = own("on_result")
        self.history: History | None = None  # the master's, where there is one; see `tell`
        self.in_child = partial(setattr, dispatcher, "_post", NoPost())  # in the process that isolate runs jobs in
        self.post: LocalPost | None = None  # without a vm
        self.progress: Progress | None = None  # likewise
        self.failed_count = 0  # likewise
        self.kernel = self._kernel(dispatcher.kernel)
        self.read_ahead = self._read_ahead()
        self.journal: Journal | None = None  # on the master, if the run has one
        self.order: Order | None = self._order(dispatcher) if dispatcher.ordered else None

    def _kernel(self, given: Any) -> kernels.Kernel | None:
        if given is None:
            return None
        if self.job_rows is None or self.result_rows is None:
            raise KernelError("a compiled kernel needs rows to work on: declare both job_dtype and result_dtype")
        if self.gives_rng:
            raise KernelError(
                "rng=True: a compiled kernel cannot draw from a numpy generator; draw in next_job and let the numbers travel in "
                "the job, or write process_job in Python"
            )
        return kernels.resolve(given)

    def _read_ahead(self) -> int:
        """Batches that next_jobs is asked for before a slave is free; next_job is asked only when one is."""
        if self.next_jobs is None or self.job_rows is None:
            return 0
        batch_bytes = self.grain * self.job_rows.row_bytes
        return max(1, min(READ_AHEAD_BATCHES, READ_AHEAD_JOBS // self.grain, READ_AHEAD_BYTES // batch_bytes))

    def _order(self, dispatcher: JobDispatcher) -> Order:
        """Have an order between whoever delivers and the hooks."""
        window = dispatcher._window or self.grain * (CREDITS * self.credit * dispatcher.machine.slots + self.read_ahead)
        order = Order(self.process_result, self.process_results, self.process_failure, dispatcher, window)
        self.process_result, self.process_failure = order.take_result, order.take_failure
        if self.process_results is not None:
            self.process_results = order.take_results
        return order

    def tell(self, history: History | None) -> None:
        """Have a history told what happens."""
        self.history = history
        if self.order is not None:
            self.order.history = history

    def evaluator(self, on_wait: Callable[[], object] | None = None) -> Evaluator:
        """Return what runs a batch of jobs; whoever asks for it calls `close()` of it at last.

        With `isolate` it calls `on_wait` now and then while it waits; what that raises ends the batch.
        """
        inner = Evaluator(
            self.process_job,
            self.process_jobs,
            self.job_rows,
            self.result_rows,
            self.allow_nan,
            self.kernel,
            self.owner.rng if self.gives_rng else None,
            self.owner,
        )
        if self.team is not None:
            from jd_hpc.groups import TeamEvaluator

            return TeamEvaluator(inner, self.team)
        if not self.isolate:
            return inner
        from jd_hpc.isolate import IsolatedEvaluator

        return IsolatedEvaluator(
            inner,
            self.grain,
            job_timeout_s=self.job_timeout_s,
            memory_limit=self.memory_limit,
            on_wait=on_wait,
            in_child=self.in_child,
        )

    def run_one(self, job: Any, index: int) -> Any:
        """Call `process_job` for job number `index`, without a look at what it returns."""
        return self.process_job(job, self.owner.rng(index)) if self.gives_rng else self.process_job(job)

    def facts(self) -> dict[str, str]:
        """Return what must be the same on all ranks, for a slave's first message."""
        return {
            "wire protocol": str(PROTOCOL),
            "job_dtype": str(self.job_dtype),
            "result_dtype": str(self.result_dtype),
            "grain": str(self.grain),
            "credit": str(self.credit),
            "payload_limit": str(self.payload_limit),
            "isolate": str(self.isolate),
            "rng": str(self.gives_rng),
            "seed": str(self.seed),
            "shared() overridden": str(self.shared is not None),
        }

    def differences(self, theirs: dict[str, str]) -> str:
        """Say in words how another rank's facts differ from these; nothing if they do not."""
        mine = self.facts()
        return "; ".join(
            f"{name} is {theirs.get(name)} there and {mine.get(name)} here"
            for name in sorted(mine | theirs)
            if mine.get(name) != theirs.get(name)
        )

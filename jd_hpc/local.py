"""The same run with no vm: the hooks are called in this process, in the same order, through the same checks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jd_hpc._batch import Buffer, Evaluator
from jd_hpc.errors import Failure, JobError, PayloadError
from jd_hpc.payload import as_rows, block_length, check_finite, pick
from jd_hpc.plan import Plan
from jd_hpc.progress import Progress
from jd_hpc.signals import Asked, pass_on
from jd_hpc.walltime import Drain

if TYPE_CHECKING:
    from jd_hpc.journal import Journal

Attempts = list[tuple[int, str]]
VERDICT_DELIVER = 0
"""As in scheduler.py."""


class _Clock:
    """When to drain."""

    def __init__(self, drain: Drain | None, asked: Asked | None) -> None:
        self._drain, self._asked = drain, asked
        self.took_s: list[float] = []

    def is_over(self) -> bool:
        """Whether no job is begun any more."""
        if self._drain is None:
            return False
        now = time.monotonic()
        if self._asked is not None and self._asked.level:
            pass_on(self._drain, now, self._asked.level, self._asked.number, 0)
        took_s, self.took_s = self.took_s, []
        return self._drain.tick(now, took_s) == 0


class Engine:
    """Runs the jobs here.

    Parameters
    ----------
    plan : Plan
        What to go by.
    drain : Drain or None
        What decides when no job is begun any more.
    asked : Asked or None
        What signals ask for.

    Attributes
    ----------
    count : int
        Jobs so far.
    put_back : int
        How many of them were not begun, because the time was over.
    """

    def __init__(self, plan: Plan, drain: Drain | None = None, asked: Asked | None = None) -> None:
        self._plan = plan
        self._clock = _Clock(drain, asked)
        self._evaluator = plan.evaluator()
        self._failure: BaseException | None = None
        self.count = self.put_back = 0

    def run_jobs(self) -> None:
        """Run until there is no job left, or no time. May be called again, unless it raised.

        Raises
        ------
        JobError
            From the default process_failure, when a job fails.
        PayloadError
            If a job is not what was declared.
        """
        plan = self._plan
        if plan.journal is not None and plan.journal.replays and self._replay(plan.journal):
            return
        while True:
            jobs = _next_batch(plan, self.count)
            if plan.post is not None and plan.post.settle():  # handlers may have made jobs
                jobs = jobs if len(jobs) else _next_batch(plan, self.count)
            if not len(jobs):
                return
            self.count += len(jobs)
            if self._failure is not None:
                raise self._failure
            if self._clock.is_over():
                self.put_back = len(jobs)
                return
            _run(plan, self._evaluator, self._clock, self.count - len(jobs), jobs)
            if plan.progress is not None:
                _show(plan.progress, self.count, plan.failed_count)

    def _replay(self, journal: Journal) -> bool:
        """Deliver what the journal has, and run what it lacks, in batches as they were. Returns whether it was all."""
        plan = self._plan
        while journal.replays:
            holes, is_none = journal.replay(plan.grain)
            self.count = journal.next_index
            for at, (index, job) in enumerate(holes):
                if self._clock.is_over():
                    self.put_back = len(holes) - at
                    return True
                jobs = [job] if plan.job_dtype is None else _read_only(_rows([job], plan.job_dtype))
                _run(plan, self._evaluator, self._clock, index, jobs)
            may_be_more = plan.post is not None and plan.post.settle()  # handlers may have made jobs
            if is_none and not holes and not may_be_more:
                return True
        return False

    def wake(self) -> None:
        """There are jobs again: from any thread. Nothing is needed: run_jobs asks after every batch."""

    def break_off(self, error: BaseException) -> None:
        """Have run_jobs raise this after the batch that runs: from any thread."""
        self._failure = error

    def look_around(self) -> None:
        """Between two calls of run_jobs: there is nobody to hear."""

    def close(self) -> None:
        """Give back what it needed."""
        self._evaluator.close()


def _show(progress: Progress, done: int, failed: int) -> None:
    """Say how far the run is."""
    progress.tick(time.monotonic(), lambda: (done, failed, 1, 1))


def _run(plan: Plan, evaluator: Evaluator, clock: _Clock, first: int, jobs: Any) -> None:
    """Evaluate a batch and hand over what came of it."""
    begun = time.monotonic()
    results, failures = _evaluate(plan, evaluator, jobs, first)
    clock.took_s.append((time.monotonic() - begun) / len(jobs))
    attempts = _try_again(plan, evaluator, jobs, first, results, failures)
    _deliver(plan, first, jobs, results if isinstance(results, list) else _read_only(results), failures, attempts)


def _evaluate(plan: Plan, evaluator: Evaluator, jobs: Any, first: int) -> tuple[Any, dict[int, Failure]]:
    """Return the results of a batch, rows or objects, and what failed."""
    count = len(jobs)
    out: Buffer | None = None
    objects: list[Any] | None = None
    if plan.result_rows is None:
        objects = [None] * count
    else:
        out = Buffer(count * plan.result_rows.row_bytes, plan.result_rows, 0, True)
    if plan.history is not None:
        plan.history.lines.sent(0, 0, first, count, 0)
    if plan.post is None:
        failures = Failure.of_all(evaluator.evaluate(jobs, count, out, objects, first))
    else:
        plan.post.settle()  # what the hooks have left
        plan.post.in_job = True
        try:
            failures = Failure.of_all(evaluator.evaluate(jobs, count, out, objects, first))
        finally:
            plan.post.in_job = False
    if plan.history is not None:
        plan.history.lines.result(VERDICT_DELIVER, 0, 0, first, count, 0)
    if out is None:
        return objects, failures
    return out.rows.copy() if out.kept() else out.rows, failures


def _try_again(
    plan: Plan, evaluator: Evaluator, jobs: Any, first: int, results: Any, failures: dict[int, Failure]
) -> dict[int, Attempts]:
    """Run once more, one by one, what killed the process that ran it (isolate). Returns how every attempt of these ended."""
    attempts: dict[int, Attempts] = {at: [(0, failure.died)] for at, failure in failures.items() if failure.died is not None}
    for at, history in attempts.items():
        while len(history) < plan.max_attempts:
            if plan.history is not None:
                plan.history.event("again", index=first + at, slave=0, strikes=len(history), how=history[-1][1])
            result, failed = _evaluate(plan, evaluator, jobs[at : at + 1], first + at)
            del failures[at]
            if not failed:
                results[at] = result[0]
                break
            failures[at] = failed[0]
            if failed[0].died is None:
                break
            history.append((0, failed[0].died))
    return attempts


def _next_batch(plan: Plan, first: int) -> Any:
    """Ask for up to one grain of jobs: rows that nobody else holds, or a list of objects."""
    if plan.next_jobs is not None:
        block = plan.next_jobs(plan.grain)
        count = block_length(block, plan.grain)
        if plan.job_dtype is None or count == 0:
            return list(block) if count else ()
        rows = as_rows(block, plan.job_dtype, (count,), "what next_jobs returned").copy()
    else:
        jobs: list[Any] = []
        while len(jobs) < plan.grain and (job := plan.next_job()) is not None:
            jobs.append(job if plan.job_dtype is None else _row(job, plan.job_dtype, first + len(jobs)))
        if plan.job_dtype is None or not jobs:
            return jobs
        rows = _rows(jobs, plan.job_dtype)
    if not plan.allow_nan:
        check_finite(rows, "what next_job returned")
    return _read_only(rows)


def _rows(jobs: list[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    rows = np.empty(len(jobs), dtype)
    for at, row in enumerate(jobs):
        rows[at] = row
    return rows


def _row(job: Any, dtype: np.dtype[Any], index: int) -> NDArray[Any]:
    """Copy a job at once: next_job may use its array again."""
    try:
        return as_rows(job, dtype, (), "what next_job returned").copy()
    except PayloadError as error:
        error.add_note(f"This was job {index}.")
        raise


def _deliver(plan: Plan, first: int, jobs: Any, results: Any, failures: dict[int, Failure], attempts: dict[int, Attempts]) -> None:
    """Hand over a batch: results first where they go as a block, else in the order of the jobs."""
    good = [at for at in range(len(jobs)) if at not in failures]
    if good and (plan.journal is not None or plan.process_results is not None):
        indices, good_jobs, good_results = _read_only(first + np.array(good, "i8")), pick(jobs, good), pick(results, good)
        if plan.journal is not None:
            plan.journal.record(indices, good_jobs, good_results)
        if plan.process_results is not None:
            for at in good:
                _note_delivery(plan, first + at)
            plan.process_results(indices, good_jobs, good_results)
    for at in range(len(jobs)):
        if at in failures:
            error = JobError(first + at, 0, failures[at], attempts.get(at, ()))
            if plan.history is not None and plan.order is None:
                plan.history.failed(error)
            plan.failed_count += 1
            plan.process_failure(first + at, jobs[at], error)
        elif plan.process_results is None:
            _note_delivery(plan, first + at)
            plan.process_result(first + at, jobs[at], results[at])


def _note_delivery(plan: Plan, index: int) -> None:
    if plan.history is not None and plan.order is None:
        plan.history.lines.delivered(index, 1)


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array

"""The same run with no vm: the hooks are called in this process, in the same order, through the same checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jd_hpc._batch import Buffer, Evaluator
from jd_hpc.errors import Failure, JobError, PayloadError
from jd_hpc.payload import as_rows, block_length, check_finite
from jd_hpc.plan import Plan

if TYPE_CHECKING:
    from jd_hpc.journal import Journal

Attempts = list[tuple[int, str]]


def run_jobs(plan: Plan) -> int:
    """Run until there is no job left; return how many there were.

    Raises
    ------
    JobError
        From the default process_failure, when a job fails.
    PayloadError
        If a job is not what was declared.
    """
    evaluator = plan.evaluator()
    try:
        if plan.journal is not None and plan.journal.replays:
            first, is_over = _replay(plan, plan.journal, evaluator)
            if is_over:
                return first
        else:
            first = 0
        while len(jobs := _next_batch(plan, first)):
            _run(plan, evaluator, first, jobs)
            first += len(jobs)
    finally:
        evaluator.close()
    return first


def _replay(plan: Plan, journal: Journal, evaluator: Evaluator) -> tuple[int, bool]:
    """Deliver what the journal has, and run what it lacks, in batches as they were; tell how many that was, and if it was all."""
    while journal.replays:
        holes, is_none = journal.replay(plan.grain)
        for index, job in holes:
            _run(plan, evaluator, index, [job] if plan.job_dtype is None else _read_only(_rows([job], plan.job_dtype)))
        if is_none and not holes:
            return journal.next_index, True
    return journal.next_index, False


def _run(plan: Plan, evaluator: Evaluator, first: int, jobs: Any) -> None:
    """Evaluate a batch and hand over what came of it."""
    results, failures = _evaluate(plan, evaluator, jobs)
    attempts = _try_again(plan, evaluator, jobs, results, failures)
    _deliver(plan, first, jobs, results if isinstance(results, list) else _read_only(results), failures, attempts)


def _evaluate(plan: Plan, evaluator: Evaluator, jobs: Any) -> tuple[Any, dict[int, Failure]]:
    """Return the results of a batch, rows or objects, and what failed."""
    count = len(jobs)
    if plan.result_rows is None:
        objects: list[Any] = [None] * count
        return objects, Failure.of_all(evaluator.evaluate(jobs, count, None, objects))
    out = Buffer(count * plan.result_rows.row_bytes, plan.result_rows, 0, True)
    failures = Failure.of_all(evaluator.evaluate(jobs, count, out, None))
    return out.rows.copy() if out.kept() else out.rows, failures


def _try_again(plan: Plan, evaluator: Evaluator, jobs: Any, results: Any, failures: dict[int, Failure]) -> dict[int, Attempts]:
    """Run once more, one by one, what killed the process that ran it (isolate). Returns how every attempt of these ended."""
    attempts: dict[int, Attempts] = {at: [(0, failure.died)] for at, failure in failures.items() if failure.died is not None}
    for at, history in attempts.items():
        while len(history) < plan.max_attempts:
            result, failed = _evaluate(plan, evaluator, jobs[at : at + 1])
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
    record = None if plan.journal is None else plan.journal.record
    takers = [take for take in (record, plan.process_results) if take is not None]
    if takers and len(failures) < len(jobs):
        good = [at for at in range(len(jobs)) if at not in failures]
        indices = _read_only(first + np.array(good, "i8"))
        for take in takers:
            take(indices, _pick(jobs, good), _pick(results, good))
    for at in range(len(jobs)):
        if at in failures:
            plan.process_failure(first + at, jobs[at], JobError(first + at, 0, failures[at], attempts.get(at, ())))
        elif plan.process_results is None:
            plan.process_result(first + at, jobs[at], results[at])


def _pick(batch: Any, good: list[int]) -> Any:
    if len(good) == len(batch):
        return batch
    return _read_only(batch[good]) if isinstance(batch, np.ndarray) else [batch[at] for at in good]


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array

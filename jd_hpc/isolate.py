"""Jobs in a process of their own: whatever becomes of it costs the job that ran one attempt, and the rank nothing.

The rules it keeps:

- The child is forked at the first batch, so that it has what on_startup prepared, and anew after each death.
- Payload and progress lie in memory that both processes map. So the rank knows, however the child ended, which job it was at, and
  keeps what the jobs before that one gave. A wake-up is a number in that memory, watched for a moment, and an eventfd.
- Only this module waits for the child, and the child's session goes with it: what jobs have started ends too.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from jd_hpc._batch import Buffer, Evaluator, kernel_failures
from jd_hpc.child import FAILURE, INTERRUPTED, OVER_MEMORY, SPIN_NS, Child, Failures, Shared, flush
from jd_hpc.errors import IsolationError, PayloadError, ProcessDiedError

KILL_WAIT_S = 5.0
"""A killed child that is not gone by then hangs in the kernel, and is left to it."""
START_WAIT_S = 30.0
"""A child that takes no batch for so long hangs in the fork: of what the rank has loaded, something does not bear it."""
TAKE_WAIT_S = 1.0
"""One that has run jobs before may take so long, or job_timeout_s if that is more: else something hangs that a job has left."""
MOST_STARTS = 3
"""So many children in a row that take no batch, and there will be no other."""
LOOK_S = 0.01
"""How often to see whether the child lives, where the kernel does not tell (Linux before 5.3)."""


class IsolatedEvaluator(Evaluator):
    """Runs the jobs of a batch in a child process, which is replaced when it dies.

    The hooks see the rank's objects as they were at the fork. What jobs change stays in the child and is lost with it; a random
    generator made before the first batch begins anew in the next child, and repeats its numbers. Memory is shared with the rank
    until one of the two writes to it. GNU OpenMP hangs in a child if the rank has used it before.

    Parameters
    ----------
    inner : Evaluator
        What runs them there.
    grain : int
        The most jobs in a batch.
    job_timeout_s : float, optional
        A job that runs longer is killed; of a block, so long times the number of its jobs.
    memory_limit : int, optional
        Bytes that the child may allocate beyond what it had when it was forked. It is set as RLIMIT_DATA, which counts private
        writable memory, stacks of threads included; not RLIMIT_AS, which also counts what is only reserved or mapped from files.
    close_fds : iterable of int
        What the child closes: connections that are to end when the rank does.
    on_wait : callable, optional
        Called about every `wait_s` seconds while a batch runs, without arguments. What it raises ends the batch, and the child.
    wait_s : float
        See `on_wait`.
    in_child : callable, optional
        Called in the child before its first batch, without arguments.

    Attributes
    ----------
    close_fds : iterable of int
        May be changed at any time; counts from the next child on.

    Raises
    ------
    IsolationError
        Where the operating system is not Linux.
    """

    def __init__(
        self,
        inner: Evaluator,
        grain: int,
        *,
        job_timeout_s: float | None = None,
        memory_limit: int | None = None,
        close_fds: Iterable[int] = (),
        on_wait: Callable[[], object] | None = None,
        wait_s: float = 0.1,
        in_child: Callable[[], object] | None = None,
    ) -> None:
        self._pid: int | None = None
        self._shared: Shared | None = None
        if not hasattr(os, "eventfd"):
            raise IsolationError("jobs in a process of their own need Linux; set isolate = False")
        # no kernel: the core would call it in the rank
        super().__init__(inner.process_job, inner.process_jobs, inner.job_rows, inner.result_rows, inner.allow_nan)
        self._inner = inner
        self._is_block = inner.kernel is None and inner.process_jobs is not None
        self._grain = grain
        self._job_timeout_s = job_timeout_s
        self._memory_limit = memory_limit
        self.close_fds = close_fds
        self._on_wait = on_wait
        self._wait_s = wait_s
        self._in_child = in_child
        self._rank = os.getpid()
        self._pidfd: int | None = None
        self._turn = 0
        self._starts = 0  # children in a row that took no batch
        self._last_how = ""  # what became of the last one

    def evaluate(self, jobs: Any, count: int, out: Buffer | None, results: list[Any] | None, first: int = 0) -> Failures:
        """Run the first `count` of `jobs`; the same contract as the base class has.

        A job whose process died, or had to be killed, fails with a ProcessDiedError; an exception of a job comes as a Failure.

        Raises
        ------
        IsolationError
            If no child can be started, or several in a row died before they took a batch.
        KeyboardInterrupt
            The child is killed first.
        """
        failures: Failures = []
        ended = 0
        try:
            while ended < count:
                shared = self._started()
                try:
                    shared.first.set(first + ended)
                    self._ask(shared, jobs, ended, count)
                except PayloadError as error:
                    return [*failures, *((at, error) for at in range(ended, count))]
                how = self._wait(shared, count - ended)
                ended = self._collect(shared, how, ended, count, out, results, failures)
        except BaseException:
            self._end_child()
            raise
        return failures

    def close(self) -> None:
        """End the child and give back what it needed. A later batch would start another one."""
        if self._rank != os.getpid():
            return  # somebody forked: neither child nor files are this process's own
        self._end_child()
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    # ---- one attempt -----------------------------------------------------------------------------------------------

    def _ask(self, shared: Shared, jobs: Any, first: int, end: int) -> None:
        if shared.jobs is not None:
            shared.jobs[: end - first] = jobs[first:end]
        else:
            assert shared.job_memory is not None
            shared.job_memory.put(0, list(jobs[first:end]), "a job")
        shared.count.set(end - first)
        shared.running.set(-1)
        shared.journal_bytes.set(0)
        shared.verdict.set(0)
        self._turn += 1
        shared.asked.set(self._turn)
        os.eventfd_write(shared.wake_child, 1)

    def _wait(self, shared: Shared, count: int) -> str | None:
        """Wait for the answer: None. Otherwise how the child ended; nothing if that was no job's fault."""
        if shared.answered.becomes(self._turn, SPIN_NS):
            return None
        limit_s = None
        if self._job_timeout_s is not None:
            limit_s = self._job_timeout_s * (count if self._is_block else 1)
        poll, most_ms = self._poll(shared, limit_s)
        take_s = START_WAIT_S if limit_s is None or self._starts else max(limit_s, TAKE_WAIT_S)
        running, since_s = shared.running.get(), time.monotonic()
        while True:
            for fd, _ in poll.poll(most_ms):
                if fd == shared.wake_rank:
                    os.eventfd_read(fd)
            if shared.answered.get() == self._turn:
                return None
            how = self._how_it_ended(shared)
            if how is not None:
                return how
            if shared.running.get() != running:
                running, since_s = shared.running.get(), time.monotonic()
            elif running < 0 and time.monotonic() - since_s > take_s:
                return "did not begin"
            elif running >= 0 and limit_s is not None and time.monotonic() - since_s > limit_s:
                return self._overran(shared, running, count)
            if self._on_wait is not None:
                self._on_wait()

    def _poll(self, shared: Shared, limit_s: float | None) -> tuple[select.poll, float]:
        """What to wait for, and how long at most (ms). The limit is looked after from here: no job pays for a clock."""
        poll = select.poll()
        poll.register(shared.wake_rank, select.POLLIN)
        waits_s = [1.0]
        if self._on_wait is not None:
            waits_s.append(self._wait_s)
        if self._pidfd is None:
            waits_s.append(LOOK_S)
        else:
            poll.register(self._pidfd, select.POLLIN)
        if limit_s is not None:
            waits_s.append(max(limit_s / 16, 0.001))
        return poll, 1000 * min(waits_s)

    def _overran(self, shared: Shared, running: int, count: int) -> str | None:
        self._end_child()
        if shared.answered.get() == self._turn:
            return None  # just in time
        if shared.running.get() != running:
            return ""  # so was this job, and the next one is innocent
        blocks = f" times {count} jobs" if self._is_block and count > 1 else ""
        return f"ran longer than job_timeout_s = {self._job_timeout_s:g}{blocks}"

    def _collect(
        self,
        shared: Shared,
        how: str | None,
        first: int,
        end: int,
        out: Buffer | None,
        results: list[Any] | None,
        failures: Failures,
    ) -> int:
        """Take what an attempt gave; return how far it came, with the job that killed the child."""
        count = end - first
        done = count
        if how is not None:
            self._end_child()  # first: it may still be on the move
            done = min(shared.running.get(), count)
            if shared.verdict.get() == INTERRUPTED:
                raise KeyboardInterrupt
            if done < 0:
                self._last_how = how
                return first
            if self._is_block and done < count:  # nobody can tell which of its jobs did it
                error = ProcessDiedError(how)
                failures += [(at, error) for at in range(first, end)]
                return end
        self._starts = 0
        if how is not None and self._inner.kernel is not None:
            told: set[int] = set()
            self._take_codes(shared, done, first, failures)
        else:
            told = self._read_journal(shared, first, results, failures)
        if how and done < count:
            if done not in told:  # else it had ended when the child died
                failures.append((first + done, ProcessDiedError(how)))
            done += 1
        if out is not None:
            assert shared.out is not None
            out.rows[first : first + done] = shared.out.rows[:done]
        return first + done

    def _read_journal(self, shared: Shared, first: int, results: list[Any] | None, failures: Failures) -> set[int]:
        """Take objects and failures; return whose they were."""
        told: set[int] = set()
        if shared.journal_bytes.get() == 0:
            return told
        for kind, at, where in shared.records():
            if kind == FAILURE:
                offsets, failure = shared.journal.get(where)
                failures += [(first + offset, failure) for offset in offsets]
                told.update(offsets)
                continue
            assert results is not None
            told.add(at)
            try:
                results[first + at] = shared.journal.get(where)
            except Exception as error:  # it was pickled well, but cannot be rebuilt here
                failures.append((first + at, error))
        return told

    def _take_codes(self, shared: Shared, done: int, first: int, failures: Failures) -> None:
        """Failures of the calls before the one that killed the child: it did not come to telling them."""
        assert shared.codes is not None and shared.out is not None
        found: list[tuple[int, BaseException]] = [*kernel_failures(shared.codes[:done].tolist())]
        self._inner.check_nan(done, shared.out, found)
        failures += [(first + at, error) for at, error in found]

    # ---- the child's life ------------------------------------------------------------------------------------------

    def _started(self) -> Shared:
        """Return what is shared with a child that is there."""
        if self._shared is None:
            self._shared, self._turn, self._starts = Shared(self._inner, self._grain), 0, 0
        if self._pid is None:
            if self._starts == MOST_STARTS:
                raise IsolationError(
                    f"{MOST_STARTS} processes in a row died before they ran a job, the last one: {self._last_how}; "
                    f"see what they wrote to stderr"
                )
            self._starts += 1
            self._fork(self._shared)
        return self._shared

    def _fork(self, shared: Shared) -> None:
        flush()  # or the child would write it once more
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # no handler may run until it is known who is who
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # other threads of the rank, such as MPI's, are no matter here
                pid = os.fork()
            if pid == 0:
                try:
                    if self._in_child is not None:
                        self._in_child()
                    Child(self._inner, shared, self._turn, self._memory_limit).live(self._rank, self.close_fds, mask)
                finally:
                    os._exit(70)  # whatever happens, there is only one rank
            self._pid = pid
        except OSError as error:
            raise IsolationError(f"no process can be started to run the jobs: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        with contextlib.suppress(OSError, AttributeError):  # an old kernel, or a Python built on one
            self._pidfd = os.pidfd_open(pid)

    def _how_it_ended(self, shared: Shared) -> str | None:
        """Say what became of the child, or None while it lives. It stays to be waited for: its session is still to be killed."""
        assert self._pid is not None
        try:
            ended = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return "somebody else waited for it, and knows how it ended"
        if ended is None:
            return None
        if shared.verdict.get() == OVER_MEMORY:
            return f"over memory_limit = {self._memory_limit} bytes"
        if ended.si_code == os.CLD_EXITED:
            return f"left with exit code {ended.si_status}"
        try:
            return f"killed by {signal.Signals(ended.si_status).name}"
        except ValueError:
            return f"killed by signal {ended.si_status}"

    def _end_child(self) -> None:
        """Kill it and all that its jobs started, if it has not ended already, and wait until it is gone."""
        if self._pid is None:
            return
        with contextlib.suppress(ChildProcessError):  # somebody else waited for it: the number may be another's by now
            if os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(self._pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, signal.SIGKILL)
            end_s = time.monotonic() + KILL_WAIT_S
            while os.waitpid(self._pid, os.WNOHANG)[0] == 0 and time.monotonic() < end_s:
                time.sleep(0.0005)
        if self._pidfd is not None:
            os.close(self._pidfd)
        self._pid = self._pidfd = None

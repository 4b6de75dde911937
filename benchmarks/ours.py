"""The forms of a jd_hpc run that are measured. Each one is a process of its own and prints one line of JSON.

    mpiexec -n 4 python ours.py kernel  --library add_kernel.so [--grain 1] [--credit 4] [--seconds 1]
    mpiexec -n 4 python ours.py block   [--grain 1000]    block hooks in Python on both sides
    mpiexec -n 4 python ours.py single  [--grain 1]       single hooks in Python on both sides
    mpiexec -n 2 python ours.py paced   [--grain 100]     block hooks, every job takes 10 us
    mpiexec -n 2 python ours.py payload [--bytes 1000000] jobs and results of that size, echoed
    mpiexec -n 2 python ours.py memory  --library add_kernel.so
    mpiexec -n 4 python ours.py map     --library add_kernel.so [--vectorized]    map_array, and the same by hand in turn
    mpiexec -n 4 python ours.py idle

With --journal FILE the runs of kernel, block, single and paced write one.

"rate" is in jobs per second of the loop, from the first call of `next_job` to the last of `process_result`, as
reference.c takes it; "run_rate" counts all of `run()`, as peers.py does.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from jd_hpc import JobDispatcher, map_array

RESULT = 1.5
TURNS = 9  # of `map`
BLOCK = 4096  # jobs are made this many at a time, as in reference.c
KERNEL = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
Record = dict[str, Any]


class Measured(JobDispatcher):
    """Counts jobs and results and notes when the first job was asked for and the last result came."""

    job_dtype = np.dtype(("f8", 2))
    result_dtype = np.dtype("f8")
    journal: str | None = None

    def prepare(self, count: int) -> None:
        """Make ready for a run of `count` jobs; what is allocated here is not part of the time."""
        if self.journal is not None:
            Path(self.journal).unlink(missing_ok=True)
        self.count = count
        self.asked = self.done = 0
        self.first_s = self.last_s = 0.0

    def check(self) -> None:
        if self.done != self.count:
            raise RuntimeError(f"{self.done} results of {self.count} jobs")


class Blocks(Measured):
    """Block hooks on the master: an array goes out, results are put at their places."""

    def prepare(self, count: int) -> None:
        super().prepare(count)
        self.results = np.full(count, -1.0)  # not np.empty: the pages are to be there before the clock starts
        self.block = np.empty((0, 2))
        self.block_used = 0

    def next_jobs(self, count: int) -> NDArray[Any] | None:
        if self.asked == 0:
            self.first_s = time.perf_counter()
        if self.block_used == len(self.block):
            if self.asked >= self.count:
                return None
            self.block = np.empty((min(max(BLOCK, count), self.count - self.asked), 2))
            self.block[:, 0] = np.arange(self.asked, self.asked + len(self.block))
            self.block[:, 1] = 0.5
            self.block_used = 0
        rows = self.block[self.block_used : self.block_used + count]
        self.block_used += len(rows)
        self.asked += len(rows)
        return rows

    def process_results(self, indices: NDArray[Any], jobs: NDArray[Any], results: NDArray[Any]) -> None:
        self.results[indices] = results
        self.done += len(results)
        if self.done == self.count:
            self.last_s = time.perf_counter()


class KernelForm(Blocks):
    """The compiled kernel: what is compared with reference.c. `kernel` is set on the class from the command line."""

    def check(self) -> None:
        super().check()
        if not np.array_equal(self.results, np.arange(self.count) + 0.5):
            raise RuntimeError("a result is wrong or in the wrong place")


class BlockForm(Blocks):
    """A function in Python for many jobs at once."""

    def process_jobs(self, jobs: NDArray[Any], results: NDArray[Any]) -> None:
        results[:] = RESULT

    def check(self) -> None:
        super().check()
        if not (self.results == RESULT).all():
            raise RuntimeError("a result is missing")


class PacedForm(BlockForm):
    """The same, with jobs that take 10 us of a core each: 100,000 of them a second."""

    def process_jobs(self, jobs: NDArray[Any], results: NDArray[Any]) -> None:
        end = time.perf_counter() + 10e-6 * len(jobs)
        results[:] = RESULT
        while time.perf_counter() < end:
            pass


def added(rows: NDArray[Any]) -> NDArray[Any]:
    """What the kernel does, for a block."""
    return rows[:, 0] + rows[:, 1]


class HandForm(Measured):
    """An array of rows, and an array of results: what map_array saves its users to write."""

    vectorized = False

    def prepare(self, count: int) -> None:
        super().prepare(count)
        self.rows = np.full((count, 2), 0.5)
        self.rows[:, 0] = np.arange(count)
        self.kernel = None if self.vectorized else KernelForm.kernel

    def run(self, journal: Any = None) -> None:
        self.first_s = time.perf_counter()
        super().run(journal)
        self.last_s = time.perf_counter()

    def reset(self) -> None:
        self.results = np.empty(self.count)
        self.asked = self.done = 0

    def next_jobs(self, count: int) -> NDArray[Any] | None:
        begin, self.asked = self.asked, min(self.asked + count, self.count)
        return self.rows[begin : self.asked] if begin < self.asked else None

    def process_jobs(self, jobs: NDArray[Any], results: NDArray[Any]) -> None:
        results[:] = added(jobs)

    def process_results(self, indices: NDArray[Any], jobs: NDArray[Any], results: NDArray[Any]) -> None:
        self.results[indices] = results
        self.done += len(results)

    def check(self) -> None:
        super().check()
        if not np.array_equal(self.results, np.arange(self.count) + 0.5):
            raise RuntimeError("a result is wrong or in the wrong place")


class MapForm(HandForm):
    """map_array itself; only the master has rows."""

    chosen_grain: int | None = None

    def run(self, journal: Any = None) -> None:
        function = added if self.vectorized else KernelForm.kernel
        rows = self.rows if self.machine.is_master else None
        options = {"vm": self.machine, "vectorized": self.vectorized, "grain": self.chosen_grain, "credit": self.credit}
        self.first_s = time.perf_counter()
        results = map_array(function, rows, "f8", **options)
        self.last_s = time.perf_counter()
        if results is not None:
            self.results, self.done = results, len(results)


class SingleForm(Measured):
    """One call in Python per job and per result: the same jobs and results as the loop in peers.py."""

    def prepare(self, count: int) -> None:
        super().prepare(count)
        self.jobs = np.ones((count, 2))
        self.results = np.full(count, -1.0)

    def next_job(self) -> NDArray[Any] | None:
        asked = self.asked
        if asked == 0:
            self.first_s = time.perf_counter()
        elif asked == self.count:
            return None
        self.asked = asked + 1
        return self.jobs[asked]

    def process_job(self, job: NDArray[Any]) -> float:
        return RESULT

    def process_result(self, index: int, job: NDArray[Any], result: float) -> None:
        self.results[index] = result
        self.done += 1
        if self.done == self.count:
            self.last_s = time.perf_counter()

    def check(self) -> None:
        super().check()
        if not (self.results == RESULT).all():
            raise RuntimeError("a result is missing")


class PayloadForm(Measured):
    """Large jobs that come back as they are; the dtypes are set on the class from the command line."""

    def prepare(self, count: int) -> None:
        super().prepare(count)
        self.data = np.arange(self.job_dtype.itemsize // 8, dtype="f8")
        self.wrong = 0

    def next_job(self) -> NDArray[Any] | None:
        if self.asked == 0:
            self.first_s = time.perf_counter()
        if self.asked == self.count:
            return None
        self.asked += 1
        return self.data

    def process_job(self, job: NDArray[Any]) -> NDArray[Any]:
        return job

    def process_result(self, index: int, job: NDArray[Any], result: NDArray[Any]) -> None:
        # Both ends only: a whole comparison would read every byte once more, which the ping-pong does not.
        self.wrong += result[0] != 0.0 or result[-1] != len(result) - 1
        self.done += 1
        if self.done == self.count:
            self.last_s = time.perf_counter()

    def check(self) -> None:
        super().check()
        if self.wrong:
            raise RuntimeError(f"{self.wrong} payloads came back wrong")


class ConstantMemory(Blocks):
    """Hooks that keep nothing: whatever the master's memory grows by is the dispatcher's."""

    def prepare(self, count: int) -> None:
        super().prepare(0)
        self.count = count
        self.sum = 0.0

    def process_results(self, indices: NDArray[Any], jobs: NDArray[Any], results: NDArray[Any]) -> None:
        self.sum += float(results.sum())
        self.done += len(results)

    def check(self) -> None:
        super().check()
        if self.sum != self.count * (self.count - 1) / 2 + 0.5 * self.count:
            raise RuntimeError("the sum of the results is wrong")


class IdleForm(Measured):
    """A few quick jobs, so that every slave has worked, and one that sleeps while the others have nothing to do."""

    sleep_s = 5.0
    slept = False

    def next_job(self) -> NDArray[Any] | None:
        if self.asked == self.count:
            return None
        self.asked += 1
        return np.array([self.sleep_s if self.asked == self.count else 0.0, 0.0])

    def process_job(self, job: NDArray[Any]) -> float:
        if job[0] > 0:
            self.slept = True
            time.sleep(job[0])
        return 0.0

    def process_result(self, index: int, job: NDArray[Any], result: float) -> None:
        self.done += 1


def timed(sweep: Measured, seconds: float, trial: int, at_most: int) -> Record | None:
    """Run `trial` jobs twice (the first time makes the connections), then as many as fill `seconds`."""
    is_master = MPI.COMM_WORLD.Get_rank() == 0
    count = trial
    for attempt in range(3):
        if is_master or isinstance(sweep, HandForm):
            sweep.prepare(count if is_master else 0)
        start = time.perf_counter()
        sweep.run(journal=sweep.journal)
        run_s = time.perf_counter() - start
        if is_master:
            sweep.check()
            loop_s = sweep.last_s - sweep.first_s
            if attempt == 1:
                count = min(max(int(trial / loop_s * seconds), trial), at_most)
    if not is_master:
        return None
    record = {"rate": count / loop_s, "run_rate": count / run_s, "jobs": count, "seconds": loop_s}
    return record | {"overhead_s": run_s - loop_s}


def run_map(grain: int, credit: int, seconds: float) -> Record | None:
    """map_array and block hooks by hand, as many jobs in turn and in the same processes: where these run is the same for both."""
    comm = MPI.COMM_WORLD
    is_master = comm.Get_rank() == 0
    sweeps = [form(vm=comm, grain=grain or 1, credit=credit) for form in (MapForm, HandForm)]
    probe = timed(sweeps[1], seconds, 20_000, 20_000_000)
    count = 0 if probe is None else int(probe["jobs"])
    times: list[list[float]] = [[], []]
    for turn in range(1 + TURNS):
        for which in (0, 1) if turn % 2 else (1, 0):
            sweeps[which].prepare(count)
            comm.Barrier()
            start = time.perf_counter()
            sweeps[which].run()
            times[which].append(time.perf_counter() - start)
            if is_master:
                sweeps[which].check()
    if not is_master:
        return None
    ratios = [theirs / ours for ours, theirs in zip(times[0][1:], times[1][1:], strict=True)]  # the first turn is to warm up
    ours, theirs = (count / statistics.median(some[1:]) for some in times)
    return {"run_rate": ours, "hand_rate": theirs, "ratio": statistics.median(ratios), "ratios": ratios, "jobs": count}


def resident_mb() -> tuple[float, float]:
    """This process's resident memory now, and at its highest, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines if line.startswith("Vm"))
    return int(facts["VmRSS"].split()[0]) / 1024, int(facts["VmHWM"].split()[0]) / 1024


def run_memory(grain: int, credit: int, few: int, many: int) -> Record | None:
    is_master = MPI.COMM_WORLD.Get_rank() == 0
    sweep = ConstantMemory(vm=MPI.COMM_WORLD, grain=grain, credit=credit)
    sizes = []
    for count in (few, many):
        if is_master:
            sweep.prepare(count)
        sweep.run()
        if is_master:
            sweep.check()
            sizes.append(resident_mb())
    if not is_master:
        return None
    growth, peak_growth = (after - before for before, after in zip(*sizes, strict=True))
    return {"growth_mb": growth, "peak_growth_mb": peak_growth, "few": few, "many": many}


def run_idle() -> Record | None:
    """CPU time over wall time of each rank during a run in which one slave sleeps and the others wait."""
    comm = MPI.COMM_WORLD
    sweep = IdleForm(vm=comm, grain=1, credit=1)
    sweep.prepare(10 * comm.Get_size())
    start, cpu_start = time.perf_counter(), time.process_time()
    sweep.run()
    share = (time.process_time() - cpu_start) / (time.perf_counter() - start)
    shares = comm.gather((sweep.slept, share), root=0)
    if shares is None:
        return None
    sweep.check()
    slaves = shares[1:]
    if sum(slept for slept, _ in slaves) != 1:
        raise RuntimeError("exactly one slave must have slept")
    return {"share": max(share for slept, share in slaves if not slept), "master_share": shares[0][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=["kernel", "block", "single", "paced", "payload", "memory", "idle", "map"])
    parser.add_argument("--library", help="shared library made of kernel.c")
    parser.add_argument("--grain", type=int, default=1, help="jobs per message; 0 with `map`: its own choice")
    parser.add_argument("--credit", type=int, default=4, help="messages in flight per slave")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of the timed run")
    parser.add_argument("--bytes", type=int, default=1_000_000, help="size of a payload")
    parser.add_argument("--many", type=int, default=10_000_000, help="jobs of the long run of `memory`")
    parser.add_argument("--vectorized", action="store_true", help="a function of a block instead of the kernel")
    parser.add_argument("--journal", help="a file for the results")
    arguments = parser.parse_args()

    Measured.journal = arguments.journal
    if arguments.library:
        kernel = KERNEL(("add_kernel", ctypes.CDLL(arguments.library)))
        KernelForm.kernel = ConstantMemory.kernel = kernel
    if arguments.form == "payload":
        PayloadForm.job_dtype = PayloadForm.result_dtype = np.dtype(("f8", arguments.bytes // 8))

    record: Record | None
    if arguments.form == "memory":
        record = run_memory(arguments.grain, arguments.credit, 100_000, arguments.many)
    elif arguments.form == "idle":
        record = run_idle()
    elif arguments.form == "map":
        HandForm.vectorized, MapForm.chosen_grain = arguments.vectorized, arguments.grain or None
        record = run_map(arguments.grain, arguments.credit, arguments.seconds)
    else:
        form, at_most = {
            "kernel": (KernelForm, 20_000_000),
            "block": (BlockForm, 20_000_000),
            "single": (SingleForm, 5_000_000),
            "paced": (PacedForm, 5_000_000),
            "payload": (PayloadForm, 100_000),
        }[arguments.form]
        sweep = form(vm=MPI.COMM_WORLD, grain=arguments.grain or 1, credit=arguments.credit)
        slaves = MPI.COMM_WORLD.Get_size() - 1
        trial = 20 if arguments.form == "payload" else 5000 + 20 * slaves * arguments.credit * arguments.grain
        record = timed(sweep, arguments.seconds, trial, at_most)
        if record is not None and arguments.form == "payload":
            record["bytes_per_second"] = 2 * form.job_dtype.itemsize * record["rate"]
    if record is not None:
        shape = {"form": arguments.form, "grain": arguments.grain, "credit": arguments.credit}
        print(json.dumps(shape | record), flush=True)


if __name__ == "__main__":
    main()

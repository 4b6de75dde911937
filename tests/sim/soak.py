"""Random schedules without end: `make soak`, or `python tests/sim/soak.py --seed N --count 1` to replay one that failed.

Schedule number n is `Scenario.random(n)`; `--seed` names the first one. It runs on all cores, with the scheduler as it is
installed. One that fails is printed at once, with the command that replays it. The exit code is 0 only if all ran and none failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from simulator import Scenario, run

import jd_hpc.scheduler

CHUNK = 500  # schedules that a process runs at a time
CHUNK_LIMIT_S = 300  # they take about a second
PROGRESS_S = 10


def soak_chunk(seeds: range) -> tuple[int, Counter[str]]:
    """Run some schedules: how many failed, and what happened in all of them."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a schedule that never ends ends its process, even one inside compiled code
    signal.alarm(CHUNK_LIMIT_S)
    failed, total = 0, Counter[str]()
    for seed in seeds:
        try:
            out = run(jd_hpc.scheduler, Scenario.random(seed))
        except Exception:
            failed += 1
            print(f"{traceback.format_exc()}FAILED. Replay: python tests/sim/soak.py --seed {seed} --count 1", flush=True)
        else:
            total.update({"events": out.events, "jobs": out.delivered + out.failed, "given up": out.failed})
            total.update(out.counters)
            total.update(out.faults)
    signal.alarm(0)
    return failed, total


def soak(first: int, count: int, processes: int) -> int:
    """Run `count` schedules: how many failed, or did not run."""
    chunks = [range(at, min(at + CHUNK, first + count)) for at in range(first, first + count, CHUNK)]
    todo, done, failed, total = iter(chunks), 0, 0, Counter[str]()
    begun = said = time.monotonic()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        running: dict[Future[tuple[int, Counter[str]]], range] = {}
        while True:
            running |= {pool.submit(soak_chunk, seeds): seeds for seeds in islice(todo, 2 * processes - len(running))}
            if not running:
                break
            for future in wait(running, PROGRESS_S, FIRST_COMPLETED).done:
                seeds = running.pop(future)
                bad, seen = future.result()
                done, failed = done + len(seeds), failed + bad
                total.update(seen)
            if time.monotonic() - said >= PROGRESS_S:
                said = time.monotonic()
                print(f"{done:,} of {count:,} schedules, {done / (said - begun):,.0f} per second, {failed} failed", flush=True)
    took = time.monotonic() - begun
    facts = ", ".join(f"{name} {number:,}" for name, number in total.items())
    rate = f"{took:.0f} s ({done / took:,.0f} per second)"
    print(f"{done:,} schedules from seed {first} in {rate}: {failed} failed; {facts}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=time.time_ns() // 1000, help="the first schedule's; if not given, by the clock")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if options.count < 1 or options.processes < 1 or options.seed < 0:
        parser.error("--count and --processes are at least 1, --seed at least 0")
    if str(jd_hpc.scheduler.__file__).endswith(".py"):
        parser.error("jd_hpc.scheduler is not compiled")
    print(f"{options.count:,} schedules from seed {options.seed} on {options.processes} cores", flush=True)
    if options.count == 1:
        print(Scenario.random(options.seed), flush=True)
    try:
        return min(1, soak(options.seed, options.count, options.processes))
    except BrokenProcessPool:
        print(f"FAILED: a process crashed, or needed more than {CHUNK_LIMIT_S} s for {CHUNK} schedules", flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())

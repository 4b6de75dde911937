"""Chaos with real ranks: `make chaos`, or `python tests/launch/chaos_runs.py --case CASE` to repeat a run that went wrong.

Every run is one mpiexec with a fault in it, of a kind, at a moment (see chaos_cases.py). The seed decides which they are, and their
order. One that goes wrong is printed at once, with the command that repeats it; at the end there is a table of all that was seen.
The exit code is 0 only if nothing was wrong.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

from chaos_cases import KINDS, MOMENTS, OTHERS, Case, Seen, draw, run
from launch_helpers import UNDER_MPIEXEC, mpiexec

PROGRESS_S = 30
WRONG = ("lost", "doubled", "wrong values", "history", "hangs", "leftovers", "wrong ends")
TOLD_OF_A_FAILURE = 3000  # characters of what the ranks wrote


def complain(seen: Seen) -> None:
    """Print what went wrong, and how to have it again."""
    for what, complaints in seen.wrong.items():
        print(f"{what.upper()} in {seen.case}: {'; '.join(complaints)}")
    print(seen.ended.err[-TOLD_OF_A_FAILURE:])
    print(f"FAILED. Repeat: {sys.executable} tests/launch/chaos_runs.py --runs 10 --case {seen.case}\n", flush=True)


def table(all_seen: list[Seen], field: str, order: list[str]) -> str:
    """Return what was seen, a line for each kind, or each moment."""
    rows = [[field, "where", "runs", "median ms", "worst ms", "noticed by", *WRONG]]
    for word in order:
        for where in ("plain", "isolate"):
            some = [seen for seen in all_seen if getattr(seen.case, field) == word and seen.case.where == where]
            if some:
                rows.append([word, where, *summary(some)])
    rows.append(["all", "", *summary(all_seen)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ["<", "<", ">", ">", ">", "<", *(">" for _ in WRONG)]
    return "\n".join("  ".join(map("{:{}{}}".format, row, aligned, widths)) for row in rows)


def summary(some: list[Seen]) -> list[str]:
    notices = [notice for seen in some if seen.facts for notice in seen.facts["notices"]]
    times_ms = [1000 * latency_s for _, latency_s in notices]
    by = Counter(by for by, _ in notices)
    told = [f"{statistics.median(times_ms):.0f}", f"{max(times_ms):.0f}"] if times_ms else ["-", "-"]
    wrong = [str(sum(what in seen.wrong for seen in some)) for what in WRONG]
    return [str(len(some)), *told, ", ".join(f"{word} {count}" for word, count in by.most_common()) or "-", *wrong]


def run_all(cases: list[Case], at_a_time: int) -> list[Seen]:
    """Run them; tell how it goes."""
    begun = said = time.monotonic()
    all_seen: list[Seen] = []
    todo = iter(cases)
    running: set[Future[Seen]] = set()
    with ThreadPoolExecutor(at_a_time) as pool:
        while True:
            running |= {pool.submit(run, case) for case in islice(todo, at_a_time - len(running))}
            if not running:
                return all_seen
            done, running = wait(running, PROGRESS_S, FIRST_COMPLETED)
            for future in done:
                all_seen.append(future.result())
                if all_seen[-1].wrong:
                    complain(all_seen[-1])
            if time.monotonic() - said >= PROGRESS_S:
                said = time.monotonic()
                wrong = sum(bool(seen.wrong) for seen in all_seen)
                print(f"{len(all_seen)} of {len(cases)} runs in {said - begun:.0f} s, {wrong} went wrong", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-a-time", type=int, default=3)
    parser.add_argument("--only", default="", metavar="WORDS", help="such as kill,stop,big_job,plain,launch")
    parser.add_argument("--case", type=Case.parse, help="one case only, such as kill:big_job:plain:2:launch")
    options = parser.parse_args()
    if UNDER_MPIEXEC or options.runs < 1 or options.at_a_time < 1:
        parser.error("it starts its own mpiexec; --runs and --at-a-time are at least 1")
    words = options.only.split(",") if options.only else []
    if unknown := [word for word in words if not any(word in case for case in set(islice(draw(0, []), 1000)))]:
        parser.error(f"no case has {unknown} in it")
    cases = [options.case] * options.runs if options.case else list(islice(draw(options.seed, words), options.runs))
    begun = time.monotonic()
    print(f"{len(cases)} runs with {mpiexec()}, seed {options.seed}, {options.at_a_time} at a time", flush=True)
    all_seen = run_all(cases, options.at_a_time)
    print(table(all_seen, "kind", list(KINDS)), end="\n\n")
    print(table(all_seen, "moment", [*MOMENTS, *dict.fromkeys(case.moment for case in OTHERS)]), end="\n\n")
    wrong = [seen for seen in all_seen if seen.wrong]
    names = sorted({str(seen.case) for seen in wrong})
    print(f"{len(all_seen)} runs in {time.monotonic() - begun:.0f} s, {len(wrong)} went wrong", *names)
    return min(1, len(wrong))


if __name__ == "__main__":
    sys.exit(main())

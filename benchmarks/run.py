"""Measures jd_hpc against the C loop and the other ways to do it, with the MPI of this environment.

    python benchmarks/run.py [--quick] [--only kernel,single] [--family-name NAME] [--output FOLDER]

Ours and theirs alternate, five rounds or more, and what counts is the median of the rounds' ratios: a machine that is
slow for a while then slows both. Prints a table and writes it, with the facts of the machine, to results/<family>.json.
README.md says what each row means.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launch import HERE, BenchmarkError, Command, Launcher, Record, machine_facts

Numbers = list[float | None]
Records = list[Record | None]


@dataclass
class Row:
    """One line of the table.

    Attributes
    ----------
    ours, theirs : float or None
        Medians over the rounds; None where nothing was measured, or there is nothing to compare with.
    value : float or None
        What the target is about: the median of the rounds' ratios, or a plain quantity.
    target : float or None
        None: for information.
    at_most : bool
        Whether the target is an upper bound.
    rounds : list
        The value of each round; None where a run failed.
    """

    part: str
    name: str
    ranks: int
    unit: str
    ours: float | None = None
    theirs: float | None = None
    value: float | None = None
    target: float | None = None
    at_most: bool = False
    rounds: Numbers = field(default_factory=list)

    def reached(self) -> bool | None:
        """Whether the target is reached, None if there is none."""
        if self.target is None:
            return None
        if self.value is None:
            return False
        return self.value <= self.target if self.at_most else self.value >= self.target

    def record(self) -> Record:
        """The row for the results file."""
        return asdict(self) | {"reached": self.reached()}

    def line(self) -> str:
        """The row as text."""
        verdict = {None: "", True: "reached", False: "MISSED"}[self.reached()]
        target = "" if self.target is None else f"{'<=' if self.at_most else '>='} {self.target:g}"
        numbers = f"{short(self.ours):>9} {short(self.theirs):>9} {short(self.value):>8} {target:>8}"
        return f"{self.part:14} {self.ranks:3} {self.name:66} {numbers}  {verdict}"


HEADING = f"{'part':14} {'-n':>3} {'what':66} {'ours':>9} {'theirs':>9} {'value':>8} {'target':>8}"


def short(number: float | None) -> str:
    """A number in four or so characters: 1.23M."""
    if number is None:
        return "-"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def column(records: Records, key: str) -> Numbers:
    return [None if record is None else float(record[key]) for record in records]


def median(numbers: Sequence[float | None]) -> float | None:
    good = [number for number in numbers if number is not None]
    return statistics.median(good) if good else None


class Suite:
    """All measurements: one method per part, each adds its rows."""

    def __init__(self, launcher: Launcher, repeats: int, seconds: float, quick: bool) -> None:
        self.launcher = launcher
        self.repeats = repeats
        self.seconds = seconds
        self.quick = quick
        self.rows: list[Row] = []

    # ------------------------------------------------------------ the commands

    def ours(self, ranks: int, form: str, grain: int = 1, credit: int = 4, *more: object) -> Command:
        library = self.launcher.library
        options = ["--grain", grain, "--credit", credit, "--seconds", self.seconds, "--library", library]
        return self.launcher.python(ranks, "ours.py", form, *options, *more)

    def c_loop(self, ranks: int, grain: int, flight: int) -> Command:
        return self.launcher.c(ranks, "farm", "--grain", grain, "--flight", flight, "--seconds", self.seconds)

    def peer(self, ranks: int, name: str, *more: object) -> Command:
        return self.launcher.python(ranks, "peers.py", name, "--seconds", self.seconds, *more, timeout_s=120)

    # ------------------------------------------------------------ how things are measured

    def rounds(self, commands: dict[str, Command]) -> dict[str, Records]:
        """Run all commands in turn, again and again, every other time in reverse order."""
        records: dict[str, Records] = {label: [] for label in commands}
        for repeat in range(self.repeats):
            for label in list(commands)[:: -1 if repeat % 2 else 1]:
                records[label].append(self.launcher.run(commands[label]))
        return records

    def best(self, candidates: dict[int, Command], key: str) -> int:
        """The candidate that is fastest in two trials of its own."""
        rates = dict.fromkeys(candidates, 0.0)
        for _ in range(1 if self.quick else 2):
            for value, command in candidates.items():
                record = self.launcher.run(command)
                rates[value] = max(rates[value], float(record[key]) if record else 0.0)
        return max(rates, key=lambda value: rates[value])

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(row.line(), flush=True)

    def add_ratio(self, part: str, name: str, ranks: int, unit: str, ours: Numbers, theirs: Numbers, target: float | None) -> None:
        ratios = [mine / other if mine and other else None for mine, other in zip(ours, theirs, strict=True)]
        self.add(Row(part, name, ranks, unit, median(ours), median(theirs), median(ratios), target, rounds=ratios))

    # ------------------------------------------------------------ the parts

    def kernel(self) -> None:
        """The compiled loop against the C loop, equal in flight."""
        shapes = [(1, 1), (4, 1), (4, 100)] if self.quick else [(1, 1), (2, 1), (4, 1), (16, 1), (4, 100)]
        for ranks in (2, 4) if self.quick else (2, 4, 8):
            for flight, grain in shapes if ranks < 8 else [(4, 1)]:
                commands = {"ours": self.ours(ranks, "kernel", grain, flight), "c": self.c_loop(ranks, grain, flight)}
                got = self.rounds(commands)
                name = f"kernel / C loop, {flight} in flight, grain {grain}"
                ours, theirs = column(got["ours"], "rate"), column(got["c"], "rate")
                self.add_ratio("kernel", name, ranks, "jobs/s", ours, theirs, 0.9 if ranks < 8 else None)

    def block(self) -> None:
        """A Python function for a block of jobs against mpi4py.futures at its best chunksize."""
        for ranks in (2, 4):
            search = self.launcher.run(self.peer(ranks, "futures", "--chunksize", "1000,3000,10000,30000"))
            chunksize = int(search["chunksize"]) if search else 10000
            candidates = {grain: self.ours(ranks, "block", grain) for grain in (100, 1000, 3000, 10000)}
            grain = self.best(candidates, "run_rate")
            theirs = self.peer(ranks, "futures", "--chunksize", chunksize)
            got = self.rounds({"ours": candidates[grain], "futures": theirs})
            name = f"block hooks, grain {grain} / futures, chunksize {chunksize}"
            ours, rates = column(got["ours"], "run_rate"), column(got["futures"], "rate")
            self.add_ratio("block", name, ranks, "jobs/s", ours, rates, 20.0)

    def single(self) -> None:
        """One Python call per job against mpi4py by hand, futures and schwimmbad."""
        for ranks in (2, 4):
            credits = {1: 4, 100: 4}
            for grain in credits:
                candidates = {credit: self.ours(ranks, "single", grain, credit) for credit in (2, 4, 8, 16)}
                credits[grain] = self.best(candidates, "run_rate")
            commands = {f"ours {grain}": self.ours(ranks, "single", grain, credit) for grain, credit in credits.items()}
            commands |= {peer: self.peer(ranks, peer) for peer in ("mpi4py", "schwimmbad")}
            commands |= {f"futures {size}": self.peer(ranks, "futures", "--chunksize", size) for size in (1, 100)}
            got = self.rounds(commands)
            for grain, peer, what, target in (
                (1, "mpi4py", "mpi4py Send/Recv by hand", 3.0),
                (1, "futures 1", "futures, chunksize 1", 100.0),
                (1, "schwimmbad", "schwimmbad", None),
                (100, "mpi4py", "mpi4py Send/Recv by hand", None),
                (100, "futures 100", "futures, chunksize 100", None),
            ):
                name = f"single hooks, grain {grain}, credit {credits[grain]} / {what}"
                ours, theirs = column(got[f"ours {grain}"], "run_rate"), column(got[peer], "rate")
                self.add_ratio("single", name, ranks, "jobs/s", ours, theirs, target)

    def map_array(self) -> None:
        """One call against the block hooks that do the same."""
        for ranks in (2, 4):
            for what, grain, more in (("kernel", 100, []), ("function of a block", 1000, ["--vectorized"])):
                got = self.rounds({"both": self.ours(ranks, "map", grain, 4, *more)})["both"]
                name = f"map_array / block hooks by hand, {what}, grain {grain}"
                ours, theirs = column(got, "run_rate"), column(got, "hand_rate")
                self.add_ratio("map_array", name, ranks, "jobs/s", ours, theirs, 0.95)

    def faces(self) -> None:
        """Executor against mpi4py.futures, Pool against schwimmbad: calls that do nothing."""
        for ranks in (2, 4):
            faces = ("map", "submit", "pool", "pool1")
            commands = {face: self.launcher.python(ranks, "faces.py", face, "--seconds", self.seconds) for face in faces}
            commands |= {"schwimmbad": self.peer(ranks, "schwimmbad"), "futures": self.peer(ranks, "futures", "--chunksize", 1)}
            rates = {label: column(records, "rate") for label, records in self.rounds(commands).items()}
            for face, peer, what, target in (
                ("map", "futures", "Executor.map / futures, both chunksize 1", 20.0),
                ("submit", "futures", "Executor.submit / futures, chunksize 1", 20.0),
                ("pool", "schwimmbad", "Pool.map / schwimmbad", 5.0),
                ("pool", "futures", "Pool.map / futures, chunksize 1", 20.0),
                ("pool1", "schwimmbad", "Pool.map, chunksize 1 / schwimmbad", None),
            ):
                self.add_ratio("faces", what, ranks, "calls/s", rates[face], rates[peer], target)

    def payload(self) -> None:
        """Large jobs and results against MPI's own bandwidth."""
        for size in (1_000_000, 4_000_000, 16_000_000):
            reps = int(self.seconds * 4e9 / size) + 2
            candidates = {credit: self.ours(2, "payload", 1, credit, "--bytes", size) for credit in (1, 2, 4)}
            credit = self.best(candidates, "rate")
            got = self.rounds({"ours": candidates[credit], "c": self.launcher.c(2, "pingpong", size, reps)})
            name = f"echo of {size // 1_000_000} MB, credit {credit} / ping-pong"
            ours, theirs = (column(got[label], "bytes_per_second") for label in ("ours", "c"))
            self.add_ratio("payload", name, 2, "bytes/s", ours, theirs, 0.9)

    def journal(self) -> None:
        """What a journal costs: the same run with one and without."""
        for form, what, target in (
            ("paced", "block hooks, 100 k jobs/s", 0.95),
            ("single", "single hooks, full speed", None),
            ("block", "block hooks, full speed", None),
        ):
            command = self.ours(2, form, 100)
            path = self.launcher.build / "bench.journal"
            with_journal = self.ours(2, form, 100, 4, "--journal", path)
            got = self.rounds({"ours": with_journal, "without": command})
            ours, theirs = column(got["ours"], "rate"), column(got["without"], "rate")
            self.add_ratio("journal", f"with a journal / without, {what}, grain 100", 2, "jobs/s", ours, theirs, target)

    def memory(self) -> None:
        """What the master's memory grows by from 10^5 to 10^7 jobs."""
        many = 1_000_000 if self.quick else 10_000_000
        for ranks, grain in ((2, 1), (4, 10)):
            options = ["--library", self.launcher.library, "--grain", grain, "--many", many]
            record = self.launcher.run(self.launcher.python(ranks, "ours.py", "memory", *options, timeout_s=120))
            value = None if record is None else float(record["growth_mb"])
            name = f"growth of the master from 1e5 to {many:.0e} jobs, grain {grain}"
            self.add(Row("memory", name, ranks, "MB", value, None, value, 10.0, True, [value]))

    def idle(self) -> None:
        """What an idle slave, and the master meanwhile, take of a core."""
        command = self.launcher.python(4, "ours.py", "idle")
        records = [self.launcher.run(command) for _ in range(1 if self.quick else 3)]
        for key, name, target in (
            ("share", "CPU share of the busiest idle slave", 0.05),
            ("master_share", "CPU share of the waiting master", None),
        ):
            shares = column(records, key)
            value = median(shares)
            self.add(Row("idle", name, 4, "of a core", value, None, value, target, True, shares))

    def oversubscribed(self) -> None:
        """What is left of the rate when there are more ranks than cores."""
        for form in ("kernel", "single"):
            got = self.rounds({str(ranks): self.ours(ranks, form) for ranks in (8, 3)})
            name = f"{form}, -n 8 / -n 3, grain 1, credit 4"
            rates = {label: column(records, "rate") for label, records in got.items()}
            self.add_ratio("oversubscribed", name, 8, "jobs/s", rates["8"], rates["3"], 0.5)


PARTS = ("kernel", "block", "single", "map_array", "faces", "payload", "journal", "memory", "idle", "oversubscribed")


def main() -> int:
    """Run what is asked for; 0 if every target was reached, 1 if not, 2 if nothing can be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer, shorter runs: does it work?")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas: " + ",".join(PARTS))
    parser.add_argument("--family-name", default="auto", help="name of the results file (auto: the MPI's)")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--repeats", type=int, help="rounds of each comparison")
    parser.add_argument("--seconds", type=float, help="length of each timed run")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")

    # What ends this process must end the run that it waits for, and remove the folder, too: both follow from an exception.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="jd_hpc_bench_") as build:
        try:
            launcher = Launcher(Path(build))
            launcher.compile()
        except BenchmarkError as error:
            print(error, file=sys.stderr)
            return 2
        repeats = arguments.repeats or (2 if arguments.quick else 5)
        seconds = arguments.seconds or (0.15 if arguments.quick else 0.4)
        suite = Suite(launcher, repeats, seconds, arguments.quick)
        facts = machine_facts(launcher)
        family = launcher.family if arguments.family_name == "auto" else arguments.family_name
        print("{mpi}, {cores} cores of {cpu}, load {load_before}".format(**facts))
        print(HEADING, flush=True)
        target = arguments.output / f"{family}.json"
        for part in parts:
            getattr(suite, part)()
            facts |= {"load_after": round(os.getloadavg()[0], 2), "minutes": round((time.perf_counter() - start) / 60, 1)}
            record = {"family": family, "quick": arguments.quick, "repeats": repeats, "seconds": seconds, "machine": facts}
            record |= {"rows": [row.record() for row in suite.rows], "failed_runs": len(launcher.failures)}
            write(target, record)  # after every part: a suite that is cut short leaves what it has

    judged = [row for row in suite.rows if row.target is not None]
    missed = [row for row in judged if not row.reached()]
    reached = f"{len(judged) - len(missed)} of {len(judged)} targets reached"
    print(f"{reached}, {len(launcher.failures)} failed runs, {facts['minutes']} min")
    return 1 if missed else 0


def write(target: Path, record: Record) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

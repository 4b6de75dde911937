"""The verdict on a run, and how it is told in plain words. What it says is found out in check.py; nothing is printed here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

VIOLATIONS_KEPT = 1000
"""More are only counted."""
TOLD_MOST = 20
"""Violations, open jobs and slaves that a report names."""


@dataclass(slots=True)
class Violation:
    """A promise that was broken: the line that shows it, and the facts."""

    line: int
    facts: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.facts}"


@dataclass
class Run:
    """The verdict on one run.

    Attributes
    ----------
    line : int
        Where it begins.
    begin : dict
        What its first line tells.
    how : str or None
        How it ended: "ok", or the exception; None: its end was not written.
    seconds : float
        When its last event was.
    counts : Counter of str
        Events by kind; of "delivered", "stored" and "failed" the jobs.
    slaves : list of (float, int, str, str)
        When, which slave, what became of it ("lost", "suspect", "back"), and how that is known.
    violations : list of Violation
        The first VIOLATIONS_KEPT.
    violation_count : int
        All of them.
    left : list of str
        What had not ended when a run was interrupted, or ended by an exception. (After one that ended well it is a violation.)
    left_jobs : int
        How many jobs that are.
    sent_jobs : int
        Jobs that went out, or were run by the master.
    cut_line : int
        Number of a line that was cut short, at the end; 0: none.
    """

    line: int
    begin: dict[str, Any]
    how: str | None = None
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    slaves: list[tuple[float, int, str, str]] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    violation_count: int = 0
    left: list[str] = field(default_factory=list)
    left_jobs: int = 0
    sent_jobs: int = 0
    cut_line: int = 0

    def report(self) -> list[str]:
        """Tell it in lines of plain words."""
        begin, counts = self.begin, self.counts
        place = f"{begin['slaves']} slaves, {begin['mpi']}" if "mpi" in begin else "without MPI"
        lines = [
            f"line {self.line}: run of {begin.get('program', '?')} on {begin.get('host', '?')}, {begin.get('wall', '?')}, {place}: "
            f"{self.ended()} after {self.seconds:.3f} s",
            f"  {self.sent_jobs} jobs, {counts['delivered']} delivered, {counts['failed']} failed; "
            f"{counts['sent']} messages; {counts['accepted']} answers accepted, {counts['late']} late, {counts['refused']} refused",
        ]
        if counts["stored"]:
            lines.append(f"  {counts['stored']} jobs more were delivered from a journal")
        told = {"lost": "was lost", "suspect": "was suspected", "back": "was taken on again"}
        lines += _some(f"  slave {slave} {told[what]} at {time:.3f} s: {how}" for time, slave, what, how in self.slaves)
        if self.cut_line:
            lines.append(f"  line {self.cut_line} was cut short, and does not count")
        if self.left_jobs:
            lines.append(f"  {self.left_jobs} jobs had not ended, which is no violation in a run that {self.ended()}:")
            lines += _some(f"    {facts}" for facts in self.left)
        if not self.violation_count:
            return [*lines, "  All promises hold." if self.how == "ok" else "  All promises hold as far as it went."]
        lines.append(f"  {self.violation_count} VIOLATIONS:")
        return lines + _some((f"    {violation}" for violation in self.violations), self.violation_count)

    def ended(self) -> str:
        """Tell how the run ended."""
        if self.how == "ok":
            return "ended well"
        return "was interrupted (its end is not in the history)" if self.how is None else f"ended by {self.how}"


VERIFIED = (
    "Verified: no job ended twice, and all ended where a run ended well; only first valid answers were accepted, and none was "
    "dropped; attempts grew; slaves got no more than their credit, and nothing while they were lost or suspected; nothing was "
    "given up before its time; the counters agree."
)


def _some(lines: Iterable[str], count: int | None = None) -> list[str]:
    """Return the first lines, and how many more there are."""
    told = list(lines)
    count = len(told) if count is None else count
    more = [f"    ... and {count - TOLD_MOST} more"] if count > TOLD_MOST else []
    return told[:TOLD_MOST] + more

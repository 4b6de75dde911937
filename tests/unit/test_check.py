"""The checker of histories: a good one passes, and whatever is planted in it is found."""

from __future__ import annotations

import json
import re

import pytest

from jd_hpc import check, cli
from jd_hpc.errors import HistoryError

OPTIONS = {"grain": 2, "credit": 2, "max_attempts": 3, "min_slaves": 0, "isolate": True}
COUNTERS = {"jobs": 11, "messages sent": 13, "late results dropped": 1, "slaves lost": 2, "slaves suspected": 1}


def begin(**facts):
    return {"t": 0.0, "e": "begin", "format": 1, "slaves": 3, "options": OPTIONS} | facts


def event(kind, **facts):
    return {"t": 0.5, "e": kind} | facts


def batch(kind, slave, slot, first, count, attempt=0):
    return event(kind, slave=slave, slot=slot, first=first, count=count, attempt=attempt)


def sent(*facts):
    return batch("sent", *facts)


def accepted(*facts):
    return batch("accepted", *facts)


def delivered(*jobs):
    return event("delivered", jobs=[list(span) for span in jobs])


def failed(index, died=None, attempts=()):
    return event("failed", index=index, slave=1, error="ValueError", died=died, attempts=list(attempts))


def slave(kind, number):
    return event(kind, slave=number, how="as planted")


AGAIN = event("again", index=9, slave=1, strikes=1, how="killed by SIGKILL")
GOOD = [
    begin(),
    slave("up", 1),
    slave("up", 2),
    sent(1, 0, 0, 2),
    sent(2, 1, 2, 2),
    sent(1, 2, 4, 2),
    accepted(1, 0, 0, 2),
    delivered((0, 2)),
    slave("suspect", 1),
    sent(2, 2, 4, 2, 1),  # what slave 1 held goes to another one
    slave("back", 1),
    accepted(1, 2, 4, 2),  # but slave 1 is the first to answer
    delivered((4, 2)),
    accepted(2, 1, 2, 2),
    failed(2),
    delivered((3, 1)),
    batch("late", 2, 2, 4, 2, 1),
    slave("up", 3),
    # a batch that costs two slaves is taken apart
    sent(3, 0, 6, 2),
    slave("lost", 3),
    sent(2, 0, 6, 2, 1),
    sent(2, 1, 8, 1),
    slave("lost", 2),
    event("apart", first=6, count=2, strikes=2),
    sent(1, 1, 8, 1, 1),
    accepted(1, 1, 8, 1, 1),
    delivered((8, 1)),
    sent(1, 0, 6, 1),
    sent(1, 2, 7, 1),
    accepted(1, 0, 6, 1),
    delivered((6, 1)),
    accepted(1, 2, 7, 1),
    failed(7, "killed by SIGSEGV", [[3, "a"], [2, "b"], [1, "c"]]),
    # a process of isolate dies, and its job goes out again
    sent(1, 0, 9, 1),
    accepted(1, 0, 9, 1),
    AGAIN,
    sent(1, 0, 9, 1),
    sent(1, 1, 10, 1),
    event("drained", anything=[1]),
    accepted(1, 0, 9, 1),
    delivered((9, 1)),
    batch("refused", 1, 1, 10, 1, 1),
    accepted(1, 1, 10, 1),
    delivered((10, 1)),
    event("end", how="ok", counters=COUNTERS),
]
"""A run with about everything in it."""


def lines_of(events):
    return [json.dumps(one).encode() + b"\n" for one in events]


def verdict(events):
    (run,) = check.check(lines_of(events))
    return run


def without(*left_out):
    """The good history without these events; each is there once."""
    assert all(GOOD.count(one) == 1 for one in left_out)
    return [one for one in GOOD if one not in left_out]


def after(where, *added, among=GOOD):
    """The good history with events added behind one that is there once."""
    assert among.count(where) == 1
    at = among.index(where) + 1
    return [*among[:at], *added, *among[at:]]


def instead(old, *new):
    assert GOOD.count(old) == 1
    at = GOOD.index(old)
    return [*GOOD[:at], *new, *GOOD[at + 1 :]]


def with_counters(**changed):
    return [*GOOD[:-1], event("end", how="ok", counters=COUNTERS | {name.replace("_", " "): n for name, n in changed.items()})]


PLANTED = {
    "doubled delivery": (after(delivered((0, 2)), delivered((1, 1))), "job 1 delivered, but had ended before"),
    "doubled delivery, much later": (after(delivered((9, 1)), delivered((3, 2))), "jobs 3 to 4 delivered, but had ended before"),
    "delivered and failed": (after(delivered((0, 2)), failed(0)), "job 0 failed, but had ended before"),
    "failed twice": (after(failed(2), failed(2)), "job 2 failed, but had ended before"),
    "failed and delivered": (after(failed(2), delivered((2, 1))), "job 2 delivered, but had ended before"),
    "delivered after a giving up": (
        [*GOOD[:6], slave("lost", 2), slave("lost", 1), slave("lost", 3), event("given_up", first=2, count=2, strikes=1),
         delivered((2, 2))],
        "jobs 2 to 3 delivered, but given up",
    ),
    "a job that never was": (after(delivered((0, 2)), delivered((99, 1))), "job 99 delivered, but never sent"),
    "lost job": (without(delivered((9, 1))), "the run ended well without job 9: answered, but not delivered"),
    "lost half of a batch": (without(delivered((3, 1))), "the run ended well without job 3: answered"),
    "never sent": (with_counters(jobs=13), "the run ended well without jobs 11 to 12: never sent"),
    "passed over": (
        without(sent(2, 1, 8, 1), sent(1, 1, 8, 1, 1), accepted(1, 1, 8, 1, 1), delivered((8, 1))),
        "the run ended well without job 8: never sent",
    ),
    "more sent than there are": (with_counters(jobs=10), "the master counted 10 jobs, but jobs up to 10 were sent"),
    "never answered": (
        without(accepted(1, 1, 10, 1), delivered((10, 1))),
        "the run ended well without job 10: sent to slave 1, and not answered",
    ),
    "a lost slave's jobs are forgotten": (
        without(sent(1, 1, 8, 1, 1), accepted(1, 1, 8, 1, 1), delivered((8, 1))),
        "the run ended well without job 8: not sent again",
    ),
    "result without dispatch": (after(delivered((0, 2)), accepted(1, 0, 50, 1)), "job 50 by slave 1 accepted, but such a"),
    "result of one who was not asked": (instead(accepted(2, 1, 2, 2), accepted(1, 1, 2, 2)), "by slave 1 accepted, but that was"),
    "result of an attempt not made": (instead(accepted(2, 1, 2, 2), accepted(2, 1, 2, 2, 1)), "attempt 1 of jobs 2 to 3 .* never"),
    "result of another slot": (instead(accepted(2, 1, 2, 2), accepted(2, 0, 2, 2)), "accepted, but that was never sent"),
    "delivered without a result": (without(accepted(2, 1, 2, 2)), "job 2 failed, but sent to slave 2, and not answered"),
    "second answer accepted": (
        after(accepted(1, 2, 4, 2), accepted(2, 2, 4, 2, 1)),
        "attempt 1 of jobs 4 to 5 by slave 2 accepted, but it was answered before",
    ),
    "fenced attempt accepted": (
        instead(batch("late", 2, 2, 4, 2, 1), accepted(2, 2, 4, 2, 1)),
        "attempt 1 of jobs 4 to 5 by slave 2 accepted, but these jobs have ended",
    ),
    "answer to what was taken apart": (
        after(event("apart", first=6, count=2, strikes=2), accepted(3, 0, 6, 2)),
        "jobs 6 to 7 by slave 3 accepted, but these jobs have ended, or go out otherwise",
    ),
    "first valid answer dropped": (
        instead(accepted(1, 1, 10, 1), batch("late", 1, 1, 10, 1), batch("late", 1, 1, 10, 1)),
        "job 10 by slave 1 is late, but it is the first valid answer",
    ),
    "attempt that shrinks": (instead(sent(2, 2, 4, 2, 1), sent(2, 2, 4, 2, 0)), "as attempt 0, but it is attempt 1"),
    "attempt that leaps": (instead(sent(2, 2, 4, 2, 1), sent(2, 2, 4, 2, 2)), "as attempt 2, but it is attempt 1"),
    "first attempt is not 0": (instead(sent(1, 2, 7, 1), sent(1, 2, 7, 1, 1)), "job 7 sent to slave 1 as attempt 1, but it is"),
    "sent twice": (after(sent(2, 1, 2, 2), sent(1, 3, 2, 2, 1)), "jobs 2 to 3 sent to slave 1, but sent to slave 2, and not"),
    "sent after its answer": (after(accepted(1, 0, 0, 2), sent(2, 0, 0, 2, 1)), "jobs 0 to 1 sent to slave 2, but it was answered"),
    "sent after its end": (after(delivered((0, 2)), sent(2, 0, 0, 2, 1)), "jobs 0 to 1 sent to slave 2, but they have ended"),
    "sent in two batches": (after(sent(2, 1, 2, 2), sent(1, 3, 3, 1)), "job 3 sent to slave 1, but they are part of another batch"),
    "sent to an absent slave": (after(slave("up", 2), sent(3, 0, 99, 1)), "job 99 sent to slave 3, which is absent"),
    "sent to a lost slave": (instead(sent(1, 1, 8, 1, 1), sent(2, 1, 8, 1, 1)), "job 8 sent to slave 2, which is lost"),
    "sent to a suspect": (instead(sent(2, 2, 4, 2, 1), sent(1, 2, 4, 2, 1)), "jobs 4 to 5 sent to slave 1, which is suspect"),
    "credit exceeded": (after(sent(1, 2, 4, 2), sent(1, 3, 11, 1)), "slave 1, which holds 3 batches now: over its credit of 2"),
    "grain exceeded": (after(sent(1, 2, 4, 2), sent(2, 3, 11, 3)), "jobs 11 to 13 sent in one message, but grain is 2"),
    "not taken apart": (
        instead(event("apart", first=6, count=2, strikes=2), sent(1, 0, 6, 2, 2)),
        "jobs 6 to 7 sent to slave 1 after 2 strikes, and not taken apart",
    ),
    "taken apart with other strikes": (
        instead(event("apart", first=6, count=2, strikes=2), event("apart", first=6, count=2, strikes=1)),
        "jobs 6 to 7 taken apart with 1 strikes, but it was struck 2 times",
    ),
    "taken apart while it runs": (
        after(sent(2, 1, 2, 2), event("apart", first=2, count=2, strikes=0)),
        "jobs 2 to 3 taken apart, but sent to slave 2",
    ),
    "given up too early": (
        instead(sent(1, 1, 8, 1, 1), event("given_up", first=8, count=1, strikes=0)),
        "job 8 given up with 0 strikes: max_attempts is 3",
    ),
    "given up, but not there": (after(delivered((0, 2)), event("given_up", first=0, count=2, strikes=3)), "no such batch is open"),
    "failed too early": (
        instead(failed(2), failed(2, "killed by SIGKILL", [[2, "a"]])),
        "job 2 failed after 1 attempts: max_attempts is 3",
    ),
    "too many attempts": (
        instead(failed(2), failed(2, None, [[2, "a"]] * 4)),
        "job 2 failed after 4 attempts: max_attempts is 3",
    ),
    "again with other strikes": (
        instead(AGAIN, AGAIN | {"strikes": 2}),
        "job 9 goes out again with 2 strikes, but it has 1",
    ),
    "again without an answer": (
        after(sent(2, 1, 2, 2), event("again", index=2, slave=2, strikes=1, how="")),
        "job 2 goes out again, but sent to slave 2, and not answered",
    ),
    "run by the master": (after(slave("up", 2), sent(0, 0, 99, 1)), "job 99 run by the master, but 3 slaves are there"),
    "up twice": (after(slave("up", 3), slave("up", 3)), "slave 3 is up, and was up before"),
    "lost twice": (after(slave("lost", 3), slave("lost", 3)), "slave 3 is lost, and was lost before"),
    "back without having been there": (instead(slave("up", 3), slave("back", 3)), "slave 3 is back, and was absent before"),
    "late ones not counted": (with_counters(late_results_dropped=0), "the master counted 0 late results dropped, but there are 1"),
    "messages not counted": (with_counters(messages_sent=20), "the master counted 20 messages sent, but there are 13"),
    "after the end": ([*GOOD, delivered((0, 1))], "'delivered' after the end of the run"),
}  # fmt: skip


def test_a_good_history():
    run = verdict(GOOD)
    assert run.violations == []
    assert (run.how, run.left, run.sent_jobs, run.seconds) == ("ok", [], 11, 0.5)
    assert (run.counts["delivered"], run.counts["failed"], run.counts["drained"]) == (9, 2, 1)
    assert [(number, what) for _, number, what, _ in run.slaves] == [(1, "suspect"), (1, "back"), (3, "lost"), (2, "lost")]
    assert run.report()[-1] == "  All promises hold."


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found(name):
    events, complaint = PLANTED[name]
    run = verdict(events)
    assert run.violation_count == len(run.violations) > 0
    found = [one for one in run.violations if re.search(complaint, one.facts)]
    assert found, run.violations
    changed = next((at for at, (one, good) in enumerate(zip(events, GOOD, strict=False), 1) if one != good), len(GOOD) + 1)
    assert all(one.line >= changed for one in run.violations)
    assert f"    {found[0]}" in run.report()


@pytest.mark.parametrize("length", range(1, len(GOOD)))
def test_an_interrupted_run_has_open_jobs_and_no_violation(length):
    run = verdict(GOOD[:length])
    assert (run.how, run.violations) == (None, [])
    assert run.left_jobs == run.sent_jobs - run.counts["delivered"] - run.counts["failed"]
    assert run.report()[-1] == "  All promises hold as far as it went."
    assert "was interrupted" in run.report()[0]


def test_a_run_that_ended_by_an_exception_may_leave_jobs():
    run = verdict([*GOOD[:6], event("end", how="KeyboardInterrupt: ", counters={})])
    assert (run.violations, run.left_jobs) == ([], 6)
    assert "  6 jobs had not ended, which is no violation in a run that ended by KeyboardInterrupt: :" in run.report()
    assert "    jobs 0 to 1: sent to slave 1, and not answered" in run.report()


def test_an_interrupted_run_shows_what_was_violated_before():
    assert verdict([*GOOD[:8], delivered((0, 1))]).violation_count == 1


def test_alone_the_master_gives_up_what_was_struck_and_runs_the_rest():
    options = OPTIONS | {"isolate": False}
    alone = [
        begin(slaves=1, options=options), slave("up", 1), sent(1, 0, 0, 1), sent(1, 1, 1, 1), slave("lost", 1),
        event("given_up", first=0, count=1, strikes=1), failed(0, None, [[1, "gone"]]),
        sent(0, 1, 1, 1, 1), accepted(0, 1, 1, 1, 1), delivered((1, 1)), event("end", how="ok", counters={"jobs": 2}),
    ]  # fmt: skip
    assert verdict(alone).violations == []
    assert verdict([*alone[:5], slave("back", 1), *alone[5:7]]).violations == []  # told of a little later
    wrong = verdict([*alone[:5], sent(0, 0, 0, 1, 1)])
    assert [one.facts for one in wrong.violations] == ["job 0 run by the master, which was struck before"]


def test_an_answer_to_what_is_about_to_be_given_up_may_be_dropped():
    """The scheduler gives up at once what the master tells of a little later."""
    options = OPTIONS | {"max_attempts": 1}
    events = [begin(options=options), slave("up", 1), sent(1, 0, 0, 1), slave("suspect", 1), batch("late", 1, 0, 0, 1)]
    assert verdict(events).violations == []


def test_violations_are_counted_beyond_those_that_are_kept():
    run = verdict([*GOOD[:8], *[delivered((0, 1))] * 5000])
    assert (run.violation_count, len(run.violations)) == (5000, 1000)
    assert run.report()[-1] == "    ... and 4980 more"


def test_memory_is_bounded_by_the_open_jobs():
    def events():
        yield begin(options=OPTIONS | {"grain": 1000})
        yield slave("up", 1)
        for number in range(3000):
            yield sent(1, 0, number * 1000, 1000)
            yield accepted(1, 0, number * 1000, 1000)
            yield delivered((number * 1000, 1000))

    checker = None
    for number, one in enumerate(events(), 1):
        if checker is None:
            checker = check.Checker(number, one)
        else:
            checker.take(number, one)
    assert (len(checker.open), checker.unsent, [len(owed) for owed in checker.owed]) == (0, [], [0, 0, 0, 0])
    assert checker.close().sent_jobs == 3_000_000


# ---- files -------------------------------------------------------------------------------------------------------


def test_a_cut_last_line_is_accepted_and_said():
    whole = b"".join(lines_of(GOOD))
    run, again = check.check((whole[:2000].decode() + "\n" + whole.decode()).encode().splitlines(keepends=True))
    assert run.cut_line == again.line - 1
    assert (run.how, run.violations, again.how, again.violations) == (None, [], "ok", [])
    assert f"  line {run.cut_line} was cut short, and does not count" in run.report()


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "there is no run in it"),
        (lines_of(GOOD[1:]), "line 1 comes before the beginning of a run"),
        ([b"import numpy\n", b"import os\n"], "line 1 is no event of a history, and not the last"),
        ([b"nothing"], "line 1 is no event of a history|there is no run"),
        ([b"[1, 2]\n", *lines_of(GOOD)], "line 1 is no event of a history"),
        ([*lines_of(GOOD[:5]), b'{"t":1', *lines_of(GOOD[5:])], "line 6 is no event of a history, and not the last one of a run"),
        (lines_of([begin(format=2)]), "line 1: a history of format 2; this version knows 1"),
        (lines_of([begin(), {"t": 1, "e": "sent", "slave": 1}]), "line 2 does not tell what it should: KeyError: 'slot'"),
        (lines_of([begin(), sent(4, 0, 0, 1)]), "line 2 does not tell what it should"),
        (lines_of([begin(), sent(-1, 0, 0, 1)]), "line 2 does not tell what it should"),
        (lines_of([begin(), sent(1, 0, 0, 0)]), "line 2 does not tell what it should: ValueError: 0 jobs"),
        (lines_of([begin(), slave("up", 0)]), "line 2 does not tell what it should"),
        (lines_of([begin(), delivered(("a", 1))]), "line 2 does not tell what it should"),
    ],
)
def test_what_is_no_history(lines, complaint):
    with pytest.raises(HistoryError, match=complaint):
        check.check(lines)


def test_the_command(tmp_path, capsys):
    good, bad, none = (tmp_path / name for name in ("good", "bad", "none"))
    good.write_bytes(b"".join(lines_of([*GOOD, *GOOD])))
    bad.write_bytes(b"".join(lines_of(PLANTED["doubled delivery"][0])))
    none.write_bytes(b"text\n")
    assert cli.main(["check", str(good)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{good}: 2 runs\nline 1: run of ")
    assert "11 jobs, 9 delivered, 2 failed; 13 messages; 9 answers accepted, 1 late, 1 refused" in said
    assert said.count("All promises hold.") == 2
    assert "Verified: no job ended twice" in said
    assert cli.main(["check", str(bad), str(good)]) == 1
    assert "VIOLATIONS:\n    line 9: job 1 delivered, but had ended before" in capsys.readouterr().out
    assert cli.main(["check", str(none), str(bad)]) == 2
    assert f"jd-hpc check: {none}: there is no run in it" in capsys.readouterr().err
    assert cli.main(["check", str(tmp_path)]) == 2
    assert "cannot be read: Is a directory" in capsys.readouterr().err

"""The command ``jd-hpc``: launch, doctor, check, journal and slurm.

The rules it keeps: words are taken apart here and nowhere else, and every error is one line that names the cure, with exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys

from jd_hpc import __version__, allocation, check, journal_tools, launch, slurm_tools, verdict
from jd_hpc.errors import HistoryError, LaunchError, WalltimeError

PROGRAM_ENDS = (".py", ".pyz")
WITH_VALUE = ("-n", "-np", "--mpiexec", "--walltime")
FLAGS = ("--dry-run", "-h", "--help")


def split_words(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Take the words after ``jd-hpc launch`` apart: our own options, mpiexec's, and the program.

    The program begins at the first word that ends in .py, at -m or -c, or after --. What comes before and is not ours is mpiexec's.
    """
    ours: list[str] = []
    given: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        if word == "--":
            return ours, given, words[at + 1 :]
        if word in ("-m", "-c") or word.endswith(PROGRAM_ENDS):
            return ours, given, words[at:]
        if word in WITH_VALUE:
            ours += words[at : at + 2]
            at += 1
        elif word in FLAGS or word.startswith(("--mpiexec=", "--walltime=")):
            ours.append(word)
        else:
            given.append(word)
        at += 1
    return ours, given, []


def _rank_count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks") from None
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} ranks cannot be started; one master and three slaves are -n 4")
    return count


def _end(text: str) -> str:
    try:
        return allocation.variable_for(text)
    except WalltimeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    """Return the parser of our own options."""
    top = argparse.ArgumentParser("jd-hpc", description="Start scripts of jd_hpc so that they survive the death of a slave.")
    top.add_argument("--version", action="version", version=f"jd_hpc {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="launch | doctor | check | journal | slurm")
    one = commands.add_parser(
        "launch",
        help="run a script under this environment's mpiexec, with the flags that let the others live when a rank dies",
        usage="jd-hpc launch -n N [--mpiexec PATH] [--walltime TIME] [--dry-run] [mpiexec's options ...] script.py [arguments ...]",
        epilog="The script is the first word that ends in .py, or -m module, or -c code, or what follows --.",
        allow_abbrev=False,
    )
    one.add_argument(
        "-n", "-np", dest="ranks", type=_rank_count, required=True, metavar="N", help="ranks: the master and N - 1 slaves"
    )
    one.add_argument("--dry-run", action="store_true", help="print the command and run nothing")
    one.add_argument(
        "--walltime",
        type=_end,
        metavar="TIME",
        help="when the allocation ends, from now on: seconds, MM:SS, H:MM:SS or D-HH:MM:SS; the run is drained before that",
    )
    two = commands.add_parser(
        "doctor", help="say what is here, and by killing a slave try what this place survives", allow_abbrev=False
    )
    two.add_argument("-n", "-np", dest="ranks", type=_rank_count, default=4, metavar="N", help="ranks of the trial, default 4")
    three = commands.add_parser(
        "check",
        help="verify the promises on histories of runs",
        epilog="The exit code is 0 if all promises hold, 1 if one was broken, 2 if a file cannot be read or is no history.",
        allow_abbrev=False,
    )
    three.add_argument("files", nargs="+", metavar="FILE", help="what history= or JD_HPC_HISTORY named")
    for each in (one, two):
        each.add_argument("--mpiexec", metavar="PATH", help="default: this environment's own, then the one on PATH")
    journal_tools.add_commands(commands)
    slurm_tools.add_commands(commands)
    return top


def check_histories(paths: list[str]) -> int:
    """Verify histories, print what was found, and return the exit code."""
    code = 0
    for path in paths:
        try:
            runs = check.check_file(path)
        except HistoryError as error:
            print(f"jd-hpc check: {path}: {error}", file=sys.stderr)
            code = 2
            continue
        broken = any(run.violation_count for run in runs)
        code = max(code, int(broken))
        print(f"{path}: {len(runs)} run{'s' * (len(runs) != 1)}")
        for run in runs:
            print("\n".join(run.report()))
        if not broken:
            print(verdict.VERIFIED)
    return code


def main(words: list[str] | None = None) -> int:
    """Run the command ``jd-hpc`` and return its exit code."""
    words = sys.argv[1:] if words is None else words
    given: list[str] = []
    program: list[str] = []
    if words[:1] == ["launch"]:
        ours, given, program = split_words(words[1:])
        words = ["launch", *ours]
    options = parser().parse_args(words)
    if options.command == "check":
        return check_histories(options.files)
    if options.command == "journal":
        return journal_tools.run(options)
    if options.command == "slurm":
        return slurm_tools.run(options)
    try:
        launcher_path = launch.find_mpiexec(options.mpiexec)
        if options.command == "doctor":
            from jd_hpc import doctor

            return doctor.examine(launcher_path, options.ranks)
        launch.check_program(program)
        launcher = launch.identify(launcher_path)
    except LaunchError as error:
        print(f"jd-hpc {options.command}: {error}", file=sys.stderr)
        return 2
    if options.walltime:
        os.environ[allocation.VARIABLE] = options.walltime
    added = launch.flags(launcher, options.ranks, os.environ, given, launch.core_count())
    command = launch.command_line(launcher, options.ranks, given, program, added)
    if options.dry_run:
        print(launch.as_shell_line(launcher, command))
    else:
        return launch.run(command, launcher.family)
    return 0


if __name__ == "__main__":
    sys.exit(main())

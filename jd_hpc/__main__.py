"""``python -m jd_hpc script.py``: a script with a supervisor over it, whose end is known exactly.

The rules it keeps:

1. The script finds what it would find without us: sys.argv, sys.path, ``__main__``, stdin. Its traceback shows no frame of ours.
2. The supervisor comes before anything of the script, and so before MPI.
3. An exception that nobody caught on one rank never leaves the others waiting in MPI_Finalize: rank 0 ends the run, another rank
   leaves it.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from types import ModuleType, TracebackType

from jd_hpc import allocation, chaos
from jd_hpc.errors import WalltimeError

USAGE = """usage: python -m jd_hpc [options] script.py [arguments ...]
   or: python -m jd_hpc [options] -m module [arguments ...]
   or: python -m jd_hpc [options] -c code [arguments ...]

Runs a script as one rank of an MPI run, with a supervisor over it: when another rank dies, the launcher leaves this one alone.

  mpiexec -n 4 python -m jd_hpc script.py
  jd-hpc launch -n 4 script.py               the same, with the launcher's own flags for this

options:
  --no-supervisor   run the script without a supervisor
  --chaos SPEC      do harm to slaves, to see what the script survives: "kill=2,stop=1,seed=7" (see jd_hpc.chaos)
  --walltime TIME   when the allocation ends, from now on: seconds, MM:SS, H:MM:SS or D-HH:MM:SS; the run is drained before that
  --version         show the version and exit
  -h, --help        show this and exit
"""

COURTESY_S = 1.0
"""How long the others may still write down what they have, when an exception on rank 0 ends the run."""


def parse(words: list[str]) -> tuple[bool, list[str]]:
    """Return whether a supervisor is wanted, and the words of the program. Exits for --help, --version and mistakes."""
    supervised = True
    words = list(words)
    while words and words[0].startswith("-") and words[0] not in ("-m", "-c", "-"):
        option = words.pop(0)
        if option in ("-h", "--help"):
            print(USAGE, end="")
            raise SystemExit(0)
        if option == "--version":
            from jd_hpc import __version__

            print("jd_hpc", __version__)
            raise SystemExit(0)
        if option == "--chaos" and words:
            try:
                chaos.Chaos.parse(words[0])
            except ValueError as error:
                _refuse(str(error))
            os.environ[chaos.VARIABLE] = words.pop(0)
        elif option == "--walltime" and words:
            try:
                os.environ[allocation.VARIABLE] = allocation.variable_for(words.pop(0))
            except WalltimeError as error:
                _refuse(str(error))
        elif option == "--no-supervisor":
            supervised = False
        else:
            _refuse(f"unknown option {option}, or one that wants an argument")
    if not words:
        _refuse("no script")
    if words[0] in ("-m", "-c") and len(words) < 2:
        _refuse(f"{words[0]} wants an argument")
    if words[0] not in ("-m", "-c", "-") and not Path(words[0]).exists():
        _refuse(f"no such script: {words[0]}")
    return supervised, words


def _refuse(why: str) -> None:
    print(f"python -m jd_hpc: {why}\n{USAGE}", end="", file=sys.stderr)
    raise SystemExit(2)


def run_program(words: list[str]) -> None:
    """Run a script, ``-m module``, ``-c code`` or ``-`` (stdin) as ``__main__``."""
    kind = words[0]
    if kind == "-m":
        sys.argv[:] = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif kind in ("-c", "-"):
        sys.argv[:] = [kind, *words[2 if kind == "-c" else 1 :]]
        text, name = (words[1], "<string>") if kind == "-c" else (sys.stdin.read(), "<stdin>")
        sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(text, name, "exec", dont_inherit=True), vars(sys.modules["__main__"]))
    else:
        sys.argv[:] = words
        if not sys.flags.safe_path:
            sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def main() -> int:
    """Run the program that the command line names, and return its exit status."""
    from jd_hpc import ending, signals, supervisor  # the first to register an atexit hook is the last to run it

    supervised, words = parse(sys.argv[1:])
    signals.remember()  # first: the supervisor passes on what comes as soon as it is there
    if supervised:
        supervisor.supervise()
    try:
        run_program(words)
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
        code = ending.status_of(error.code)
    except BaseException as error:
        error.__traceback__ = _without_ours(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        if ending.why_failed() is None:
            ending.failed(f"an uncaught {type(error).__name__}", others_gone=lambda: False, grace_s=COURTESY_S)
    else:
        code = 0
    ending.exit_with(code)
    signals.let_go()
    return code


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    """Leave out the frames between the interpreter and the script; all, if the script was never reached."""
    at = trace
    while at is not None and (at.tb_frame.f_code.co_filename == __file__ or "runpy" in at.tb_frame.f_code.co_filename):
        at = at.tb_next
    return at


if __name__ == "__main__":
    raise SystemExit(main())

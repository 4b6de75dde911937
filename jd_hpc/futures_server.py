"""``python -m jd_hpc.futures script.py``: rank 0 runs the script, the other ranks serve the executors that it makes.

The rules it keeps:

- A slave has what the script defines: it runs it once, under the name ``__worker__``, up to the first executor.
- Between two executors a slave waits for a word of the master, with growing pauses; it burns no core.
- Where the script fails on a slave, executors are told so, and the slave serves nothing.
- When the script has ended on the master, however it did, the slaves are let go.
"""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
import sys
import traceback
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from jd_hpc import calls
from jd_hpc.machine import FIRST_HEARTBEAT_S, MPIMachine
from jd_hpc.session import Server

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

    from jd_hpc.session import Session

WORKER_NAME = "__worker__"
"""What `__name__` is on a slave, so that what a script does under ``if __name__ == "__main__"`` is done on the master only."""

USAGE = """usage: python -m jd_hpc.futures script.py [arguments ...]
   or: python -m jd_hpc.futures -m module [arguments ...]
   or: python -m jd_hpc.futures -c code [arguments ...]

Runs a script that uses jd_hpc.Executor() on rank 0; the other ranks serve it:

  mpiexec -n 4 python -m jd_hpc.futures script.py
"""


class ServingError(BaseException):
    """A slave has come to the first executor: it has what it needs of the script. No program sees it."""


class Hub:
    """The ranks of COMM_WORLD, for one executor after the other.

    Attributes
    ----------
    comm : mpi4py.MPI.Intracomm
        A duplicate of COMM_WORLD.
    session : Session or None
        That of the last executor.
    serves : bool
        Slave: it is past the script; what asks for an executor now is a call.
    """

    current: ClassVar[Hub | None] = None

    def __init__(self, comm: Intracomm) -> None:
        self.comm = comm
        self.session: Session | None = None
        self.serves = False
        self._channel = MPIMachine(comm).channel()

    def begin(self, options: dict[str, Any]) -> None:
        """Master: have the slaves serve an executor with these options.

        Raises
        ------
        RuntimeError
            If another one is open.
        """
        if self.session is not None:
            if not self.session.is_ending:
                raise RuntimeError(
                    "another Executor is open, and the slaves serve one at a time: leave its `with`, or call its shutdown(), first"
                )
            self.session.end()
        self._channel.tell(calls.dumps(options, "the initializer"))

    def close(self) -> None:
        """Master: let the slaves go."""
        if self.session is not None:
            self.session.end()
        self._channel.tell(None)

    def serve(self, trouble: Exception | None = None) -> None:
        """Slave: serve one executor after the other, until the master has no more. Each hears of trouble with the script."""
        self.serves = True
        while (packed := self._channel.hear(FIRST_HEARTBEAT_S)) is not None:
            with contextlib.suppress(Exception):  # the master has been told
                options = pickle.loads(packed)
                if trouble is not None:
                    options |= {"initializer": _raise, "initargs": (trouble,)}
                Server(self.comm, **options).run()


def _raise(trouble: Exception) -> None:
    raise trouble


def hub() -> Hub | None:
    """Return the hub, if there is one and this is the master. The script does not come back from here on a slave."""
    here = Hub.current
    if here is None or here.comm.rank == 0:
        return here
    if here.serves:  # a call wants an executor of its own, which runs where the call does
        return None
    raise ServingError


# ---- the program -----------------------------------------------------------------------------------------------------


def _refuse(why: str) -> SystemExit:
    print(f"python -m jd_hpc.futures: {why}\n{USAGE}", end="", file=sys.stderr)
    return SystemExit(2)


def _module_code(name: str) -> tuple[CodeType, dict[str, Any]]:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ImportError:
        spec = None
    if spec is None or spec.loader is None:
        raise _refuse(f"no such module: {name}")
    code = spec.loader.get_code(spec.name)  # type: ignore[attr-defined]
    return code, {"__file__": spec.origin, "__spec__": spec, "__package__": spec.parent, "__loader__": spec.loader}


def program(words: list[str]) -> tuple[CodeType, dict[str, Any]]:
    """Return the code that a command line names and what its module starts with; set sys.argv and sys.path for it."""
    if words and words[0] in ("-h", "--help"):
        print(USAGE, end="")
        raise SystemExit(0)
    if not words or (words[0] in ("-m", "-c") and len(words) < 2):
        raise _refuse("no script")
    if words[0] == "-m":
        code, facts = _module_code(words[1])
        sys.argv[:] = [str(facts["__file__"]), *words[2:]]
        return code, facts
    if words[0] == "-c":
        sys.argv[:] = ["-c", *words[2:]]
        return compile(words[1], "<string>", "exec", dont_inherit=True), {}
    path = Path(words[0])
    if words[0].startswith("-") or not path.is_file():
        raise _refuse(f"no such script: {words[0]}")
    sys.argv[:] = words
    if not sys.flags.safe_path:
        sys.path[0] = str(path.resolve().parent)
    return compile(path.read_bytes(), words[0], "exec", dont_inherit=True), {"__file__": words[0]}


def run(code: CodeType, facts: dict[str, Any], name: str) -> None:
    """Run a program under this name, where pickle finds what it defines on master and slaves alike."""
    module = ModuleType(name)
    vars(module).update(facts)
    sys.modules["__main__"] = sys.modules[WORKER_NAME] = module
    exec(code, vars(module))


def main() -> int:
    """Run the program that the command line names, and return its exit status."""
    code, facts = program(sys.argv[1:])
    from mpi4py import MPI

    if MPI.COMM_WORLD.size == 1:
        run(code, facts, "__main__")
        return 0
    here = Hub.current = Hub(MPI.COMM_WORLD.Dup())
    if here.comm.rank > 0:
        trouble = None
        try:
            run(code, facts, WORKER_NAME)
        except (ServingError, SystemExit):
            pass
        except Exception as error:  # nobody may wait for this rank for ever
            traceback.print_exc()
            trouble = error
        here.serve(trouble)
        return 0 if trouble is None else 1
    try:
        run(code, facts, "__main__")
    finally:
        here.close()
    return 0

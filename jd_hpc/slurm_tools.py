"""``jd-hpc slurm``: the templates of slurm/ with a user's numbers, and what srun must know of the MPI that is here.

The rules it keeps: a template is a batch script that works as it is, and rendering one only replaces whole lines of it; what the
user set in the environment stays.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jd_hpc.errors import LaunchError
from jd_hpc.slurm import LEAVE_VARIABLE

FOLDER = Path(__file__).parent / "templates"
NAMES = ("basic", "resume", "array", "survive", "big")
TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d(:\d\d)?)?")
"""As Slurm has it: minutes, minutes:seconds, hours:minutes:seconds, days-hours, and so on."""
ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
WORD = re.compile(r"[\w.,:@+=-]+")


def settings(
    family: str, version: tuple[int, ...], library: str, prefix: Path, survive: bool, has_fabric: bool
) -> dict[str, str]:
    """Return the environment variables under which srun starts the ranks of an MPI as one run.

    Parameters
    ----------
    family : str
        "openmpi" or "mpich".
    version : tuple of int
        Of the MPI.
    library : str
        What MPI_Get_library_version says.
    prefix : Path
        Of the Python environment, in which an MPI from PyPI lies.
    survive : bool
        Whether the loss of ranks is to be survived.
    has_fabric : bool
        Whether there is a network for MPI, such as InfiniBand.
    """
    if family == "mpich":
        found = {"SLURM_MPI_TYPE": "pmi2"}
        if re.search(r"ch4:ucx[ ,]+ofi", library):
            # Through UCX over TCP, messages that meet a receive from any source got lost (MPICH 5.0.2, with plain mpi4py too).
            found["MPIR_CVAR_CH4_NETMOD"] = "ofi"
            if not has_fabric:  # left to itself, libfabric had 3 of 27 runs stuck in MPI_Init
                found["FI_PROVIDER"] = "tcp"
        return found
    found = {"SLURM_MPI_TYPE": "pmix"}
    if version >= (5,):
        if (prefix / "share/openmpi").is_dir():
            found["OPAL_PREFIX"] = str(prefix)  # mpiexec finds this out by itself, and srun does not
        if survive:
            found |= {"OMPI_MCA_mpi_ft_enable": "1", LEAVE_VARIABLE: "1"}
    return found


def shell_lines(found: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """Return the lines by which a shell takes the settings over, save those that the user has made."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in found.items() if name not in environ)


def settings_here(survive: bool) -> dict[str, str]:
    """Ask mpi4py which MPI is here, without starting it.

    Raises
    ------
    LaunchError
        If it is one of which we do not know what srun must be told.
    """
    import mpi4py

    mpi4py.rc.initialize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(f"mpi4py finds no MPI ({error}). Cure: activate your environment, or load your MPI's module") from error
    vendor, version = MPI.get_vendor()
    family = {"Open MPI": "openmpi", "MPICH": "mpich"}.get(vendor)
    if family is None and "SLURM_MPI_TYPE" in os.environ:
        return {}
    if family is None:
        raise LaunchError(
            f"what srun must be told for {vendor} is not known here. Cure: ask your site (srun --mpi=list shows what there is) and "
            f"set it before: export SLURM_MPI_TYPE=..."
        )
    return settings(family, version, MPI.Get_library_version(), Path(sys.prefix), survive, _has_fabric())


def _has_fabric() -> bool:
    folder = Path("/sys/class/infiniband")
    return folder.is_dir() and any(folder.iterdir())


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return a template with a user's numbers.

    Parameters
    ----------
    template : str
        One of NAMES.
    values : mapping of str
        nodes, tasks_per_node, time, script, array, and `sbatch`, a list of further options; None leaves the template's own.

    Raises
    ------
    LaunchError
        If the numbers do not go together.
    """
    if template == "array" and values["array"] is None:
        raise LaunchError("the template array wants --array, such as --array 10")
    if template != "array" and values["array"] is not None:
        raise LaunchError(f"--array goes with --template array, not with {template}")
    lines = []
    ranks = []
    for line in (FOLDER / f"{template}.sbatch").read_text().splitlines():
        if line.startswith("#SBATCH"):
            for name in ("nodes", "ntasks-per-node", "time", "array"):
                value = values[name.replace("-", "_")]
                if value is not None:
                    line = re.sub(rf"--{name}=\S+", f"--{name}={value}", line)
            ranks += [int(number) for number in re.findall(r"--(?:nodes|ntasks-per-node)=(\d+)", line)]
        if line.startswith("SCRIPT=") and values["script"] is not None:
            line = f"SCRIPT={shlex.quote(values['script'])}"
        lines.append(line)
        if "--time=" in line and line.startswith("#SBATCH"):
            lines += [f"#SBATCH {option}" for option in values["sbatch"]]
    if ranks[0] * ranks[1] < 2:
        raise LaunchError("one rank has nobody to give jobs to. Cure: --nodes and --tasks-per-node that make at least two ranks")
    return "\n".join(lines) + "\n"


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _of(pattern: re.Pattern[str], what: str) -> Callable[[str], str]:
    def checked(text: str) -> str:
        if not pattern.fullmatch(text):
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}")
        return text

    return checked


def _array(text: str) -> str:
    if text.isdigit() and int(text) > 0:
        return f"0-{int(text) - 1}"
    return _of(ARRAY, "array of tasks, such as 10 or 0-9 or 0-9%4")(text)


def _script(text: str) -> str:
    if not text.strip() or "\n" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a script")
    return text


def add_commands(commands: Any) -> None:
    """Add ``jd-hpc slurm`` to the parser."""
    slurm = commands.add_parser("slurm", help="batch scripts for Slurm", allow_abbrev=False)
    what = slurm.add_subparsers(dest="what", required=True, metavar="render | env")
    one = what.add_parser("render", help="print a batch script with your numbers", allow_abbrev=False)
    one.add_argument("--template", choices=NAMES, help="default: basic; array with --array")
    one.add_argument("--nodes", type=_count, metavar="N")
    one.add_argument("--tasks-per-node", dest="ntasks_per_node", type=_count, metavar="N", help="ranks on each node: one per core")
    one.add_argument("--time", type=_of(TIME, "time as Slurm has it, such as 4:00:00"), metavar="H:MM:SS")
    one.add_argument("--script", type=_script, metavar="FILE")
    one.add_argument("--array", type=_array, metavar="TASKS", help="10, or as Slurm has it: 0-9%%4")
    for name in ("partition", "account", "qos", "constraint", "job-name", "mem"):
        one.add_argument(f"--{name}", type=_of(WORD, f"{name}"), metavar="X", help="as sbatch has it")
    one.add_argument("-o", "--output", metavar="FILE", help="write it there")
    two = what.add_parser("env", help="print what srun must know of the MPI that is here, for a shell's eval", allow_abbrev=False)
    two.add_argument("--survive", action="store_true", help="and what lets the others live when ranks are lost")


def run(options: argparse.Namespace) -> int:
    """Do what the command line says, and return the exit code."""
    try:
        if options.what == "env":
            print(shell_lines(settings_here(options.survive), os.environ), end="")
            return 0
        names = ("partition", "account", "qos", "constraint", "job-name", "mem")
        given = {name: getattr(options, name.replace("-", "_")) for name in names}
        values = vars(options) | {"sbatch": [f"--{name}={value}" for name, value in given.items() if value is not None]}
        text = render(options.template or ("array" if options.array else "basic"), values)
        if options.output is None:
            print(text, end="")
        else:
            Path(options.output).write_text(text)
    except (LaunchError, OSError) as error:
        print(f"jd-hpc slurm {options.what}: {error}", file=sys.stderr)
        return 2
    return 0

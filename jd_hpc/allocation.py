"""When the allocation ends: asked of the user, of the command line's word in the environment, and of Slurm.

The rules it keeps: only the master asks; what the user passed to JobDispatcher counts alone; of the others the earliest end counts.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from jd_hpc.errors import WalltimeError
from jd_hpc.walltime import parse

logger = logging.getLogger("jd_hpc")

VARIABLE = "JD_HPC_WALLTIME"
"""The end in seconds since 1970, so that all processes of a launch mean the same moment."""
SLURM_VARIABLE = "SLURM_JOB_END_TIME"
"""Likewise; newer versions of Slurm set it."""
ASK_LIMIT_S = 5
"""How long squeue may take to answer."""
LEAST_TIME = 1e9
"""An end before 2001 is no end, but a duration in the wrong place."""

Left = Callable[[], object]

_loaded_at = time.monotonic()
_told_by_squeue: dict[str, float] = {}


def left_of(given: float | Left | None, environ: Mapping[str, str]) -> Left | None:
    """Return a function that tells how many seconds of the allocation are left, or None if nobody knows its end.

    Parameters
    ----------
    given : None, float or callable
        What the user passed: seconds from the start of this process, or such a function. None: the environment decides.
    environ : mapping
        The environment.

    Raises
    ------
    WalltimeError
        If a variable holds no time.
    """
    if callable(given):
        return given
    if given is not None:
        seconds = given  # the type checker knows it inside the lambda
        return lambda: seconds - process_age_s()
    ends = [_end_in(environ, name) for name in (VARIABLE, SLURM_VARIABLE) if environ.get(name)]
    if not environ.get(SLURM_VARIABLE) and environ.get("SLURM_JOB_ID"):
        ends.append(_end_by_squeue(environ["SLURM_JOB_ID"]))
    end = min(ends, default=math.inf)
    return None if end == math.inf else lambda: end - time.time()


def variable_for(text: str) -> str:
    """Return what JD_HPC_WALLTIME must be for a walltime that begins now, given as on the command line.

    Raises
    ------
    WalltimeError
        If the text is no time.
    """
    return f"{time.time() + parse(text):.1f}"


def process_age_s() -> float:
    """Return how long ago this process began, in seconds."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux
        return time.monotonic() - _loaded_at


def _end_in(environ: Mapping[str, str], name: str) -> float:
    try:
        end = float(environ[name])
    except ValueError:
        end = 0.0
    if not end >= LEAST_TIME:
        raise WalltimeError(
            f"{name} is {environ[name]!r}: it must be the end of the allocation in seconds since 1970. "
            f"Cure: unset it, or pass a duration as --walltime or JobDispatcher(walltime=...)"
        )
    return end


def _end_by_squeue(job_id: str) -> float:
    """Ask Slurm, where the environment does not say it; once. No answer is no end."""
    if job_id not in _told_by_squeue:
        _told_by_squeue[job_id] = _ask_squeue(job_id)
    return _told_by_squeue[job_id]


def _ask_squeue(job_id: str) -> float:
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--format=%L"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_LIMIT_S, stdin=subprocess.DEVNULL)
        left_s = parse(done.stdout)
    except (OSError, subprocess.TimeoutExpired, WalltimeError) as error:  # also UNLIMITED and the like
        logger.info("squeue does not tell when job %s ends: %s", job_id, error)
        return math.inf
    return time.time() + left_s

"""What a rank must know of Slurm: whether srun started it, and how to keep Slurm from killing everybody because one rank is lost.

The rules it keeps:

1. srun does not mind a task that ends with 0, and its own exit code is the largest of its tasks'. So where srun is the launcher
   nobody need linger, and no MPI_Abort is needed when all have left: it would have Slurm kill the rest, and the code would be 137.
2. Slurm's PMIx plugin kills the step when a rank's connection to it ends before PMIx_Finalize. So a rank that leaves without
   MPI_Finalize takes leave of PMIx first; with LEAVE_VARIABLE every rank does so as soon as all are connected, and then no death
   of a rank, and no report of one by MPI, ever reaches the plugin.
3. The exit code that counts is the master's. Where a lost node's tasks spoil srun's, CODE_VARIABLE names a file for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from pathlib import Path

LEAVE_VARIABLE = "JD_HPC_LEAVE_PMIX"
"""1: take leave of PMIx once MPI is set up. MPI cannot reach any rank then that it has not spoken to before."""
CODE_VARIABLE = "JD_HPC_EXIT_CODE_FILE"
OTHER_LAUNCHERS = ("mpiexec", "mpirun", "prterun", "prte", "prted", "orterun", "orted", "hydra_pmi_proxy")
STEP_DAEMON = "slurmstepd"


@functools.cache
def started_by_srun() -> bool:
    """Tell whether srun started this rank: not a batch script, nor an mpiexec that srun started."""
    if "SLURM_STEP_ID" not in os.environ or "SLURM_PROCID" not in os.environ:
        return False
    pid = os.getppid()
    with contextlib.suppress(OSError, ValueError, IndexError):  # it ended meanwhile
        while pid > 1:
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
            if name == STEP_DAEMON:
                return True
            if name in OTHER_LAUNCHERS:
                return False
            pid = int(rest.split()[1])
    return False


def leaves_pmix_early() -> bool:
    """Tell whether ranks are to take leave of PMIx as soon as all are connected."""
    return os.environ.get(LEAVE_VARIABLE) == "1" and "PMIX_RANK" in os.environ and started_by_srun()


def leave_pmix() -> bool:
    """Take leave of PMIx, if srun started this rank with it and it has not done so. It takes no more than two seconds.

    Returns
    -------
    bool
        Whether this rank is off now.
    """
    if "PMIX_RANK" not in os.environ or not started_by_srun():
        return False
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith("libpmix.so"):
            library = ctypes.CDLL(path)
            while library.PMIx_Initialized() and library.PMIx_Finalize(None, ctypes.c_size_t(0)) == 0:
                pass  # as often as it was initialized
            return not library.PMIx_Initialized()
    return False


def end_step() -> None:
    """Have Slurm end all ranks. The master is gone, and MPICH may hold a slave that notices in a call that never comes back."""
    step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    with contextlib.suppress(OSError):
        os.spawnlp(os.P_NOWAIT, "scancel", "scancel", "--signal=KILL", step)


def note_exit_code(code: int) -> None:
    """Master: write its exit code into the file that CODE_VARIABLE names, if it does."""
    if path := os.environ.get(CODE_VARIABLE):
        with contextlib.suppress(OSError):  # srun's own code must do then
            Path(path).write_text(f"{code}\n")

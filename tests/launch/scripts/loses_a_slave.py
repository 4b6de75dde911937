"""The master exchanges small messages with its slaves, one of which fails. Arguments: the kind of failure (see jd_hpc.trial), and
the exit code of the master."""

import os
import sys

from script_helpers import RANK, note

from jd_hpc import trial

note(f"pid{RANK}", os.getpid())
trial.main(sys.argv[1])
note(f"finished{RANK}", "yes")
if RANK == 0:
    sys.exit(int(sys.argv[2]))

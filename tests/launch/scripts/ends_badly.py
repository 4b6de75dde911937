"""Four ranks and an end that is not in order. The argument says which."""

import os
import signal
import sys
import time

from jd_hpc import supervisor

way = sys.argv[1]
if way == "slave raises before MPI" and supervisor.rank_of(dict(os.environ)) == 2:
    raise ValueError("a slave's mistake")

from mpi4py import MPI  # noqa: E402
from script_helpers import RANK, note, note_shared_memory, say  # noqa: E402

note_shared_memory()  # now: a rank that is killed leaves it behind, and the test clears it away
note(f"pid{RANK}", os.getpid())
if way == "master raises" and RANK == 0:
    raise ValueError("the master's mistake")
if way == "all raise":
    raise ValueError("everybody's mistake")
if way == "master is killed" and RANK == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if way == "slave is killed" and RANK == 2:
    os.kill(os.getpid(), signal.SIGKILL)
if way == "slave raises" and RANK == 2:
    raise ValueError("a slave's mistake")
if way == "reads a line":
    if RANK == 0:
        say("got", sys.stdin.readline().strip(), sys.argv[2:])
    sys.exit()
if way == "fails, with a code" and RANK == 0:
    from jd_hpc import ending

    ending.failed("says the test", others_gone=lambda: True)
    sys.exit(3)
if way == "handles TERM":
    signal.signal(signal.SIGTERM, lambda *_: (note(f"term{RANK}", "yes"), os._exit(5)))
    note(f"ready{RANK}", "yes")
if way in ("master raises", "slave raises"):
    MPI.COMM_WORLD.recv(source=0)
time.sleep(60)

"""Slaves wait for the master's word, and it hangs up on them before it calls map_array. Each says so when it has noticed."""

import time
from pathlib import Path

from mpi4py import MPI
from script_helpers import RANK, note, say

from jd_hpc import MasterLostError, MPIMachine, map_array

machine = MPIMachine(MPI.COMM_WORLD)
channel = machine.channel()
if RANK == 0:
    time.sleep(0.2)  # they wait by then
    channel.listener.close()
    while not all(Path(f"note.lost{rank}").exists() for rank in range(1, machine.size)):
        time.sleep(0.01)
    MPI.COMM_WORLD.Abort(3)
try:
    map_array(abs, None, "f8", vm=machine)
except MasterLostError:
    say("lost", RANK)
    note(f"lost{RANK}", "yes")
time.sleep(20)  # the master ends the run

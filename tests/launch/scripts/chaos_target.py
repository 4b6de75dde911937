"""A run in which one slave meets a fault: chaos_target.py kind moment isolate victims.

The master compares all results with what they must be, and writes what it saw as JSON.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI
from script_helpers import note_shared_memory

from jd_hpc import JobDispatcher
from jd_hpc.chaos import strike

kind, moment, isolate, victims = sys.argv[1], sys.argv[2], sys.argv[3] == "isolate", int(sys.argv[4])
rank = MPI.COMM_WORLD.Get_rank()
BIG = 1 << 20  # float64: 8 MB
PAUSE_S = 3.0
big = moment.startswith("big")
COUNT = 40 if big else 120


def once(name: str) -> bool:
    """Whether this is the first to come here."""
    try:
        os.close(os.open(f"note.{name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    Path(f"note.{name}.time").write_text(f"{time.monotonic()}\n")
    return True


def meet(name: str) -> None:
    if once(name):
        strike(kind, PAUSE_S)


class Target(JobDispatcher):
    def on_startup(self):
        self.is_victim = 0 < rank <= victims
        if self.is_victim and moment == "first":
            meet(f"strike{rank}")
        if self.is_victim and (moment == "idle" or big):
            threading.Timer(0.15 if moment == "idle" else 0.1, meet, [f"strike{rank}"]).start()

    def reset(self):
        self.asked = 0
        self.got = {}
        self.failed = []
        self.seen = {}

    def next_job(self):
        if self.asked == COUNT:
            return None
        if moment == "idle" and self.asked == 30:
            time.sleep(0.5)  # all slaves are idle, while the fault comes
        self.asked += 1
        job = self.asked - 1
        return (job, np.full(BIG, job, "f8")) if moment == "big_job" else (job, None)

    def process_job(self, given):
        job, array = given
        time.sleep(0.03 if big else 0.002)  # the fault must come while the run is on
        if moment == "poison" and job == 31:
            strike(kind, PAUSE_S)
        if moment in ("computing", "alone") and (isolate or self.is_victim) and job > 30:
            for victim in range(1, victims + 1) if isolate else [rank]:
                meet(f"strike{victim}")
        if array is not None:
            assert (array == job).all()
        return (job * job, np.full(BIG, job, "f8") if moment == "big_result" else None)

    def process_result(self, index, job, result):
        assert index not in self.got, f"job {index} twice"
        assert result[0] == job[0] ** 2 == index**2
        if result[1] is not None:
            assert (result[1] == index).all()
        self.got[index] = result[0]

    def process_failure(self, index, job, error):
        self.failed.append((index, error.attempts))

    def on_slave_failed(self, slave, indices):
        self.seen.setdefault(slave, time.monotonic())

    def on_shutdown(self):
        if self.is_victim and moment == "end":
            meet(f"strike{rank}")


target = Target(
    MPI.COMM_WORLD,
    isolate=isolate,
    max_attempts=2 if moment == "poison" else 3,
    local_fallback=moment != "alone",
    heartbeat_s=0.1,
    liveness_timeout_s=1.0,
    job_timeout_s=1.0 if kind in ("hang", "hold") or isolate else None,
    memory_limit=1 << 28 if isolate else None,
)
note_shared_memory()
target.run()
if rank == 0:
    struck = {path.name: float(path.read_text()) for path in Path().glob("note.strike*.time")}
    latency = {r: at - struck[name] for r, at in target.seen.items() if (name := f"note.strike{r}.time") in struck}
    failed = [index for index, _ in target.failed]
    facts = {"complete": sorted([*target.got, *failed]) == list(range(COUNT)), "failed": target.failed}
    facts |= {"latency": latency, "struck": len(struck), "stats": target.stats}
    print("seen", json.dumps(facts), flush=True)
    if not facts["complete"]:
        sys.exit(4)

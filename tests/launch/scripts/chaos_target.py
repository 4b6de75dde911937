"""A run in which slaves meet a fault: chaos_target.py kind moment plain|isolate victims.

The master compares all results with those of a local run of the same jobs, and prints what it saw as JSON. With isolate a fault
that comes while jobs run strikes the jobs' process, and any other one the rank.
"""

import faulthandler
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
import zlib
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
MEMORY_LIMIT = 1 << 28
POISON = 31
big = moment.startswith("big")
COUNT = 40 if big else 120
is_victim = 0 < rank <= victims
job_at = -1  # the job that this process has begun last
faulthandler.dump_traceback_later(45, exit=True)  # a rank that hangs says where


def once(name, *facts):
    """Whether this is the first to come here; the facts, and when that was, are noted."""
    draft = Path(f"note.of{os.getpid()}.{threading.get_ident()}")
    draft.write_text(json.dumps([time.monotonic(), *facts]))
    try:
        os.link(draft, f"note.{name}")
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def meet():
    """What happens to this rank, once."""
    if once(f"strike{rank}", job_at):
        once(f"struck{job_at}")
        if kind == "eat" and not in_child():
            limit_memory()
        strike(kind, PAUSE_S)


def in_child():
    return isolate and moment in ("first", "computing", "big_job", "big_result")


def limit_memory():
    """A blow-up that the machine survives."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_LIMIT, most))


def meet_later(after_s):
    """Out of the blue: in another thread, or, what would harm nobody there, in the main thread."""
    if kind in ("raise", "compute") and moment != "thread":
        signal.signal(signal.SIGALRM, lambda *_: meet())
        signal.setitimer(signal.ITIMER_REAL, after_s)
    else:
        threading.Timer(after_s, meet).start()


class Unsendable:
    """A result of which pickling raises."""

    def __reduce__(self):
        meet()
        strike("raise")  # every time that it is tried


def payload(job):
    return np.arange(BIG, dtype="f8") + job


def checksum(array):
    return None if array is None else zlib.crc32(array)


class Target(JobDispatcher):
    def on_startup(self):
        if not is_victim:
            return
        if moment == "first" and not isolate:
            meet()
        elif moment in ("idle", "thread"):
            meet_later(0.15)
        elif big and not isolate and kind != "raise":
            meet_later(0.1)

    def reset(self):
        self.asked = self.doubled = 0
        self.got = {}
        self.failed = {}

    def next_job(self):
        if self.asked == COUNT:
            return None
        if moment == "idle" and self.asked == 30 and self.machine.size > 1:
            time.sleep(0.5)  # all slaves are idle, while the fault comes
        self.asked += 1
        job = self.asked - 1
        return job, payload(job) if moment == "big_job" else None

    def process_job(self, given):
        global job_at
        job, array = given
        if self.machine.size > 1:
            if Path(f"note.struck{job}").exists():
                once(f"again{job}")
            job_at = job
            time.sleep(0.03 if big else 0.002)  # the fault must come while the run is on
        result = payload(job) if moment == "big_result" else None
        if (is_victim and self.is_time(job)) or (rank > 0 and moment == "poison" and job == POISON):
            result = self.meet_in_job(result)
        return job * job, checksum(array), result

    def is_time(self, job):
        if moment == "first":
            return isolate
        if big:
            return job > 6 and (isolate or kind == "raise")
        return job > 30 and moment in ("computing", "alone")

    def meet_in_job(self, result):
        if moment == "poison":
            strike(kind, PAUSE_S)
        elif kind == "raise" and moment == "big_result":
            return Unsendable() if once(f"unsendable{rank}") else result
        elif kind == "raise" or not big:
            meet()
        elif once(f"timer{rank}"):
            meet_later(0.02)
        return result

    def process_result(self, index, job, result):
        self.doubled += index in self.got or index in self.failed
        square, job_sum, array = result
        self.got[index] = (job[0], checksum(job[1]), square, job_sum, checksum(array))

    def process_failure(self, index, job, error):
        self.doubled += index in self.got or index in self.failed
        self.failed[index] = (error.type_name, error.attempts)
        once(f"failure{index}", error.slave)

    def on_shutdown(self):
        if is_victim and moment == "end":
            meet()


WORDS = {
    "its connection": "connection", "silent": "silence", "over its deadline": "deadline", "MPI reports": "MPI", "a message": "MPI",
}  # fmt: skip


class Notices(logging.Handler):
    """When the master found out, and by what."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def emit(self, record):
        if record.msg.startswith("slave %d is %s: %s;"):
            slave, _, how, _ = record.args
            by = next((by for words, by in WORDS.items() if how.startswith(words)), how)
            self.seen.setdefault(slave, (by, time.monotonic()))


def noted(name):
    """rank or job → what was noted of it."""
    return {int(path.name.removeprefix(f"note.{name}")): json.loads(path.read_text()) for path in Path().glob(f"note.{name}*")}


def latencies(notices, ended_at):
    """[by what, seconds] for every fault that was noticed before the end."""
    found = []
    failures, agains = noted("failure"), noted("again")
    for slave, (struck_at, job) in noted("strike").items():
        if slave in notices:
            by, at = notices[slave]
        elif job in failures:
            by, at = "job's failure", failures[job][0]
        elif job in agains:
            by, at = "next attempt", agains[job][0]
        elif ended_at is not None:
            by, at = "slave's error", ended_at
        else:
            continue
        found.append((by, at - struck_at))
    return found


options = {
    "isolate": isolate,
    "max_attempts": 2 if moment == "poison" else 3,
    "local_fallback": moment != "alone",
    "heartbeat_s": 0.1,
    "liveness_timeout_s": 1.0,
    "job_timeout_s": 1.0 if kind in ("hang", "hold") or (isolate and kind != "eat") else None,
    "memory_limit": MEMORY_LIMIT if isolate else None,
}
notices = Notices()
logging.basicConfig(level="WARNING")
logging.getLogger("jd_hpc").addHandler(notices)
note_shared_memory()
if is_victim and moment == "before":
    meet()
target = Target(MPI.COMM_WORLD, history="note.history" if moment != "before" else "", **options)
target.reset()  # run() may not come to that
error = None
try:
    target.run()
except Exception as raised:
    if rank > 0:
        raise
    error = raised
if rank == 0:
    noticed = latencies(notices.seen, time.monotonic() if error is not None else None)
    local = Target(None)
    local.run()
    facts = {
        "error": None if error is None else f"{type(error).__name__}: {error}".splitlines()[0],
        "lost": COUNT - len(target.got.keys() | target.failed.keys()),
        "doubled": target.doubled,
        "different": sum(value != local.got[index] for index, value in target.got.items()),
        "failed": target.failed,
        "struck": len(noted("strike")),
        "notices": noticed,
        "stats": target.stats,
    }
    print("seen", json.dumps(facts), flush=True)
    if error is not None:
        raise error
if is_victim and moment == "after":
    meet()

"""A run in which slave 1 sends, besides its results, what no slave sends: says_nonsense.py what."""

import sys
import time

import numpy as np
from mpi4py import MPI
from script_helpers import RANK, Squares, say

from jd_hpc.errors import Failure
from jd_hpc.machine import Channel
from jd_hpc.payload import pack, pack_into
from jd_hpc.wire import HEADER_BYTES, HEADER_DTYPE, KINDS, MAGIC, MESSAGE_BYTES, TAG_BODY, TAG_MESSAGE

what = sys.argv[1]


def message(payload=b"", **fields):
    """A message of run 1."""
    header = np.zeros((), HEADER_DTYPE)
    for name, value in ({"magic": MAGIC, "run": 1, "body_bytes": len(payload)} | fields).items():
        header[name] = value
    return header.tobytes() + payload


def packed(value):
    """Pickle as the payloads are."""
    frames, size = pack(value, "a test's value")
    data = bytearray(size)
    pack_into(frames, memoryview(data))
    return bytes(data)


RESULTS, FAILURES, READY = KINDS["RESULTS"], KINDS["FAILURES"], KINDS["READY"]


def nonsense(job, facts):
    """All there is. What answers a job comes once for every slot that it may be in."""
    return {
        "no header": b"",
        "short": message()[:-1],
        "random": bytes(range(200)),
        "other length": message(kind=RESULTS, body_bytes=7),
        "negative length": message(kind=RESULTS, body_bytes=-1),
        "too long": bytes(MESSAGE_BYTES + 1),
        "far too long": bytes(4000),  # what is longer, Open MPI 5.0 writes past the end of the buffer itself
        "unknown kind": message(kind=99),
        "drain for no reason": message(kind=KINDS["DRAIN"], count=1, attempt=200),
        "unknown job": message(packed([1]), kind=RESULTS, slot=1 << 30, count=1),
        "attempt never made": [message(packed([1]), kind=RESULTS, first=job, slot=slot, count=1, attempt=200) for slot in range(8)],
        "too many jobs": [message(packed([1]), kind=RESULTS, first=job, slot=slot, count=1 << 30) for slot in range(8)],
        "failures of wrong length": message(b"\xff" * 8, kind=FAILURES, count=1),
        "unreadable failures": message(b"?" * 20 + (20).to_bytes(8, "little"), kind=FAILURES, count=1),
        "unreadable report": message(b"?" * 20, kind=READY),
        "report of another kind": message(packed([1]), kind=READY),
        "report twice": message(packed(facts), kind=READY),
        "unreadable error": message(b"?" * 20, kind=KINDS["ERROR"]),
        "unreadable word on shared data": message(b"?" * 20, kind=KINDS["SHARED"]),
        "shared data that nobody has": message(packed({"refuses": True}), kind=KINDS["SHARED"]),
        "word for a group": message(packed(Failure("Error", "stuck", "", None)), kind=KINDS["BROKEN"]),
        "message for nobody": message(packed("x"), kind=KINDS["TELL"], slot=99),
        "message for itself": message(packed("x"), kind=KINDS["TELL"], slot=1),
        "unreadable message": message(b"?" * 20, kind=KINDS["TELL"]),
        "too many messages": [message(b"", kind=KINDS["TELL"], body_bytes=1 << 20, body_tag=TAG_BODY + tag) for tag in range(9)],
        "message over the limit": message(kind=KINDS["TELL"], body_bytes=1 << 40, body_tag=TAG_BODY),
        "message with a wrong tag": message(kind=KINDS["TELL"], body_bytes=1 << 20, body_tag=3),
        "heard what nobody said": message(kind=KINDS["HEARD"], count=1),
        "heard less than nothing": message(kind=KINDS["HEARD"], count=-1),
        "goodbye": message(kind=KINDS["BYE"]),
        "body over the limit": message(kind=RESULTS, count=1, body_bytes=1 << 40, body_tag=TAG_BODY),
        "body with a wrong tag": message(kind=RESULTS, count=1, body_bytes=1 << 20, body_tag=3),
    }


assert len(message()) == HEADER_BYTES


class Target(Squares):
    payload_limit = 1 << 30

    def process_job(self, job):
        if RANK > 1:
            time.sleep(0.01)  # rank 1 may be late
        elif what:
            self.speak(job)
        return super().process_job(job)

    def speak(self, job):
        global what
        said = nonsense(job, self._plan().facts())[what]
        what = ""
        for one in said if isinstance(said, list) else [said]:
            Channel.of(MPI.COMM_WORLD).comm.Send(one, 0, TAG_MESSAGE)

    def on_slave_failed(self, slave, indices):
        say("failed", slave)


target = Target(MPI.COMM_WORLD, heartbeat_s=0.1, liveness_timeout_s=1.0)
answer = target.run()
if answer:
    say("answer", *answer, target.stats["slaves lost"])

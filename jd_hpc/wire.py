"""What travels between master and slave: tags, kinds, the header's layout and the limits.

Every message is a header of 32 bytes, so that a small job is one cache line on its way. A payload that fits into INLINE_BYTES
follows it in the same (eager) message; a longer one travels as a body, in a message of its own that is received from that one
source, because only small messages may meet a wildcard. Tags are constants: a job number as tag would overflow on some MPIs.
wire.pxd says the same in C.
"""

from __future__ import annotations

from typing import Final

import numpy as np

MAGIC: Final = 0x4A44
"""First word of every header: "JD"."""
PROTOCOL: Final = 2
"""Raised whenever the layout below changes: ranks that differ refuse each other."""

TAG_MESSAGE: Final = 1
TAG_BODY: Final = 16
TAG_BODY_COUNT: Final = 1024
"""Bodies take turns over these, so that two on their way from one source are not mixed up. MPI promises tags up to 32,767."""

HEADER_BYTES: Final = 32
MESSAGE_BYTES: Final = 2048
"""Header and inline payload together: below the eager limit of every MPI that we know (4096 bytes is the smallest)."""
INLINE_BYTES: Final = MESSAGE_BYTES - HEADER_BYTES
UNIT_FROM_BYTES: Final = 1 << 30
"""From here on a body is counted in units: MPI-3 counts are 32 bit."""
UNIT_BYTES: Final = 1 << 20

KINDS: Final = {
    "READY": 1, "JOBS": 2, "RESULTS": 3, "STOP": 4, "BYE": 5, "INTERRUPT": 6, "ERROR": 7, "FAILURES": 8, "DRAIN": 9, "TELL": 10,
    "HEARD": 11, "SHARED": 12, "BROKEN": 13,
}  # fmt: skip
"""TELL carries a message of the user's own, HEARD says how many more of those were handled."""

FAILURE_LENGTH_BYTES: Final = 8
"""FAILURES carries results, the pickled failures, and at the very end the length of the latter as an int64."""
MOST_ATTEMPTS: Final = 255
LETTERS_MOST: Final = 8
"""So many TELL may be on their way from one rank to another: sent, and not yet HEARD."""

HEADER_DTYPE: Final = np.dtype(
    [
        ("magic", "u2"),
        ("kind", "u1"),
        ("attempt", "u1"),
        ("run", "u2"),
        ("body_tag", "u2"),
        ("first", "i8"),
        ("count", "i4"),
        ("slot", "i4"),
        ("body_bytes", "i8"),
    ]
)


def padded_bytes(body_bytes: int) -> int:
    """Return the size in bytes of the buffer that a body needs: whole units where it is counted in units."""
    if body_bytes < UNIT_FROM_BYTES:
        return body_bytes
    return -(-body_bytes // UNIT_BYTES) * UNIT_BYTES

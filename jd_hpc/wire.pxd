"""The C side of wire.py: the header as a struct, and the same numbers as constants.

tests/unit/test_wire.py holds the two to each other.
"""
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t

cdef enum:
    MAGIC = 0x4A44
    PROTOCOL = 2
    TAG_MESSAGE = 1
    TAG_BODY = 16
    TAG_BODY_COUNT = 1024
    HEADER_BYTES = 32
    MESSAGE_BYTES = 2048
    INLINE_BYTES = MESSAGE_BYTES - HEADER_BYTES
    UNIT_BYTES = 1 << 20
    FAILURE_LENGTH_BYTES = 8
    MOST_ATTEMPTS = 255
    UNIT_FROM_BYTES = 1 << 30
    LETTERS_MOST = 8

cdef enum:
    KIND_READY = 1
    KIND_JOBS = 2
    KIND_RESULTS = 3
    KIND_STOP = 4
    KIND_BYE = 5
    KIND_INTERRUPT = 6
    KIND_ERROR = 7
    KIND_FAILURES = 8
    KIND_DRAIN = 9
    KIND_TELL = 10
    KIND_HEARD = 11
    KIND_SHARED = 12
    KIND_BROKEN = 13

cdef struct Header:
    uint16_t magic          # MAGIC: anything else is not ours
    uint8_t kind            # KIND_*
    uint8_t attempt         # which dispatch of the batch, from 0
    uint16_t run            # which run() of this communicator, modulo 2^16: fences off what an earlier one left
    uint16_t body_tag       # where the body comes, when it is too long to travel in the message
    int64_t first           # number of the batch's first job
    int32_t count           # jobs in the batch; of HEARD: messages
    int32_t slot            # the master's slot for the batch; of TELL: whom it is for, and on a slave whom it is from
    int64_t body_bytes      # payload after the header, inline or in a message of its own

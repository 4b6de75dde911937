# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The compiled core: moves jobs and results by MPI, with no policy of its own.

The rules it keeps:

- Nothing blocks: every send and receive is posted and tested. A buffer belongs to its request until that completes.
- Only messages of up to MESSAGE_BYTES meet a wildcard; a longer payload is announced by its header and received from that one
  source.
- Arrays of numbers pass through without the GIL; whatever needs Python takes it once for a batch of messages.
- An idle rank spins briefly, then yields, then sleeps with growing pauses; whenever it sleeps it looks for signals.
- Every MPI return code passes `check`.

One C source serves every MPI family: setup.py names the module _core_<family>; machine.py loads the one that fits mpi4py's MPI.
"""
from cpython.exc cimport PyErr_CheckSignals
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdint cimport int16_t, int32_t, int64_t, uint16_t, uint32_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove, memset
from posix.time cimport clock_gettime, nanosleep, timespec
cimport cython
cimport numpy as cnp
from mpi4py.libmpi cimport *

from jd_hpc._batch cimport Buffer, Evaluator, Rows, monotonic_ns
from jd_hpc._history cimport Lines
from jd_hpc.scheduler cimport (
    BATCH_ENDED, BATCH_SENT, BATCH_WAITING, SLAVE_LOST, SLAVE_UP, VERDICT_DELIVER, VERDICT_REFUSED, Scheduler,
)
from jd_hpc.wire cimport *

import logging
import pickle
from collections import deque
from pickle import UnpicklingError, loads

import numpy as np
from mpi4py import MPI

from jd_hpc._batch import kernel_failures
from jd_hpc.errors import (
    Failure, JobError, MasterLostError, MessageError, MPIError, PayloadError, ProtocolError, RanksDisagreeError, SlaveError,
    SlavesLostError,
)
from jd_hpc.payload import ALIGN_BYTES, block_length, check_finite, framed, pack_into, pick, pickled, unpack
from jd_hpc.sharing import ASKS
from jd_hpc.signals import GIVE_UP_AFTER, is_request, pass_on

cnp.import_array()
assert ALIGN_BYTES == TABLE_BYTES

logger = logging.getLogger("jd_hpc")

# What MPI says of a failed rank where it has ULFM; elsewhere mpi4py gives numbers that no error has.
FAILED_CLASSES = {
    code for code in (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_PROC_ABORTED) if code > 20
}

# What pickle makes of nonsense. Anything else comes from a signal handler, and is not the sender's fault.
UNREADABLE = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError, TypeError, ValueError,
)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from *:
    """
    #include <time.h>
    /* Reading the coarse clock takes a few ns; it ticks every 1 to 10 ms, which is all that is needed here. */
    #ifdef CLOCK_MONOTONIC_COARSE
    #define JD_COARSE_CLOCK CLOCK_MONOTONIC_COARSE
    #else
    #define JD_COARSE_CLOCK CLOCK_MONOTONIC
    #endif
    """
    const int JD_COARSE_CLOCK

cdef enum:
    # An idle rank polls this often, then yields this often, then sleeps: on the benchmark's machine 200 polls are about 10 us
    SPIN_POLLS = 200
    YIELD_POLLS = 2000
    SLEEP_FIRST_NS = 1_000
    SLEEP_MOST_NS = 500_000
    SIGNAL_CHECK_NS = 4_000_000
    POLLS_PER_CLOCK = 64
    POLLS_PER_SWEEP = 256
    # rows up to this size are copied out for the single hooks: keeping one must not keep a whole message
    COPY_ROW_BYTES = 4096
    # an object up to this size is copied to be unpickled
    COPY_OBJECT_BYTES = 65536
    # how long the table of the parts of an object is, if it has one part (payload.py)
    TABLE_BYTES = 64
    # what a slave says besides results (facts, errors) may be as large as this, whatever payload_limit is
    REPORT_LIMIT_BYTES = 1 << 26

cdef struct Outgoing:
    char *data              # header and payload, one piece of memory
    MPI_Request head        # the message: the header, and the payload where it fits
    MPI_Request body        # the payload where it does not
    int dest                # who it went to last

cdef struct Body:
    MPI_Request request
    Header header
    int source
    bint broken             # MPI gave an error for it: never to be waited for


cdef int check(int code) except -1 nogil:
    """The one gate for MPI return codes."""
    if code == MPI_SUCCESS:
        return 0
    with gil:
        raise_mpi_error(code)
    return -1


cdef int64_t padded_bytes(int64_t body_bytes) noexcept nogil:
    """wire.padded_bytes in C: a signal handler may run in any Python function, and none may between a header and its body."""
    if body_bytes < UNIT_FROM_BYTES:
        return body_bytes
    return (body_bytes + UNIT_BYTES - 1) // UNIT_BYTES * UNIT_BYTES


cdef int64_t coarse_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(JD_COARSE_CLOCK, &now)  # cannot fail with a clock that exists
    return <int64_t> now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef object unpacked(Buffer buffer, int64_t start, int64_t end):
    """payload.unpack; without numpy where it is small and has no buffers, as most objects."""
    cdef int64_t[2] table
    if TABLE_BYTES <= end - start <= COPY_OBJECT_BYTES:
        memcpy(table, buffer.data + start, sizeof(table))
        if table[0] == 1 and 0 <= table[1] <= end - start - TABLE_BYTES:
            try:
                return loads((buffer.data + start + TABLE_BYTES)[:table[1]])
            except UnpicklingError:
                pass  # unpack says it better
    return unpack(buffer.memory[start:end])


cdef str mpi_error_text(int code):
    cdef char text[MPI_MAX_ERROR_STRING + 1]
    cdef int length = 0
    memset(text, 0, sizeof(text))
    MPI_Error_string(code, text, &length)  # its own failure leaves an empty text
    return text[:length].decode("utf-8", "replace")


cdef int raise_mpi_error(int code) except -1:
    raise MPIError(f"MPI reports error {code}: {mpi_error_text(code)}")


# Final methods are called without a detour through the table of methods, and the small ones are inlined.
cdef class Link:
    """What master and slave share: posted receives, bodies on their way, sends, and the pause of an idle rank."""
    cdef MPI_Comm comm
    cdef MPI_Datatype unit              # UNIT_BYTES bytes: how the longest bodies are counted
    cdef readonly int rank
    cdef readonly int size
    cdef readonly int64_t run
    cdef uint16_t run_mark              # what stands for it in a header
    cdef int64_t payload_limit
    cdef readonly int64_t dropped       # messages that were not of this run, or none of ours
    cdef readonly list early            # messages of the next run, from a rank that is ahead: (source, bytes)
    # posted receives of messages
    cdef int source                     # MPI_ANY_SOURCE on the master, 0 on a slave
    cdef int posted
    cdef MPI_Request *receives
    cdef int *order                     # ring: the receives in the order in which they were posted
    cdef int order_head
    cdef int order_length
    cdef int64_t empty_polls
    cdef MPI_Status status              # of the message that came in last
    cdef list messages                  # their Buffers
    cdef char **message_data
    cdef Rows message_rows              # what lies in an inline payload
    # bodies on their way in
    cdef int body_limit
    cdef int body_count
    cdef Body *bodies
    cdef list body_buffers
    cdef uint32_t[::1] body_turn         # for each rank: bodies sent to it in all runs so far, which gives the next one's tag
    # the pause of an idle rank
    cdef int64_t idle_polls
    cdef int64_t busy_polls
    cdef int64_t pause_ns
    cdef int64_t looked_ns              # when Python's signal handlers last had their turn
    cdef object held                    # what a signal handler raised while ranks parted
    cdef int held_count
    cdef public bint impatient          # the user will not wait: what is raised next gets through
    cdef readonly bint parting          # from the end of the loop to the goodbye: signals.py lets a Ctrl-C wait

    def __cinit__(self, uintptr_t handle, int64_t run, uint32_t[::1] body_turn, *args):
        self.comm = <MPI_Comm> handle
        self.unit = MPI_DATATYPE_NULL
        check(MPI_Comm_rank(self.comm, &self.rank))
        check(MPI_Comm_size(self.comm, &self.size))
        check(MPI_Type_contiguous(UNIT_BYTES, MPI_BYTE, &self.unit))
        check(MPI_Type_commit(&self.unit))
        self.pause_ns = SLEEP_FIRST_NS  # a rank that nobody ever tells anything pauses, too
        self.run = run
        self.run_mark = <uint16_t> run
        self.payload_limit = UNIT_FROM_BYTES
        self.messages = []
        self.early = []
        self.body_buffers = []
        self.body_turn = body_turn

    def __dealloc__(self):
        cdef int finalized = 0
        free(self.receives)
        free(self.order)
        free(self.message_data)
        free(self.bodies)
        MPI_Finalized(&finalized)  # a failure here leaves 0, and the type is freed
        if not finalized and self.unit != MPI_DATATYPE_NULL:
            MPI_Type_free(&self.unit)  # nobody is left to hear of an error

    @cython.final
    cdef int post(self, int source, int posted, int body_limit, Rows rows) except -1:
        """Post the receives. `rows` is what inline payloads hold, or None."""
        cdef int i
        self.source = source
        self.body_limit = body_limit
        self.message_rows = rows
        self.receives = <MPI_Request *> calloc(posted, sizeof(MPI_Request))
        self.order = <int *> calloc(posted, sizeof(int))
        self.message_data = <char **> calloc(posted, sizeof(char *))
        self.bodies = <Body *> calloc(body_limit, sizeof(Body))
        if not (self.receives and self.order and self.message_data and self.bodies):
            raise MemoryError()
        self.body_buffers = [None] * body_limit
        for i in range(posted):
            self.messages.append(None)
            self.renew_message(i)
            self.receives[i] = MPI_REQUEST_NULL
        self.posted = posted
        for i in range(posted):
            self.repost(i)
        return 0

    @cython.final
    cdef int renew_message(self, int i) except -1:
        cdef Buffer buffer = Buffer(MESSAGE_BYTES, self.message_rows, HEADER_BYTES)
        self.messages[i] = buffer
        self.message_data[i] = buffer.data
        return 0

    @cython.final
    cdef int repost(self, int i) except -1 nogil:
        cdef int tail = self.order_head + self.order_length
        self.order[tail if tail < self.posted else tail - self.posted] = i
        self.order_length += 1
        return check(MPI_Irecv(self.message_data[i], MESSAGE_BYTES, MPI_BYTE, self.source, TAG_MESSAGE, self.comm,
                               &self.receives[i]))

    @cython.final
    cdef int poll(self) except -2 nogil:
        """Which receive holds a message that came in, or -1. The caller reposts it; `status` tells its source.

        Messages match the receives in the order in which these were posted, so it is enough to test the first one. Should a sender
        die in the middle of a message, its receive never completes: now and then all are tested. A test that fails is costly (Open
        MPI yields in it when there are more ranks than cores), so none is made before what came in was answered.
        """
        cdef int i, code, flag = 0
        if self.order_length == 0:
            return -1
        i = self.order[self.order_head]
        code = MPI_Test(&self.receives[i], &flag, &self.status)
        if self.is_too_long(code):
            return self.take_out(code, i)
        if self.tolerate(code, self.source):
            return -1
        if flag:
            self.order_head = 0 if self.order_head + 1 == self.posted else self.order_head + 1
            self.order_length -= 1
            return i
        self.empty_polls += 1
        return self.sweep() if self.empty_polls % POLLS_PER_SWEEP == 0 else -1

    @cython.final
    cdef int sweep(self) except -2 nogil:
        """Test all receives."""
        cdef int code, found = MPI_UNDEFINED, flag = 0
        code = MPI_Testany(self.posted, self.receives, &found, &flag, &self.status)
        if not self.is_too_long(code) and (self.tolerate(code, self.source) or not flag):
            return -1
        return -1 if found == MPI_UNDEFINED else self.take_out(code, found)

    @cython.final
    cdef int take_out(self, int code, int found) except -2 nogil:
        """Take a receive that is complete out of the order. A message that was too long for it is rejected."""
        cdef int k, i, kept = 0, length = self.order_length
        for k in range(length):
            i = self.order[(self.order_head + k) % self.posted]
            if i != found:
                self.order[(self.order_head + kept) % self.posted] = i
                kept += 1
        self.order_length = kept
        if code == MPI_SUCCESS:
            return found
        self.repost(found)
        with gil:
            self.reject(self.status.MPI_SOURCE, f"it sent a message of more than {MESSAGE_BYTES} bytes")
        return -1

    @cython.final
    cdef bint is_too_long(self, int code) noexcept nogil:
        cdef int kind = MPI_SUCCESS
        if code == MPI_SUCCESS:
            return False
        MPI_Error_class(code, &kind)  # its own failure leaves it an error like any other
        return kind == MPI_ERR_TRUNCATE

    cdef int reject(self, int source, str why) except -1:
        """A message is none of ours."""
        logger.warning("rank %d is not believed: %s", source, why)
        self.dropped += 1
        return 0

    @cython.final
    cdef bint is_ours(self, int i) except -1 nogil:
        """Whether the message that came in to the i-th receive belongs to this run and is whole."""
        cdef int bytes_in = 0
        cdef char *data = self.message_data[i]
        cdef Header *header = <Header *> data
        check(MPI_Get_count(&self.status, MPI_BYTE, &bytes_in))
        if bytes_in >= HEADER_BYTES and header.magic == MAGIC and header.body_bytes >= 0 \
                and (header.body_bytes > INLINE_BYTES or bytes_in == HEADER_BYTES + header.body_bytes):
            if header.run == self.run_mark:
                return True
            if <int16_t> (header.run - self.run_mark) > 0:
                with gil:
                    self.early.append((self.status.MPI_SOURCE, data[:bytes_in]))
            else:
                self.dropped += 1
            return False
        with gil:
            self.reject(self.status.MPI_SOURCE, f"a message of {bytes_in} bytes has no good header")
        return False

    # ---- bodies --------------------------------------------------------------------------------------------------

    @cython.final
    cdef int expect_body(self, Header *header, int source, Rows rows, make_memory=None) except -1:
        """Receive a body that was announced, into a buffer of its own, or into memory that `make_memory(bytes)` gives."""
        cdef Buffer buffer
        cdef int64_t wanted = padded_bytes(header.body_bytes)
        cdef int i = self.body_count
        if header.body_bytes > max(self.payload_limit, <int64_t> REPORT_LIMIT_BYTES) \
                + (REPORT_LIMIT_BYTES if header.kind == KIND_FAILURES else 0):
            raise ProtocolError(f"rank {source} announces {header.body_bytes} bytes, over payload_limit = {self.payload_limit}")
        if i == self.body_limit:
            raise ProtocolError(f"rank {source} announces a body while {i} are on their way: more than all the credit given out")
        if not TAG_BODY <= header.body_tag < TAG_BODY + TAG_BODY_COUNT:
            raise ProtocolError(f"rank {source} announces a body with tag {header.body_tag}")
        buffer = Buffer(wanted, rows, 0, False, None if make_memory is None else make_memory(wanted))
        self.body_buffers[i] = buffer
        self.bodies[i].header = header[0]
        self.bodies[i].source = source
        self.bodies[i].broken = False
        check(self.transfer(buffer.data, header.body_bytes, source, header.body_tag, &self.bodies[i].request, False))
        self.body_count += 1
        return 0

    @cython.final
    cdef int transfer(self, char *data, int64_t body_bytes, int other, int tag, MPI_Request *request, bint out) noexcept nogil:
        """Isend or Irecv a body. From UNIT_FROM_BYTES on it is counted in units: the buffer is padded to whole ones."""
        cdef MPI_Datatype kind = MPI_BYTE
        cdef int count = <int> body_bytes
        if body_bytes >= UNIT_FROM_BYTES:
            kind = self.unit
            count = <int> ((body_bytes + UNIT_BYTES - 1) // UNIT_BYTES)
        if out:
            return MPI_Isend(data, count, kind, other, tag, self.comm, request)
        return MPI_Irecv(data, count, kind, other, tag, self.comm, request)

    @cython.final
    cdef int finished_body(self) except -2 nogil:
        """Which body is complete, or -1. The caller takes it out with `take_body`."""
        cdef int i
        for i in range(self.body_count):
            if self.is_complete(i):
                return i
        return -1

    @cython.final
    cdef bint is_complete(self, int i) except -1 nogil:
        """Whether a body has come in."""
        cdef int flag = 0
        if self.bodies[i].broken:
            return False
        if self.tolerate(MPI_Test(&self.bodies[i].request, &flag, MPI_STATUS_IGNORE), self.bodies[i].source):
            self.bodies[i].broken = True
            return False
        return flag != 0

    @cython.final
    cdef Buffer take_body(self, int i):
        """Take a complete body out of the table; the last one fills the gap."""
        cdef Buffer buffer = self.body_buffers[i]
        self.body_count -= 1
        self.bodies[i] = self.bodies[self.body_count]
        self.body_buffers[i] = self.body_buffers[self.body_count]
        self.body_buffers[self.body_count] = None
        return buffer

    # ---- sends ---------------------------------------------------------------------------------------------------

    @cython.final
    cdef int send(self, Outgoing *out, int dest) except -1 nogil:
        """Send what lies at `out.data`: a header (magic, run and tag are filled in here) and its payload."""
        return self.send_apart(out, out.data + HEADER_BYTES, dest)

    @cython.final
    cdef int send_apart(self, Outgoing *out, char *body, int dest) except -1 nogil:
        """The same; a payload that travels as a body lies at `body`."""
        cdef Header *header = <Header *> out.data
        header.magic = MAGIC
        header.run = self.run_mark
        out.dest = dest
        if header.body_bytes <= INLINE_BYTES:
            if self.tolerate(MPI_Isend(out.data, HEADER_BYTES + <int> header.body_bytes, MPI_BYTE, dest, TAG_MESSAGE, self.comm,
                                       &out.head), dest):
                out.head = MPI_REQUEST_NULL
            return 0
        header.body_tag = TAG_BODY + self.body_turn[dest] % TAG_BODY_COUNT
        self.body_turn[dest] += 1
        if self.tolerate(MPI_Isend(out.data, HEADER_BYTES, MPI_BYTE, dest, TAG_MESSAGE, self.comm, &out.head), dest):
            out.head = MPI_REQUEST_NULL
        elif self.tolerate(self.transfer(body, header.body_bytes, dest, header.body_tag, &out.body, True), dest):
            out.body = MPI_REQUEST_NULL
        return 0

    @cython.final
    cdef bint is_sent(self, Outgoing *out) except -1 nogil:
        cdef int flag = 1
        if out.head != MPI_REQUEST_NULL and self.tolerate(MPI_Test(&out.head, &flag, MPI_STATUS_IGNORE), out.dest):
            out.head = MPI_REQUEST_NULL
            flag = 1
        if flag and out.body != MPI_REQUEST_NULL and self.tolerate(MPI_Test(&out.body, &flag, MPI_STATUS_IGNORE), out.dest):
            out.body = MPI_REQUEST_NULL
            flag = 1
        return flag != 0

    @cython.final
    cdef Buffer packed(self, object value, str what, int64_t limit, int64_t room_before=0, int64_t room_behind=0):
        """A buffer with space for a header and `room_before` bytes, then `value` pickled into at most `limit` bytes, then room."""
        cdef bytes head
        cdef int64_t size
        cdef int64_t[2] table
        head, buffers = pickled(value, what)
        table[0], table[1] = 1, len(head)
        if buffers:
            frames, size = framed(head, buffers, what)
        else:
            size = TABLE_BYTES + (table[1] + TABLE_BYTES - 1) // TABLE_BYTES * TABLE_BYTES
        if size > limit:
            raise PayloadError(f"{what} takes {size} bytes, over payload_limit = {limit}; split it, lower grain, or raise "
                               "payload_limit")
        cdef int64_t body_bytes = room_before + size + room_behind
        cdef Buffer buffer = Buffer(HEADER_BYTES + padded_bytes(body_bytes))
        memset(buffer.data, 0, HEADER_BYTES)
        if buffers:
            pack_into(frames, buffer.memory[HEADER_BYTES + room_before:])
        else:  # most objects: what pack_into would do, without numpy
            memcpy(buffer.data + HEADER_BYTES + room_before, table, sizeof(table))
            memcpy(buffer.data + HEADER_BYTES + room_before + TABLE_BYTES, <const char *> head, table[1])
        (<Header *> buffer.data).body_bytes = body_bytes
        return buffer

    # ---- pauses and the end ---------------------------------------------------------------------------------------

    @cython.final
    cdef int rest(self, bint busy) except -1 nogil:
        """To be called once for every poll: pauses when there was nothing to do, and lets Python's signal handlers run."""
        cdef timespec pause
        if busy:
            self.idle_polls = 0
            self.pause_ns = SLEEP_FIRST_NS
            self.busy_polls += 1
            return self.look_up(coarse_ns()) if self.busy_polls % POLLS_PER_CLOCK == 0 else 0
        self.idle_polls += 1
        if self.idle_polls <= SPIN_POLLS:
            return 0
        if self.idle_polls <= SPIN_POLLS + YIELD_POLLS:
            sched_yield()  # cannot fail on Linux; on a crowded node others now have their turn, which may take long
            return self.look_up(coarse_ns())
        pause.tv_sec = 0
        pause.tv_nsec = self.pause_ns
        nanosleep(&pause, NULL)  # a signal that cuts it short is looked at soon
        self.pause_ns = min(2 * self.pause_ns, <int64_t> SLEEP_MOST_NS)
        return self.look_up(coarse_ns())

    @cython.final
    cdef int look_up(self, int64_t now) except -1 nogil:
        """Every few ms Python's signal handlers have their turn, which is how Ctrl-C gets through."""
        if now - self.looked_ns < SIGNAL_CHECK_NS:
            return 0
        self.looked_ns = now
        with gil:
            try:
                PyErr_CheckSignals()
            except BaseException as error:
                self.hold(error)
            self.on_tick(now)
        return 0

    cdef int on_tick(self, int64_t now) except -1:
        """Every few ms: who is still there? Nothing that Python raises here may come between a header and its body."""
        return 0

    @cython.final
    cdef int tolerate(self, int code, int other) except -1 nogil:
        """The gate for codes that may tell of a failed rank: 0 is success, 1 such an error; any other one is raised.

        `other` is the rank that the call was about, MPI_ANY_SOURCE if nobody knows.
        """
        if code == MPI_SUCCESS:
            return 0
        with gil:
            return self.on_mpi_error(code, other)

    cdef int on_mpi_error(self, int code, int other) except -1:
        raise_mpi_error(code)
        return -1

    @cython.final
    cdef int hold(self, object error) except -1:
        """While ranks part, what a signal handler raises waits until they have; after the third the user will not wait."""
        self.held_count += 1
        if not self.parting or self.impatient or self.held_count == GIVE_UP_AFTER:
            raise error
        if self.held is None:
            self.held = error
        return 0

    @cython.final
    cdef object opened(self, Buffer buffer, int64_t start, int64_t end, object kind, int source):
        """What a rank has pickled, if it is what it must be."""
        try:
            value = unpacked(buffer, start, end)
        except UNREADABLE as error:
            raise ProtocolError(f"rank {source} sent what cannot be read: {error}") from error
        if not isinstance(value, kind):
            raise ProtocolError(f"rank {source} sent {type(value).__name__} in place of {kind.__name__}")
        return value

    @cython.final
    cdef int release_held(self) except -1:
        """The ranks have parted."""
        self.parting = False
        if self.held is not None:
            raise self.held
        return 0

    @cython.final
    cdef int unpost(self) except -1:
        """Take back the receives. One may just have matched a message of the next run: that is kept."""
        cdef int i, cancelled = 0
        for i in range(self.posted):
            if self.receives[i] == MPI_REQUEST_NULL:
                continue
            check(MPI_Cancel(&self.receives[i]))
            if self.tolerate(MPI_Wait(&self.receives[i], &self.status), self.source):
                continue
            check(MPI_Test_cancelled(&self.status, &cancelled))
            if not cancelled:
                self.is_ours(i)
        self.posted = self.order_length = 0
        return 0


def layout():
    """Sizes and numbers of the compiled wire format, for the test that holds wire.py to them."""
    return {
        "HEADER_BYTES": HEADER_BYTES, "MESSAGE_BYTES": MESSAGE_BYTES, "INLINE_BYTES": INLINE_BYTES, "MAGIC": MAGIC,
        "PROTOCOL": PROTOCOL, "TAG_MESSAGE": TAG_MESSAGE, "TAG_BODY": TAG_BODY, "TAG_BODY_COUNT": TAG_BODY_COUNT,
        "UNIT_BYTES": UNIT_BYTES, "UNIT_FROM_BYTES": UNIT_FROM_BYTES, "sizeof": sizeof(Header),
        "FAILURE_LENGTH_BYTES": FAILURE_LENGTH_BYTES, "MOST_ATTEMPTS": MOST_ATTEMPTS, "LETTERS_MOST": LETTERS_MOST,
        "KINDS": {"READY": KIND_READY, "JOBS": KIND_JOBS, "RESULTS": KIND_RESULTS, "STOP": KIND_STOP, "BYE": KIND_BYE,
                  "INTERRUPT": KIND_INTERRUPT, "ERROR": KIND_ERROR, "FAILURES": KIND_FAILURES, "DRAIN": KIND_DRAIN,
                  "SHARED": KIND_SHARED, "BROKEN": KIND_BROKEN,
                  "TELL": KIND_TELL, "HEARD": KIND_HEARD},
    }


include "_letters.pxi"
include "_slave.pxi"
include "_sharing.pxi"
include "_jobs.pxi"
include "_postmaster.pxi"
include "_survive.pxi"
include "_drain.pxi"
include "_delivery.pxi"
include "_master.pxi"

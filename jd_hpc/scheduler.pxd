"""C types of scheduler.py, which also runs uncompiled. Numbers are 64 bit where they count jobs."""
cimport cython

cdef enum:
    SLAVE_ABSENT = 0
    SLAVE_UP = 1
    SLAVE_LOST = 2
    SLAVE_SUSPECT = 3
    BATCH_FREE = 0
    BATCH_OPEN = 1
    BATCH_WAITING = 2
    BATCH_SENT = 3
    BATCH_ENDED = 4                     # the caller delivers it
    BATCH_RETIRED = 5                   # delivered, but a live slave still works on it
    VERDICT_DELIVER = 0
    VERDICT_LATE = 1
    VERDICT_REFUSED = 2
    DISPATCHES_MOST = 256               # a header counts attempts in one byte

@cython.final
cdef class Scheduler:
    cdef readonly int slave_count       # slaves are 1 .. slave_count
    cdef readonly int credit            # batches that a slave may hold at once
    cdef readonly int batch_count       # slots of the ledger
    cdef readonly int max_attempts      # strikes after which a batch is given up
    cdef readonly int up_count          # slaves that are up
    cdef readonly int absent_count      # slaves that have not reported yet
    cdef readonly int suspect_count
    cdef readonly int ready_count       # slaves in the ready queue that are up: each has credit left
    cdef readonly int waiting_count     # batches that wait for a slave
    cdef readonly int open_count        # slots that are not free
    cdef readonly int free_credit       # batches that the slaves that are up could still take
    cdef readonly int held_count        # batches that slaves hold
    cdef readonly long long sent        # counters, for the whole run
    cdef readonly long long ended
    cdef readonly long long resent
    cdef readonly long long late
    cdef readonly long long refused
    cdef readonly long long lost
    cdef readonly long long suspected
    cdef readonly long long reinstated
    # slaves, index 0 unused
    cdef int[::1] slave_state
    cdef int[::1] slave_held            # batches sent to it, not answered
    cdef long long[::1] slave_answers   # answers that came from it
    cdef int[::1] slave_queued          # 1: stands in the ready queue
    cdef int[::1] ready                 # ring, at most one entry for each slave
    cdef int ready_head
    cdef int ready_length
    # batches
    cdef int[::1] batch_state
    cdef long long[::1] batch_first     # number of its first job
    cdef int[::1] batch_jobs            # how many jobs
    cdef int[::1] batch_attempt         # from 0: how often it was sent before
    cdef int[::1] batch_strikes         # how often a slave failed while it ran it
    cdef long long[::1] batch_order     # `sent` at its last dispatch
    cdef int[::1] batch_slave           # who holds it; 0: nobody
    cdef int[::1] free                  # stack of free slots
    cdef int free_length
    cdef int[::1] waiting               # ring of slots
    cdef int waiting_head
    cdef int[::1] given_up              # ring of slots
    cdef int given_up_head
    cdef int given_up_length

    @cython.locals(slot=cython.int)
    cpdef int open(self) noexcept nogil
    cpdef int submit(self, int slot, long long first, int jobs, int strikes=*) noexcept nogil
    cpdef int cancel(self, int slot) noexcept nogil
    @cython.locals(slot=cython.int, slave=cython.int)
    cpdef int assign(self) noexcept nogil
    @cython.locals(slot=cython.int)
    cpdef int assign_local(self, bint struck_too=*, bint struck_wait=*) noexcept nogil
    @cython.locals(slave=cython.int)
    cpdef int limit_credit(self, int credit) noexcept nogil
    cpdef int on_ready(self, int slave) noexcept nogil
    @cython.locals(state=cython.int, newest=cython.int)
    cpdef int on_result(self, int slave, int slot, long long first, int jobs, int attempt) noexcept nogil
    cpdef int release(self, int slot) noexcept nogil
    @cython.locals(count=cython.int)
    cpdef int on_lost(self, int slave) noexcept nogil
    @cython.locals(count=cython.int)
    cpdef int on_suspect(self, int slave) noexcept nogil
    @cython.locals(slot=cython.int)
    cpdef int next_given_up(self) noexcept nogil
    cpdef int holder(self, int slot) noexcept nogil
    cpdef int attempt(self, int slot) noexcept nogil
    cpdef int strikes(self, int slot) noexcept nogil
    @cython.locals(slot=cython.int, found=cython.int)
    cpdef int running(self, int slave) noexcept nogil
    cpdef long long order(self, int slot) noexcept nogil
    cpdef int jobs(self, int slot) noexcept nogil
    cpdef long long first(self, int slot) noexcept nogil
    cpdef int held(self, int slave) noexcept nogil
    cpdef long long answers(self, int slave) noexcept nogil
    cpdef int state_of_slave(self, int slave) noexcept nogil
    cpdef int state_of_batch(self, int slot) noexcept nogil
    @cython.locals(tail=cython.int)
    cdef void _queue_slave(self, int slave) noexcept nogil
    @cython.locals(slave=cython.int)
    cdef int _next_slave(self) noexcept nogil
    cdef void _give_back(self, int slave) noexcept nogil
    @cython.locals(tail=cython.int)
    cdef void _queue_batch(self, int slot) noexcept nogil
    @cython.locals(slot=cython.int)
    cdef int _next_batch(self) noexcept nogil
    @cython.locals(other=cython.int)
    cdef void _unqueue_batch(self, int slot) noexcept nogil
    @cython.locals(slot=cython.int, struck=cython.int, count=cython.int)
    cdef int _take_back(self, int slave) noexcept nogil
    @cython.locals(strikes=cython.int)
    cdef void _again(self, int slot) noexcept nogil
    cdef void _give_up(self, int slot) noexcept nogil
    cdef void _free(self, int slot) noexcept nogil

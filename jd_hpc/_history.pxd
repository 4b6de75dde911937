"""Lines of a history, for the compiled core. No MPI."""
from libc.stdint cimport int64_t
cimport cython


@cython.final
cdef class Lines:
    cdef int file                       # descriptor; -1: nothing is written
    cdef readonly int trouble           # errno of the write that failed, which was the last one
    cdef char *data                     # what is not written yet
    cdef int64_t used
    cdef int64_t begun_ns
    cdef int64_t now_ns                 # when the last line was begun
    cdef int64_t written_ns             # when a block was written last
    cdef bint is_open                   # the last line tells of deliveries, and is not closed
    cdef int64_t span_first             # the jobs that it is to tell of next
    cdef int64_t span_count
    cdef int64_t line_limit             # where that line must end
    cpdef int sent(self, int slave, int slot, int64_t first, int count, int attempt) noexcept nogil
    cpdef int result(self, int verdict, int slave, int slot, int64_t first, int count, int attempt) noexcept nogil
    cpdef int delivered(self, int64_t first, int64_t count) noexcept nogil
    cpdef int flush(self) noexcept nogil
    cpdef int flush_in_time(self) noexcept nogil
    cdef int begin_line(self) noexcept nogil
    cdef int close_deliveries(self) noexcept nogil
    cdef int put_batch(self, int slave, int slot, int64_t first, int count, int attempt) noexcept nogil
    cdef int put_span(self) noexcept nogil
    cdef int put(self, const char *text) noexcept nogil
    cdef int put_number(self, int64_t number) noexcept nogil
    cdef int put_digits(self, int64_t number, int least) noexcept nogil
    cdef int write(self, const char *data, int64_t size) noexcept nogil
